"""Benchmarks of a Funnel-Transformer: its own funnel against its layers as one block, its ops, and its peers."""

import jax
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from funnel_benchmarks.kernels import command as kernels_command
from funnel_benchmarks.kernels.cases import Sizes
from funnel_benchmarks.kernels.funnel_transformer_cases import funnel_transformer_cases
from funnel_benchmarks.models import checkpoint_model, funnel_transformer_model
from funnel_benchmarks.peers import exported_graph, hugging_face
from funnel_benchmarks.peers import suite as suite_module
from funnel_benchmarks.peers.batches import in_order, make_batches
from funnel_benchmarks.peers.suite import Suite, difference, funnel_transformer_fields, model_fields
from funnel_benchmarks.random_checkpoint import write_random_model
from funnel_benchmarks.results import LeftOut, read_results
from funnel_engine import Engine, convert
from funnel_engine.cli import main
from funnel_engine.flops import forward_flops, ideal_ratio
from funnel_engine.presets import FUNNEL_TRANSFORMERS, funnel_transformer
from funnel_kernels.errors import ConfigError, InputError

TINY = {"block_sizes": [1, 1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "num_decoder_layers": 1}
LENGTHS = np.array([12, 5, 9, 40], np.int32)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(FUNNEL_TRANSFORMERS, "tiny", TINY)


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


# ------------------------------------------------------------------------------------------------------ latency


@pytest.mark.parametrize("name", ["tiny", "tiny-base"])
def test_latency_compares_the_blocks_with_one_block_of_all_layers(name, tmp_path):
    options = "--batch", 2, "--lengths", "20", "--dtype", "float32", "--backend", "xla", "--repeats", 1
    result = run("latency", "--preset", name, *options, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    content = read_results(tmp_path / "out.json")
    (row,) = content["rows"]
    config, funnel = funnel_transformer(name)
    assert row["funnel"]["strides"] == [1, 2, 2]
    assert row["funnel"]["recovery"] == funnel.recovery == (None if "base" in name else "sum_last")
    assert row["ideal_ratio"] == pytest.approx(ideal_ratio(config, funnel, np.array([20, 20])), rel=1e-5)
    assert row["efficiency"] == pytest.approx(row["ideal_ratio"] / row["ratio"]["median"], rel=1e-3)
    assert content["options"]["model"]["layers"] == 3
    assert content["options"]["served_by"] == "xla"


def test_latency_takes_the_funnel_of_a_converted_checkpoint(tmp_path):
    write_random_model(tmp_path / "source", funnel_transformer_fields("tiny-base"))
    convert(tmp_path / "source", tmp_path / "engine")
    model = checkpoint_model(tmp_path / "engine", None)
    assert model.funnel == funnel_transformer("tiny-base")[1]
    options = "--checkpoint", tmp_path / "engine", "--batch", 1, "--lengths", "9", "--backend", "xla", "--repeats", 1
    assert (result := run("latency", *options)).exit_code == 0, result.output
    assert "2:1 after 1, 2:1 after 2" in result.output


@pytest.mark.parametrize("option", [("--layers", "2"), ("--stride", 4), ("--pool", "max"), ("--recovery", "tile")])
def test_latency_refuses_another_funnel(option):
    result = run("latency", "--preset", "tiny-base", *option)
    assert result.exit_code == 2
    assert f"the funnel of tiny-base is between its blocks; leave out {option[0]}" in " ".join(result.stderr.split())


@pytest.mark.parametrize("command", ["scaling", "serve"])
def test_other_suites_refuse_it(command):
    result = run(command, "--preset", "funnel-small")
    assert result.exit_code == 2
    assert "'funnel-small' is a Funnel-Transformer, which this is not for; choose one of gemma-2b" in result.stderr


# ------------------------------------------------------------------------------------------------------ kernels


def tiny_cases(dtype):
    model = funnel_transformer_model("tiny-base", dtype)
    return funnel_transformer_cases(Sizes(model, LENGTHS, row_bytes=2**14), model.config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_its_cases_are_those_of_their_arrays(dtype):
    for case in tiny_cases(dtype):
        if case.name.startswith(("relative_attention", "post_norm")):
            call = case.make("reference")
            given = [array for array in jax.tree.leaves(call.args) if array.ndim == 2]
            given = given[:2] if case.name.startswith("post_norm") else given  # without the norm's weight
            out = jax.eval_shape(call.func, *call.args)
            assert case.bytes == sum(array.size * array.dtype.itemsize for array in (*given, out)), case.name


def test_its_attention_counts_three_products_of_every_pair_that_is_seen():
    whole, pooled = (case for case in tiny_cases("float32") if case.name.startswith("relative_attention"))
    lo, hi = (np.asarray(edges) for edges in whole.make("xla").args[3:5])
    assert whole.flops == 3 * 2 * 32 * (hi - lo).sum() == 6 * 32 * (LENGTHS**2).sum()
    lo, hi = (np.asarray(edges) for edges in pooled.make("xla").args[3:5])
    assert pooled.flops == 6 * 32 * (hi - lo).sum() < whole.flops
    for case in (whole, pooled):
        reference, ours = (np.asarray(case.make(backend)()) for backend in ("reference", "xla"))
        np.testing.assert_allclose(ours, reference, atol=1e-4)


def test_the_command_measures_its_kernels(monkeypatch):
    given = []
    monkeypatch.setattr(kernels_command, "run", lambda model, measured, **options: given.extend(measured))
    assert (result := run("kernels", "--preset", "tiny-base", "--seq-len", 16)).exit_code == 0, result.output
    names = {case.name.split(",")[0] for case in given}
    assert names == {"linear", "relative_attention", "post_norm", "pool_norm", "embed"}
    refused = run("kernels", "--preset", "tiny-base", "--depth", 2)
    assert refused.exit_code == 2
    assert "--depth 2 is not for a Funnel-Transformer" in refused.stderr


# -------------------------------------------------------------------------------------------------------- peers


@pytest.fixture(params=["tiny", "tiny-base"])
def source(request, tmp_path):
    write_random_model(tmp_path / "source", funnel_transformer_fields(request.param))
    convert(tmp_path / "source", tmp_path / "converted", dtype="float32")
    return tmp_path / "source"


@pytest.mark.slow
def test_hugging_face_and_the_exported_graph_compute_the_vectors_of_the_engine(source):
    """Each sequence alone; the graph has another type of attention, and no decoder."""
    generator = np.random.default_rng(3)
    sequences = [generator.integers(0, 2048, length).tolist() for length in LENGTHS]
    engine = Engine.load(source.parent / "converted", backend="xla", max_batch_tokens=64)
    ours = engine.embed(sequences, normalize=False)
    task = {"checkpoint": str(source), "mode": "eager", "cores": 1, "batches": make_batches(LENGTHS, "unsorted", 1)}
    task |= {"sequences": sequences, "dtype": "float32", "device": "cpu"}
    call, facts = hugging_face.make(task)
    theirs = in_order(task["batches"], np.concatenate([call(batch) for batch in range(len(LENGTHS))]))
    assert facts["attention"] == "eager"
    assert difference(ours, theirs) < 1e-4
    if engine.config.decoder_layers == 0:
        graph, tokens = exported_graph.export(task).module(), [torch.tensor([ids]) for ids in sequences]
        exported = torch.cat([graph(ids, torch.ones_like(ids)) for ids in tokens]).detach().numpy()
        assert difference(ours, exported) < 1e-4


def make_suite(folder, **changes):
    options = {
        "preset": "tiny",
        "depth": None,
        "dtype": "float32",
        "fields": model_fields("tiny", None),
        "lengths": {"mixed": LENGTHS},
        "peers": ("hugging-face-eager", "llama-cpp", "sentence-transformers", "openvino"),
        "scenarios": ("batch", "one"),
        "order": "sorted",
        "batch_size": 2,
        "repeats": 1,
        "backend": "xla",
        "folder": folder,
    }
    return Suite(**options | changes)


@pytest.mark.slow
def test_ragged_lengths_are_compared_with_each_sequence_alone(tmp_path, monkeypatch):
    """Padding changes what transformers computes of a Funnel-Transformer; its agreement says by how much."""
    suite = make_suite(tmp_path)
    monkeypatch.setattr(suite_module, "find_spec", lambda package: True)  # all peers are installed, or seem so
    cells = dict(suite.cells(None))
    batch = cells["mixed; batch; hugging-face-eager"]()
    assert batch["agreement"] == pytest.approx(1, abs=1e-9)
    assert 0.999 < batch["peer_agreement"] < 1 - 1e-9
    work = forward_flops(suite.config, funnel_transformer("tiny")[1], LENGTHS)
    assert batch["flops_per_second"] * batch["seconds"]["median"] == pytest.approx(work)
    for peer, what in (("llama-cpp", "Funnel"), ("sentence-transformers", "Funnel"), ("openvino", "decoder: torch")):
        with pytest.raises(LeftOut, match=f"{peer} has no {what}"):
            cells[f"mixed; batch; {peer}"]()


def test_what_the_peers_cannot_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="the shortest sequence has 4 tokens, but a Funnel-Transformer of"):
        make_suite(tmp_path, lengths={"short": np.array([9, 4], np.int32)})
    with pytest.raises(InputError, match="the longest sequence has 600 tokens, and the model was made for 512"):
        make_suite(tmp_path, lengths={"long": np.array([9, 600], np.int32)})
    with pytest.raises(ConfigError, match="depth 2 is not for a Funnel-Transformer"):
        model_fields("tiny", 2)
