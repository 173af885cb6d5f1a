"""`funnel bench peers`: models, cells, what is measured, and the command with a peer that runs in this environment."""

import json
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

from funnel_benchmarks import machine
from funnel_benchmarks.peers import command, hugging_face, llama_cpp_peer, sentence_transformers_peer
from funnel_benchmarks.peers import suite as suite_module
from funnel_benchmarks.peers.forms import PEERS, Kind, dtype_beside
from funnel_benchmarks.peers.suite import Suite, model_fields
from funnel_benchmarks.results import LeftOut, read_results
from funnel_benchmarks.suite import row_line
from funnel_engine import BackendUnavailable, ConfigError, FunnelConfig, FunnelError, InputError
from funnel_engine.flops import forward_flops
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.presets import PRESETS
from tiny_peers import MODELS

LENGTHS = {"mixed": np.array([3, 9, 5], np.int32)}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(command, "model_fields", lambda preset, depth: MODELS["gemma"])


def make_suite(folder, **changes):
    options = {
        "preset": "tiny",
        "depth": None,
        "dtype": "bfloat16",
        "fields": MODELS["gemma"],
        "lengths": LENGTHS,
        "peers": ("hugging-face-eager",),
        "scenarios": ("batch", "one"),
        "order": "sorted",
        "batch_size": 2,
        "repeats": 2,
        "backend": "xla",
        "folder": folder,
    }
    return Suite(**options | changes)


def test_models_are_those_of_the_presets_with_a_small_vocabulary():
    whole = read_model_config(model_fields("gemma-2b", None))
    assert (whole.num_layers, whole.hidden_size, whole.intermediate_size) == (18, 2048, 16384)
    assert (whole.attention, whole.vocab_size) == ("bidirectional", 2048)
    four = read_model_config(model_fields("embeddinggemma-300m", 7))
    assert four.layer_types == read_model_config(PRESETS["embeddinggemma-300m"]).layer_types[:7]
    assert set(four.layer_types) == {"full", "sliding"}
    qwen3 = read_model_config(model_fields("qwen3-embedding-0.6b", 4))
    assert (qwen3.num_layers, qwen3.hidden_size, qwen3.num_kv_heads) == (4, 1024, 8)
    assert (qwen3.attention, qwen3.vocab_size) == ("causal", 2048)
    assert read_model_config(model_fields("eurobert-210m", 1)).attention == "bidirectional"
    gemma2 = read_model_config(model_fields("embeddinggemma-2", 6))
    assert (gemma2.layer_types, gemma2.per_layer_width) == (("sliding",) * 5 + ("full",), 512)


def test_models_that_cannot_be_had():
    with pytest.raises(ConfigError, match=r"preset 't5gemma-s' has no peers: there are some for gemma-2b, gemma-7b"):
        model_fields("t5gemma-s", None)
    for depth in (0, 19):
        with pytest.raises(ConfigError, match=f"depth {depth} is not possible: gemma-2b has 18 layers"):
            model_fields("gemma-2b", depth)


def test_cells_are_every_peer_with_all_lengths_and_scenarios(tmp_path):
    lengths = LENGTHS | {"4": np.full(2, 4, np.int32)}
    suite = make_suite(tmp_path, lengths=lengths, peers=("openvino", "llama-cpp"))
    assert [name for name, _ in suite.cells(None)] == [
        f"{length}; {scenario}; {peer}"
        for peer in ("openvino", "llama-cpp")
        for length in ("mixed", "4")
        for scenario in ("batch", "one")
    ]
    assert not list(tmp_path.iterdir())  # nothing is made before it is measured


def test_bad_suites(tmp_path):
    with pytest.raises(InputError, match="longest sequence has 129 tokens, and the model was made for 128"):
        make_suite(tmp_path, lengths={"129": np.array([129], np.int32)})
    with pytest.raises(BackendUnavailable, match="backend 'gpu' does not exist"):
        make_suite(tmp_path, backend="gpu")


