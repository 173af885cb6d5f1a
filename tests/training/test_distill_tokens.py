"""`funnel distill --per-token`, and the teacher's outputs on the disk."""

import dataclasses
import errno
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from funnel_engine import ConfigError, Engine, FunnelConfig, HeadConfig, InputError
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.cli import main
from funnel_engine.inputs import join
from funnel_training import run_folder, teacher
from funnel_training.distill import distill
from funnel_training.distill_tokens import token_loss
from funnel_training.metrics import unit_vectors
from funnel_training.teacher import TeacherCache, hash_texts, in_parts
from funnel_training.trainer import Settings
from topic_checkpoint import write_texts, write_toy

FUNNEL = FunnelConfig.after(1, recovery="mean_last")
SHORT = Settings(steps=6, every=3, rows=256, texts=16, learning_rate=3e-3)
TAGGER = HeadConfig(task="tag", labels=("a", "b", "c", "d"), classifier_bias=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_toy(folder, TAGGER)
    write_texts(folder / "texts.txt", 1000)
    write_texts(folder / "few.txt", 220, seed=1)
    return folder


def short(folder: Path, output: Path, **options):
    options = {"funnel": FUNNEL, "per_token": True} | options
    return distill(folder / "model", folder / "few.txt", output, SHORT, **options)


@pytest.mark.slow
def test_rows_and_labels_come_closer_to_the_teacher(folder, tmp_path, monkeypatch):
    """A third of what the funnel cost in the cosine of rows, and a fifth in labels, on texts of another seed."""
    monkeypatch.setattr(teacher, "TOKENS_AT_ONCE", 4000)  # the teacher's rows come in several parts
    settings = Settings(steps=80, every=40, rows=512, texts=64, learning_rate=3e-3)
    lines: list[str] = []
    result = distill(
        folder / "model",
        folder / "texts.txt",
        tmp_path / "new",
        settings,
        funnel=FUNNEL,
        per_token=True,
        report=lines.append,
    )
    assert result is None
    assert "same_labels" in lines[-1]
    assert "held_out_cosine" in lines[-1]
    record = read_checkpoint(tmp_path / "new").manifest.training
    assert record.agreement is None
    assert "labels" in record.loss
    assert sorted(file.name for file in (tmp_path / "new.training").iterdir()) == [
        "log.jsonl",
        "progress.png",
        "run.json",
    ]
    texts = write_texts(tmp_path / "others.txt", 300, seed=2).read_text().splitlines()
    exact = Engine.load(folder / "model")
    rows, labels = np.concatenate(exact.hidden_states(texts)), np.concatenate(exact.tag(texts)).argmax(1)
    lost, changed = [], []
    for engine in (Engine.load(folder / "model", funnel=FUNNEL), Engine.load(tmp_path / "new")):
        found = np.concatenate(engine.hidden_states(texts))
        lost.append(1 - (unit_vectors("rows", found) * unit_vectors("rows", rows)).sum(1).mean())
        changed.append((np.concatenate(engine.tag(texts)).argmax(1) != labels).mean())
    assert lost[1] < lost[0] * 2 / 3
    assert changed[1] < changed[0] * 4 / 5


def test_a_stopped_run_continues_to_the_same_bits(folder, tmp_path, monkeypatch):
    short(folder, tmp_path / "whole")
    log = run_folder.RunFolder.log

    def stop(self, entry):
        log(self, entry)
        if entry["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.RunFolder, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        short(folder, tmp_path / "new")
    monkeypatch.undo()
    monkeypatch.setattr(Engine, "hidden_states", None)  # the teacher's rows are there
    short(folder, tmp_path / "new", resume=True)
    expected, found = (read_checkpoint(tmp_path / name).weights for name in ("whole", "new"))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_what_cannot_be_trained_per_token(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"funnel 1:2 has no row for each token.*recovery, as in 1:2/mean_last"):
        short(folder, tmp_path / "new", funnel=FunnelConfig.after(1))
    with pytest.raises(ConfigError, match=r"sizes=\(16,\) are of sentence vectors"):
        short(folder, tmp_path / "new", sizes=(16,))
    with pytest.raises(ConfigError, match=r"tags tokens, but without per_token \(--per-token\)"):
        short(folder, tmp_path / "new", per_token=False)
    assert not list(tmp_path.iterdir())


def test_the_loss_is_what_its_docstring_says():
    generator = np.random.default_rng(3)
    student, expected = generator.standard_normal((2, 5, 9)).astype(np.float32)
    counts = np.array([True, False, True, True, False])
    losses, cosines = [], []
    for index in np.flatnonzero(counts):
        s, t = (x[index].astype(np.float64) for x in (student, expected))
        p, q = (np.exp(x[6:]) / np.exp(x[6:]).sum() for x in (t, s))
        losses.append(np.square(s[:6] - t[:6]).sum() / np.square(t[:6]).sum() + (p * np.log(p / q)).sum())
        cosines.append(s[:6] @ t[:6] / np.linalg.norm(s[:6]) / np.linalg.norm(t[:6]))
    loss, cosine = token_loss(student, expected, counts, 6)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(cosine) == pytest.approx(np.mean(cosines), rel=1e-5)


def test_the_command_trains_an_encoder_without_labels_per_token(tmp_path):
    model, texts = write_toy(tmp_path), write_texts(tmp_path / "texts.txt", 220)
    arguments = ["distill", "--checkpoint", model, "--texts", texts, "-o", tmp_path / "new", "--funnel", "1:2/tile"]
    options = ["--steps", "2", "--rows", "256", "--per-token", "--recompute"]
    result = CliRunner().invoke(main, [*map(str, arguments), *options])
    assert result.exit_code == 0, result.output
    assert "held_out_cosine" in result.output
    assert "same_labels" not in result.output
    assert result.output.endswith(f"Wrote {tmp_path / 'new'}\n")


def test_runs_for_two_funnels_share_the_teachers_vectors(tmp_path, monkeypatch):
    """Another checkpoint, other texts and another pooling are refused."""
    model, texts = write_toy(tmp_path), write_texts(tmp_path / "texts.txt", 220)
    one_step = dataclasses.replace(SHORT, steps=1)

    def run(output: str, funnel: str, checkpoint: Path = model, texts: Path = texts, **options):
        cache = {"teacher_cache": tmp_path / "teacher"}
        distill(checkpoint, texts, tmp_path / output, one_step, funnel=FunnelConfig.parse(funnel), **cache, **options)

    run("first", "1:2")
    embed = Engine.embed
    monkeypatch.setattr(Engine, "embed", None)
    run("second", "1:4")
    monkeypatch.setattr(Engine, "embed", embed)
    (tmp_path / "causal").mkdir()
    other = write_toy(tmp_path / "causal", causal=True)
    with pytest.raises(ConfigError, match=r"teacher has another checkpoint and another attention: checkpoint is '"):
        run("third", "1:2", checkpoint=other)
    with pytest.raises(ConfigError, match=r"teacher has another texts: texts is '.*give another folder, or remove it"):
        run("third", "1:2", texts=write_texts(tmp_path / "others.txt", 220, seed=1))
    with pytest.raises(ConfigError, match=r"teacher has another outputs: outputs is 'vectors, pooling mean'"):
        run("third", "1:2", pooling="last")
    assert not list(tmp_path.glob("third*"))


def test_a_cache_that_is_damaged_or_is_none(tmp_path, monkeypatch):
    cache = TeacherCache(tmp_path / "teacher", {"texts": "1"})
    rows = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    assert not cache.check()
    cache.write([rows[:4], rows[4:]])
    assert cache.check()
    np.testing.assert_array_equal(cache.read(7, 3), rows)
    with pytest.raises(InputError, match=r"rows.float32 is damaged \(.*\); remove .*teacher, and it will be written"):
        cache.read(7, 4)
    (tmp_path / "teacher" / "teacher.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"teacher.json cannot be read \(.*\); remove"):
        cache.check()
    (tmp_path / "teacher" / "teacher.json").unlink()
    assert not cache.check()  # a run was killed before the file was written
    (tmp_path / "teacher" / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="teacher exists and is not a teacher's cache; choose another folder"):
        cache.check()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher.os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write the teacher's cache .*: No space left on device"):
        TeacherCache(tmp_path / "new", {}).write([rows])
    assert not list((tmp_path / "new").iterdir())


def test_parts_have_all_texts_in_order(monkeypatch):
    monkeypatch.setattr(teacher, "TOKENS_AT_ONCE", 10)
    texts = join([np.arange(length, dtype=np.int32) for length in (3, 25, 4, 4, 4, 1)])
    parts = list(in_parts(texts))
    assert len(parts) > 2
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), texts.ids)
    np.testing.assert_array_equal(np.concatenate([part.lengths for part in parts]), texts.lengths)
    assert hash_texts(texts) != hash_texts(texts._replace(ids=texts.ids[::-1]))
