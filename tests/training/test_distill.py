"""`funnel distill`: what it learns, what it writes, and that a run survives whatever stops it."""

import dataclasses
import errno
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from funnel_engine import ConfigError, Engine, FunnelConfig, HeadConfig, InputError, convert, parse_funnel
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.cli import main
from funnel_engine.heads import DenseConfig, SentenceVectors
from funnel_engine.input_files import hash_file
from funnel_training import run_folder
from funnel_training.distill import check_outputs, distill
from funnel_training.distill_loss import TEMPERATURE, distillation_loss
from funnel_training.evaluate import evaluate
from funnel_training.metrics import agreement
from funnel_training.student import Student
from funnel_training.tasks.texts import read_texts
from funnel_training.trainer import Settings, Trainer, data_mesh
from topic_checkpoint import weights_of, write_texts, write_toy

FUNNEL = FunnelConfig.after(1)
SHORT = Settings(steps=8, every=4, rows=256, texts=16, learning_rate=3e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    write_toy(folder)
    write_texts(folder / "texts.txt", 2000)
    write_texts(folder / "few.txt", 300, seed=1)
    return folder


def short(folder: Path, output: Path, settings: Settings = SHORT, **options):
    return distill(folder / "model", folder / "few.txt", output, settings, funnel=FUNNEL, **options)


@pytest.fixture(scope="module")
def whole(folder):
    """The checkpoint of a short run that nothing stopped."""
    short(folder, folder / "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def trained(folder):
    """A run of 200 steps, with what it reported."""
    lines: list[str] = []
    settings = Settings(steps=200, every=100, rows=512, texts=64, learning_rate=3e-3)
    result = distill(
        folder / "model", folder / "texts.txt", folder / "trained", settings, funnel=FUNNEL, report=lines.append
    )
    return result, lines


@pytest.mark.slow
def test_half_of_what_the_funnel_lost_comes_back(folder, trained):
    """In the mean cosine; the ten nearest texts come back by a fifth of what was lost. On texts of another seed."""
    texts = write_texts(folder / "others.txt", 1000, seed=2).read_text().splitlines()
    exact = Engine.load(folder / "model").embed(texts)
    before = agreement(exact, Engine.load(folder / "model", funnel=FUNNEL).embed(texts), range(200))
    after = agreement(exact, Engine.load(folder / "trained").embed(texts), range(200))
    assert 1 - after.cosine < (1 - before.cosine) / 2
    assert 1 - after.overlap < (1 - before.overlap) * 0.8


@pytest.mark.slow
def test_the_new_checkpoint_says_how_it_was_trained(folder, trained):
    result, lines = trained
    manifest, old = read_checkpoint(folder / "trained", verify=True).manifest, read_checkpoint(folder / "model")
    assert manifest.funnel == FUNNEL
    record = manifest.training
    assert record.method == "distill"
    assert record.source == hash_file(folder / "model" / "funnel.json")
    assert record.data == hash_file(folder / "texts.txt")
    log = map(json.loads, (folder / "trained.training" / "log.jsonl").read_text().splitlines())
    evaluated = [entry for entry in log if "overlap" in entry]
    assert record.steps == max(evaluated, key=lambda entry: entry["overlap"])["step"] > 0
    assert record.agreement == result
    assert record.held_out["overlap"] == result.mean
    assert result.low < result.mean < result.high
    assert record.versions["jax"] == jax.__version__
    new = read_checkpoint(folder / "trained").weights
    moved = {name for name in new if not np.array_equal(new[name], old.weights[name])}
    assert moved == {name for name in new if name.startswith("layers.1.")} | {"final_norm"}
    assert lines[1] == "1,800 texts to train on, 200 held out"
    assert "200 steps of about" in lines[2]


@pytest.mark.slow
def test_the_folder_of_the_run_has_a_log_and_a_picture(folder, trained):
    run = folder / "trained.training"
    assert {file.name for file in run.iterdir()} == {"run.json", "log.jsonl", "progress.png"}
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 201))
    assert [entry["step"] for entry in entries if "overlap" in entry] == [0, 100, 200]
    assert (run / "progress.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_trained_checkpoint_is_evaluated_against_the_one_before(folder, trained):
    task = read_texts(write_texts(folder / "held_out.txt", 300, seed=5))
    with pytest.raises(
        ConfigError,
        match=r"was trained for the funnel 1:2, so it cannot be the baseline \(--baseline\), which runs without",
    ):
        evaluate(folder / "trained", [], task)
    with pytest.raises(ConfigError, match="was trained for the funnel 1:2, so it cannot be the baseline, which runs"):
        evaluate(folder / "trained", [], task, baseline=folder / "trained")
    after = evaluate(folder / "trained", [], task, baseline=folder / "model").lines
    before = evaluate(folder / "model", [FUNNEL], task).lines
    assert [line.funnel for line in after] == [line.funnel for line in before] == ["none", "1:2", "1:2"]
    assert after[0].scores == before[0].scores
    assert after[1].scores["cosine"] > before[1].scores["cosine"]


@pytest.mark.parametrize("stopped_at", [0, 3, 6])
def test_a_run_that_was_stopped_continues_to_the_same_bits(folder, whole, tmp_path, monkeypatch, stopped_at):
    """Stopped between two states, before and after the first one; the log has steps that the state does not have."""
    log = run_folder.RunFolder.log

    def stop(self, entry):
        log(self, entry)
        if entry["step"] == stopped_at and ("loss" in entry or stopped_at == 0):
            raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.RunFolder, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        short(folder, tmp_path / "stopped")
    monkeypatch.undo()
    assert not (tmp_path / "stopped").exists()
    short(folder, tmp_path / "stopped", resume=True)
    expected, found = weights_of(whole), weights_of(tmp_path / "stopped")
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    steps = [
        [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (whole.with_suffix(".training"), tmp_path / "stopped.training")
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("every", [1, 8])
def test_a_run_that_diverges_ends_and_keeps_the_last_state(folder, tmp_path, every):
    """Seen in the loss of a step, or in the vectors of an evaluation."""
    settings = dataclasses.replace(SHORT, every=every, learning_rate=1e30)
    with pytest.raises(ConfigError, match=r"step \d+ (is nan|are not finite).*The last good state is kept in"):
        short(folder, tmp_path / "new", settings)
    assert not (tmp_path / "new").exists()
    run = tmp_path / "new.training"
    states = np.load(run / "best.npz")
    assert all(np.isfinite(states[name]).all() for name in states.files)


def test_a_full_disk_keeps_the_state_before(folder, whole, tmp_path, monkeypatch):
    savez, calls = np.savez, []

    def full(file, *arrays):
        calls.append(file)
        if len(calls) == 5:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        savez(file, *arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match=r"cannot write .*\.npz: No space left on device; the state before it is kept"):
        short(folder, tmp_path / "new")
    monkeypatch.undo()
    assert not list((tmp_path / "new.training").glob(".*"))
    short(folder, tmp_path / "new", resume=True)
    for name, array in weights_of(whole).items():
        np.testing.assert_array_equal(weights_of(tmp_path / "new")[name], array)


def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    run = run_folder.RunFolder(tmp_path)
    run.log({"step": 1})
    assert run.entries(1) == [{"step": 1}]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(InputError, match=r"cannot write .*log.jsonl: No space left on device; the state before it is"):
        run.log({"step": 2})


def test_a_damaged_state_is_named(tmp_path):
    run = run_folder.RunFolder(tmp_path)
    run.write_arrays("state", (np.arange(3.0), np.arange(5)))
    np.testing.assert_array_equal(run.read_arrays("state", (0, 0))[1], np.arange(5))
    with pytest.raises(InputError, match=r"state.npz cannot be read \("):
        run.read_arrays("state", (0, 0, 0))
    (tmp_path / "state.npz").write_bytes((tmp_path / "state.npz").read_bytes()[:-40])
    with pytest.raises(InputError, match=r"state.npz cannot be read \(.*\); remove .* and begin again"):
        run.read_arrays("state", (0, 0))


def test_a_folder_of_another_run_is_not_touched(folder, tmp_path):
    (tmp_path / "new.training").mkdir()
    with pytest.raises(ConfigError, match=r"new.training exists: .*--resume"):
        short(folder, tmp_path / "new")
    with pytest.raises(ConfigError, match="does not have a run to resume"):
        short(folder, tmp_path / "new", resume=True)
    shutil.rmtree(tmp_path / "new.training")
    short(folder, tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    other = dataclasses.replace(SHORT, steps=9)
    with pytest.raises(ConfigError, match=r"had another settings: settings was .*'steps': 8.* now it is .*'steps': 9"):
        short(folder, tmp_path / "new", other, resume=True)
    with pytest.raises(ConfigError, match="had another data: data was"):
        distill(folder / "model", folder / "texts.txt", tmp_path / "new", SHORT, funnel=FUNNEL, resume=True)
    run = tmp_path / "new.training" / "run.json"
    run.write_text(run.read_text().replace(f'"jax": "{jax.__version__}"', '"jax": "0.1"'))
    with pytest.raises(ConfigError, match=r"had another versions: versions was .*'jax': '0.1'"):
        short(folder, tmp_path / "new", resume=True)


def test_what_cannot_be_distilled(folder, tmp_path, whole):
    few = tmp_path / "few.txt"
    new = tmp_path / "new"
    few.write_text("w1 w2\n" * 300)
    with pytest.raises(InputError, match=r"few.txt has 1 different texts; give at least 200"):
        distill(folder / "model", few, new, SHORT, funnel=FUNNEL)
    few.write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        distill(folder / "model", few, new, SHORT, funnel=FUNNEL)
    with pytest.raises(ConfigError, match=r"a funnel to train for is missing; give one, e.g. --funnel 6:2/mean"):
        distill(folder / "model", folder / "few.txt", new, SHORT)
    with pytest.raises(ConfigError, match=r"0=none\+9=1:2 has several funnels, by length, and training is for one"):
        distill(folder / "model", folder / "few.txt", new, SHORT, funnel=parse_funnel("0=none+9=1:2"))
    with pytest.raises(ConfigError, match=r"the funnel has 6 strides but the model has only 2 layers"):
        distill(folder / "model", folder / "few.txt", new, SHORT, funnel=FunnelConfig.after(5))
    with pytest.raises(
        ConfigError, match="was trained for the funnel 1:2, so it cannot be the teacher, which runs without a funnel"
    ):
        distill(whole, folder / "few.txt", new, SHORT)
    with pytest.raises(ConfigError, match="reads the row of the last token, which distillation does not train"):
        check_outputs(HeadConfig(task="classify", labels=("a", "b")), FUNNEL, (), per_token=False)
    long = write_texts(tmp_path / "long.txt", 250)
    long.write_text(long.read_text() + "w1 " * 300 + "\n")
    with pytest.raises(InputError, match="input 250 has 300 tokens, more than the limit of 128"):
        distill(folder / "model", long, new, SHORT, funnel=FUNNEL)
    assert not list(tmp_path.glob("new*"))


def test_integers_are_not_trained(folder, tmp_path):
    convert(folder / "model", tmp_path / "int8", dtype="int8")
    with pytest.raises(
        ConfigError, match=r"int8 has int8 weights, which cannot be trained; train the float checkpoint"
    ):
        distill(tmp_path / "int8", folder / "few.txt", tmp_path / "new", SHORT, funnel=FUNNEL)
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps=0"),
        ("rows", 1.5, "rows=1.5"),
        ("texts", 1, "texts=1"),
        ("learning_rate", -1, "learning_rate=-1"),
        ("dtype", "float16", "float16"),
        ("dtype", "int8", "dtype='int8' is not supported here; choose one of float32, bfloat16"),
        ("train", "head", "train='head' is unknown; choose all, after, or lora:RANK"),
        ("train", "lora:0", "rank of lora=0"),
        ("train", "lora:33", "rank of lora=33 must be an integer from 1 to 32"),
    ],
)
def test_settings_out_of_range(folder, tmp_path, field, value, message):
    with pytest.raises(ConfigError, match=message):
        short(folder, tmp_path / "new", Settings(**({"steps": 8} | {field: value})))
    assert not list(tmp_path.iterdir())


def test_sizes_out_of_range(folder, tmp_path):
    with pytest.raises(ConfigError, match="sizes=64 must be an integer from 1 to 32"):
        short(folder, tmp_path / "new", sizes=(64,))
    assert not list(tmp_path.iterdir())


def student_of(path: Path, train: str = "after", **options) -> tuple[Student, dict[str, np.ndarray]]:
    checkpoint = read_checkpoint(path)
    fields = {"funnel": FUNNEL, "rows": 256, "most_texts": 8, "dtype": "float32", "mesh": data_mesh(1)} | options
    return Student(checkpoint.config, SentenceVectors(checkpoint.head), train=train, **fields), dict(checkpoint.weights)


@pytest.mark.parametrize(
    ("head", "funnel"),
    [
        (HeadConfig(), "1:2"),
        (HeadConfig(dense=(DenseConfig(24, 32, True, "tanh"), DenseConfig(8, 24))), "0:3/mean/keep_first"),
        (HeadConfig(pooling="attention", pooler=True), "1:2/first/mean_last"),
        (HeadConfig(pooling="last"), "1:4/pool_query_only"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_student_computes_what_the_engine_does(tmp_path, head, funnel):
    path, funnel = write_toy(tmp_path, head, causal=True), FunnelConfig.parse(funnel)
    texts = write_texts(tmp_path / "texts.txt", 40).read_text().splitlines()
    engine = Engine.load(path, funnel=funnel, max_batch_tokens=256, backend="xla")
    tokens = engine.token_ids(texts)
    student, weights = student_of(path, "all", funnel=funnel)
    trained, frozen = student.divide(weights, 0)
    groups = student.fill(tokens, np.arange(len(texts), dtype=np.int32))
    packs = student.pack(tokens, groups, len(groups))
    assert len(groups) > 3
    found = np.asarray(jax.jit(student.outputs)(trained, frozen, packs))
    vectors = np.zeros((len(texts), found.shape[-1]), np.float32)
    vectors[packs.texts[packs.texts >= 0]] = found[packs.texts >= 0]
    np.testing.assert_allclose(vectors, engine.embed(tokens, normalize=False), atol=2e-5)


PRODUCTS_OF_LAYER_1 = tuple(f"layers.1.{name}" for name in ("qkv", "attention_output", "gate_up", "down"))


def fake_agreement(overlap: float) -> SimpleNamespace:
    return SimpleNamespace(overlap=overlap, ndcg=0.5, cosine=0.5, overlaps=np.linspace(0, 1, 9))


@pytest.mark.parametrize(
    ("train", "moved", "dtype"),
    [
        ("after", ("layers.1.", "final_norm"), "bfloat16"),
        ("all", ("layers.", "final_norm", "embedding"), "float32"),
        ("lora:4", PRODUCTS_OF_LAYER_1, "float32"),
        pytest.param(
            "lora:2",
            PRODUCTS_OF_LAYER_1,
            "bfloat16",
            marks=pytest.mark.grid,
        ),
    ],
)
def test_which_weights_move(folder, tmp_path, monkeypatch, train, moved, dtype):
    """LoRA begins with a product of 0, so the first step moves one factor and the second both."""
    overlaps = itertools.count()
    monkeypatch.setattr("funnel_training.distill.agreement", lambda *_: fake_agreement(next(overlaps)))
    short(folder, tmp_path / "new", dataclasses.replace(SHORT, steps=3, train=train, dtype=dtype, learning_rate=1e-2))
    old, new = weights_of(folder / "model"), weights_of(tmp_path / "new")
    changed = {name for name in new if not np.array_equal(old[name], new[name])}
    assert changed == {
        name for name in new if name in moved or name.startswith(tuple(m for m in moved if m[-1] == "."))
    }
    if train.startswith("lora"):
        assert np.linalg.matrix_rank(new["layers.1.down"] - old["layers.1.down"], tol=1e-5) == int(train[5:])


def test_the_loss_is_what_its_docstring_says():
    generator = np.random.default_rng(3)
    student, teacher = generator.standard_normal((2, 6, 5)).astype(np.float32)
    documents = generator.standard_normal((9, 5)).astype(np.float32)
    documents[[7, 2, 4]] = teacher[[0, 1, 3]]  # the fifth text is none of the documents
    counts, places = np.array([True, True, False, True, True, False]), np.array([7, 2, -1, 4, -1, -1], np.int32)
    loss, cosine = distillation_loss(student, teacher, documents, places, counts, (5, 3))
    kept = np.flatnonzero(counts)
    expected = []
    for size in (5, 3):
        s, t, d = (x[:, :size].astype(np.float64) for x in (student, teacher, documents))
        s, t, d = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t, d))
        for i in kept:
            others = [j for j in range(9) if j != places[i]]
            p, q = (np.exp(d[others] @ x[i] / TEMPERATURE) for x in (t, s))
            p, q = p / p.sum(), q / q.sum()
            expected.append(1 - s[i] @ t[i] + (p * np.log(p / q)).sum())
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-4)
    s, t = (x[kept] / np.linalg.norm(x[kept], axis=1, keepdims=True) for x in (student, teacher))
    assert float(cosine) == pytest.approx((s * t).sum(1).mean(), rel=1e-5)


def test_the_best_weights_are_written_not_the_last(folder, tmp_path, monkeypatch):
    """The overlap of the second evaluation is the best; two that are worse end the run."""
    overlaps = iter([0.5, 0.9, 0.6, 0.7, 0.8])
    evaluate = Trainer.runner
    kept: list[np.ndarray] = []

    def runner(self, trained):
        kept.append(np.asarray(trained["final_norm"]))
        return evaluate(self, trained)

    monkeypatch.setattr(Trainer, "runner", runner)
    monkeypatch.setattr("funnel_training.distill.agreement", lambda *_: fake_agreement(next(overlaps)))
    short(folder, tmp_path / "new", dataclasses.replace(SHORT, steps=50, every=2, patience=2))
    assert read_checkpoint(tmp_path / "new").manifest.training.steps == 2
    np.testing.assert_array_equal(weights_of(tmp_path / "new")["final_norm"], kept[1])
    assert len(kept) == 5  # 4 evaluations, and one of the best for the record


EIGHT = """
import sys
from pathlib import Path
from funnel_engine import FunnelConfig
from funnel_training.distill import distill
from funnel_training.trainer import Settings
folder, output = Path(sys.argv[1]), sys.argv[2]
settings = Settings(steps=4, every=4, rows=64, texts=4, packs=8, learning_rate=3e-3)
distill(folder / "model", folder / "few.txt", output, settings, funnel=FunnelConfig.after(1))
"""


@pytest.mark.slow
def test_eight_devices_have_the_losses_of_one(folder, tmp_path, monkeypatch):
    for devices in (1, 8):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")
        subprocess.run([sys.executable, "-c", EIGHT, folder, tmp_path / str(devices)], check=True, timeout=300)
    one, eight = (
        [json.loads(line) for line in (tmp_path / f"{devices}.training" / "log.jsonl").read_text().splitlines()]
        for devices in (1, 8)
    )
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (one, eight)]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    for name, array in weights_of(tmp_path / "1").items():
        np.testing.assert_allclose(weights_of(tmp_path / "8")[name], array, atol=1e-4)


def test_the_command(folder, tmp_path):
    arguments = ["distill", "--checkpoint", folder / "model", "--texts", folder / "few.txt", "-o", tmp_path / "new"]
    options = ["--steps", "2", "--rows", "256", "--funnel", "1:2/mean", "--size", "16", "--size", "32"]
    result = CliRunner().invoke(main, [*map(str, arguments), *options])
    assert result.exit_code == 0, result.output
    assert "on held-out texts" in result.output
    assert f"Wrote {tmp_path / 'new'}: it agrees with" in result.output
    assert read_checkpoint(tmp_path / "new").manifest.funnel == FunnelConfig.after(1, pool="mean")
    again = CliRunner().invoke(main, [*map(str, arguments), *options])
    assert again.exit_code == 2
    assert "exists" in again.output