class FakePeer:
    """Answers with what ours computes, a little off if it is the second one, and keeps what it is asked for."""

    def __init__(self, module, *, until, **task):
        FakePeer.made += 1
        self.is_reference, self.facts = FakePeer.made == 1, {"version": "1", "dtype": task["dtype"]}
        FakePeer.module, FakePeer.task, FakePeer.asked = module, task, []
        if self.is_reference:
            FakePeer.reference = module, task

    def __enter__(self):
        engine = next(iter(FakePeer.suite.engines.values()))
        vectors = engine.embed(FakePeer.task["sequences"], normalize=False)
        off = vectors if self.is_reference else vectors + np.float32(0.01) * vectors[:, ::-1]
        self.result = off[np.concatenate(FakePeer.task["batches"])]
        return self

    def __exit__(self, *error):
        pass

    def sample(self, batch):
        FakePeer.asked.append(batch)
        return 2.0 if batch is None else 2.0 + batch


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(suite_module, "Peer", FakePeer)
    monkeypatch.setattr(suite_module, "sampler", lambda call, seconds: lambda: 0.5)
    FakePeer.suite, FakePeer.made = make_suite(tmp_path), 0
    return FakePeer.suite


def off(vectors):
    """How far the second `FakePeer` is from these: the mean cosine, and the largest relative difference."""
    theirs = vectors + 0.01 * vectors[:, ::-1]
    sizes = [np.linalg.norm(each, axis=1) for each in (vectors, theirs, theirs - vectors)]
    return ((vectors * theirs).sum(1) / (sizes[0] * sizes[1])).mean(), (sizes[2] / sizes[0]).max()


@pytest.mark.parametrize(("flags", "dtype"), [("avx2 avx512f avx512_vnni", "float32"), ("avx512_bf16", "bfloat16")])
def test_peers_compute_in_the_dtype_that_is_fast_here(fake, monkeypatch, tmp_path, flags, dtype):
    """Where the processor has no products in bfloat16, Hugging Face takes four times as long in it as in float32."""
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    machine.CPUINFO.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    row = {"cell": "x", **dict(fake.cells(None))["mixed; batch; hugging-face-eager"]()}
    assert (FakePeer.task["dtype"], row["facts"]["dtype"]) == (dtype, dtype)
    content = {"options": fake.options(), "rows": [row]}
    assert row_line(Suite.section, content, row | {"agreement": 1.0, "peer_agreement": 0.9995}) == (
        f"x: dtype bfloat16, peer's {dtype}, times as fast 4.00, latency 500.0 ms, peer's 2,000.0 ms, tokens/s 34, "
        "peer's 8 tokens/s, GFLOP/s 0.0, peer's 0.0 GFLOP/s, agreement 1.00000, peer's 0.99950"
    )


NEW = "avx2 avx512f avx512_vnni avx512_bf16"
OLD = "avx2 avx512f avx512_vnni"


@pytest.mark.parametrize(
    ("flags", "limit", "ours", "expected"),
    [
        (NEW, "", "bfloat16", ["bfloat16", "bfloat16", "float32", "bfloat16"]),
        (NEW, "avx512_bf16", "bfloat16", ["bfloat16", "bfloat16", "float32", "bfloat16"]),
        (NEW, "avx512", "bfloat16", ["float32", "float32", "float32", "float32 uses avx512_bf16, avx512_vnni, which"]),
        (NEW, "avx512", "int8", ["no form", "int8", "int8 uses avx512_vnni, which FUNNEL_CPU_ISA=avx512 does", "uses"]),
        (NEW, "avx2", "float32", ["float32", "float32 uses avx512f, which", "float32 uses avx512f, which", "uses"]),
        (NEW, "", "float32", ["float32"] * 4),
        (NEW, "", "int8", ["no form that is compared with the engine in int8", "int8", "int8", "int8"]),
        (OLD, "", "bfloat16", ["float32"] * 4),
        (OLD, "avx2", "int8", ["no form", "int8", "uses avx512_vnni, avx512f, which", "uses avx512_vnni, avx512f, "]),
        ("avx2", "avx2", "int8", ["no form", "int8", "int8", "int8"]),
        ("", "", "bfloat16", ["float32"] * 4),
    ],
)
def test_forms(monkeypatch, tmp_path, flags, limit, ours, expected):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    machine.CPUINFO.write_text(f"flags\t\t: fpu {flags}\n")
    monkeypatch.setenv("FUNNEL_CPU_ISA", limit)
    for peer, form in zip(("hugging-face-eager", "openvino", "onnx-runtime", "llama-cpp"), expected, strict=True):
        if form in ("float32", "bfloat16", "int8"):
            assert dtype_beside(peer, ours, on_cpu=True) == form
        else:
            with pytest.raises(LeftOut, match=form):
                dtype_beside(peer, ours, on_cpu=True)


def test_the_engine_itself_is_a_peer_of_int8_only():
    assert dtype_beside("funnel-engine", "int8", on_cpu=True) == "bfloat16"
    with pytest.raises(LeftOut, match="funnel-engine has no form that is compared with the engine in bfloat16"):
        dtype_beside("funnel-engine", "bfloat16", on_cpu=True)


def test_what_all_agree_with_is_computed_once_for_all_sequences(fake):
    cells = dict(fake.cells(None))
    agreements = [cells[f"mixed; {scenario}; hugging-face-eager"]() for scenario in ("one", "batch")]
    assert FakePeer.made == 3
    module, task = FakePeer.reference
    assert module is hugging_face
    assert (task["mode"], task["dtype"], task["batches"]) == ("eager", "float32", [[1, 2], [0]])
    (vectors,) = fake.references.values()
    cosine, _ = off(np.float64(vectors))
    for row in agreements:
        assert row["agreement"] == pytest.approx(1.0, abs=1e-12)
        assert row["peer_agreement"] == pytest.approx(cosine, abs=1e-7)
        assert row["peer_agreement"] < 1 - 1e-5


def test_a_batch_is_one_call_of_ours_and_all_batches_of_the_peer(fake):
    row = dict(fake.cells(None))["mixed; batch; hugging-face-eager"]()
    assert FakePeer.module is hugging_face
    assert FakePeer.task["mode"] == "eager"
    assert FakePeer.task["batches"] == [[1, 2], [0]]  # longest first
    assert [len(ids) for ids in FakePeer.task["sequences"]] == [3, 9, 5]
    assert FakePeer.asked == [None] * 4
    assert row["speedup"] == {"low": 4.0, "median": 4.0, "high": 4.0}
    assert (row["sequences"], row["tokens"]) == (3, 17)
    assert (row["tokens_per_second"], row["peer_tokens_per_second"]) == (17 / 0.5, 17 / 2)
    flops = forward_flops(fake.config, FunnelConfig(), LENGTHS["mixed"])
    assert (row["flops_per_second"], row["peer_flops_per_second"]) == (flops / 0.5, flops / 2)


def test_single_sequences_are_each_timed_beside_the_peer(fake):
    row = dict(fake.cells(None))["mixed; one; hugging-face-eager"]()
    assert FakePeer.task["batches"] == [[0], [1], [2]]
    assert FakePeer.asked == [0] * 4 + [1] * 4 + [2] * 4
    assert row["peer_seconds"]["samples"] == [2.0] * 4 + [3.0] * 4 + [4.0] * 4
    assert (row["seconds"]["median"], row["p90"]) == (0.5, 0.5)
    assert (row["peer_seconds"]["median"], row["peer_p90"]) == (3.0, 4.0)
    assert row["speedup"]["median"] == 6.0  # of ratios 4, 6 and 8
    assert "tokens_per_second" not in row


def test_sentence_transformers_gets_a_model_of_its_own_and_texts(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(suite_module, "Peer", FakePeer)
    monkeypatch.setattr(FakePeer, "made", 0, raising=False)

    def sampler(call, seconds):
        given.append(call.args[0])
        return lambda: 0.5

    monkeypatch.setattr(suite_module, "sampler", sampler)
    suite = make_suite(tmp_path, peers=("sentence-transformers",), scenarios=("batch",))
    engine = suite.engine(suite.source("sentence-transformers"))
    monkeypatch.setattr(FakePeer, "__enter__", lambda peer: setattr(peer, "result", expected) or peer)
    sequences = suite_module.random_sequences(LENGTHS["mixed"], 128)
    expected = engine.embed(sequences)[[1, 2, 0]]  # of length 1, by the model's heads
    row = next(measure for _, measure in suite.cells(None))()
    assert FakePeer.made == 2
    assert FakePeer.reference[0] is FakePeer.module is sentence_transformers_peer
    assert FakePeer.task["checkpoint"].endswith("sentence")
    assert given[0] == [" ".join(f"w{token}" if token else "<pad>" for token in ids) for ids in sequences]
    assert row["agreement"] == row["peer_agreement"] == pytest.approx(1.0, abs=1e-12)


def test_a_peer_that_computes_something_else_is_an_error(fake, monkeypatch):
    monkeypatch.setattr(suite_module, "TOLERANCES", {"float32": 0.005, "bfloat16": 0.005})
    cell = dict(fake.cells(None))["mixed; batch; hugging-face-eager"]
    with pytest.raises(FunnelError, match=r"the peer's result differs from Hugging Face's in float32 by 0\.0") as error:
        cell()
    (vectors,) = fake.references.values()
    assert f"by {off(np.float64(vectors))[1]:.3g} of its size" in str(error.value)
    assert not FakePeer.asked  # nothing was timed
    fake.references[next(iter(fake.references))] = -vectors
    with pytest.raises(FunnelError, match="the engine's result differs from Hugging Face's in float32 by 2 of"):
        cell()


def test_on_a_gpu_hugging_face_computes_there_and_others_are_left_out(fake, monkeypatch, tmp_path):
    fake.engine(fake.source("hugging-face-eager"))
    monkeypatch.setattr(suite_module.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")  # whatever the processor can do
    monkeypatch.setattr(suite_module, "check_same", lambda *_: 1.0)
    engine = next(iter(fake.engines.values()))
    monkeypatch.setattr(engine, "embed", lambda sequences, normalize: np.zeros((len(sequences), 1), np.float32))
    dict(fake.cells(None))["mixed; batch; hugging-face-eager"]()
    assert (FakePeer.task["device"], FakePeer.task["dtype"]) == ("cuda", "bfloat16")
    assert (FakePeer.reference[1]["device"], FakePeer.reference[1]["dtype"]) == ("cuda", "float32")
    others = make_suite(tmp_path, peers=("openvino", "llama-cpp"))
    for platform, suite in (("gpu", others), ("tpu", others), ("tpu", fake)):
        monkeypatch.setattr(suite_module.jax, "default_backend", lambda platform=platform: platform)
        for _, measure in suite.cells(None):
            with pytest.raises(LeftOut, match=f"JAX runs on {platform}, where this peer does not"):
                measure()


def test_llama_cpp_is_left_out_where_it_has_no_such_model(tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS, "llama-cpp", Kind(llama_cpp_peer, {}, PEERS["llama-cpp"].forms))  # needs no package
    suite = make_suite(tmp_path, fields=MODELS["qwen3"], peers=("llama-cpp",))
    for _, measure in suite.cells(None):
        with pytest.raises(LeftOut, match=r"llama\.cpp runs no causal qwen3 as an encoder"):
            measure()
    assert not list(tmp_path.iterdir())  # before a checkpoint is written


def run(*options):
    return CliRunner().invoke(command.peers, options, catch_exceptions=False)


ABSENT = ModuleType("absent_peer")


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    (tmp_path / "absent_peer.py").write_text("def make(task): import no_such_package")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(PEERS, "llama-cpp", Kind(ABSENT, {}, PEERS["llama-cpp"].forms))
    file = tmp_path / "peers.json"
    options = ("--lengths", "7", "--sequences", "3", "--repeats", "1", "--backend", "xla", "--json", str(file))
    options += ("--peer", "llama-cpp", "--peer", "hugging-face-eager")
    result = run(*options, "--scenario", "batch")
    assert result.exit_code == 0  # what is not installed is no failure
    assert "7; batch; llama-cpp: left out: no_such_package is not installed: pip install" in result.output
    content = read_results(file)
    assert content["options"]["lengths"]["7"] == {
        "sequences": 3,
        "tokens": 21,
        "shortest": 7,
        "median": 7.0,
        "longest": 7,
    }
    assert content["rows"][0]["facts"]["attention"] == hugging_face.WITHOUT_MASK
    assert run(*options, "--resume").exit_code == 0  # and the other scenario
    rows = read_results(file)["rows"]
    assert [row["scenario"] for row in rows] == ["batch", "one"]
    assert rows[0] == content["rows"][0]
    assert len(rows[1]["seconds"]["samples"]) == 6
    check_section(read_results(file))


def check_section(content):
    made = Suite.section(content)
    assert made.title.endswith(", 7")
    unsorted = content | {"options": content["options"] | {"order": "unsorted"}}
    assert Suite.section(unsorted).title.endswith(", 7, batches unsorted")
    assert made.facts["Lengths"] == "7: 3 sequences of 7 tokens, 21 in all"
    peer_dtype = "bfloat16" if machine.multiplies_bfloat16() else "float32"
    assert f"dtype {peer_dtype}" in made.facts["hugging-face-eager"]
    assert [table.caption for table in made.tables] == ["All sequences", "One sequence after another"]
    for table, row, plot in zip(made.tables, content["rows"], made.plots, strict=True):
        (cells,) = table.cells
        assert (cells[1].text, cells[2].text) == ("bfloat16", peer_dtype)
        assert cells[3].value == row["speedup"]["median"]
        assert 0.999 < row["agreement"] < 1
        assert 0.999 < row["peer_agreement"] <= 1  # in float32 the peer is what both are compared with
        assert [cell.value for cell in cells[-2:]] == [row["agreement"], row["peer_agreement"]]
        assert f"{row['speedup']['median']:.2f} (hugging-face-eager, 7)" in made.summary
        (panel,) = plot.panels
        assert (panel.rows, panel.series[0].values) == (["hugging-face-eager, 7"], [row["speedup"]])


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match="--resume adds to the file of --json"):
        run("--resume")
    with pytest.raises(InputError, match=r"lengths 'none' is neither a readable text file nor one of conll"):
        run("--lengths", "none")
    with pytest.raises(InputError, match="--lengths 0: a sequence has 1 to 999999999 tokens"):
        run("--lengths", "0")
    with pytest.raises(InputError, match="longest sequence has 999 tokens"):
        run("--lengths", "999")
    file = tmp_path / "peers.json"
    file.write_text('{"schema": 3')
    with pytest.raises(InputError, match="is cut short"):
        run("--lengths", "7", "--json", str(file), "--resume")
    assert file.read_text() == '{"schema": 3'
    assert run("--peer", "vllm").exit_code == 2


def test_options_say_what_the_figures_depend_on(tmp_path):
    options = make_suite(tmp_path, order="unsorted").options()
    assert json.loads(json.dumps(options)) == {
        "preset": "tiny",
        "depth": None,
        "dtype": "bfloat16",
        "lengths": {"mixed": {"sequences": 3, "tokens": 17, "shortest": 3, "median": 5.0, "longest": 9}},
        "order": "unsorted",
        "batch_size": 2,
        "repeats": 2,
        "backend": "xla",
        "seed": 0,
    }
