"""`funnel finetune`: what it learns from each form of data, what it writes, and what it refuses."""

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from funnel_engine import ConfigError, Engine, FunnelConfig, HeadConfig, InputError
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.cli import main
from funnel_engine.heads import SentenceVectors, classifier
from funnel_engine.input_files import hash_file
from funnel_engine.packing import make_plan, spans
from funnel_training import run_folder
from funnel_training.engines import check_untrained
from funnel_training.evaluate import evaluate
from funnel_training.finetune import Answering, divide_units, finetune, read_data
from funnel_training.finetune_loss import TEMPERATURE, cosent, cross_entropy, info_nce
from funnel_training.student import Student
from funnel_training.tasks.labels import read_labels
from funnel_training.trainer import Settings, data_mesh
from topic_checkpoint import weights_of, write_toy

FUNNEL = FunnelConfig.after(1)
RECOVERED = FunnelConfig.after(1, recovery="mean_last")
SETTINGS = Settings(steps=40, every=20, rows=512, learning_rate=1e-2, train="all")
SHORT = dataclasses.replace(SETTINGS, steps=8, every=4)
OWN_LABELS = HeadConfig(task="classify", labels=("a", "b", "c", "d", "e"))
TOPICS = "abcd"  # each has 20 words of its own


def words(generator: np.random.Generator, topic: int, count: int) -> list[str]:
    return [f"w{1 + 20 * topic + number}" for number in generator.integers(20, size=count)]


def write_labels(path: Path, count: int = 400, labels: str = TOPICS, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    lines = ["text\tlabel"]
    for _ in range(count):
        topic = int(generator.integers(len(labels)))
        lines.append(f"{' '.join(words(generator, topic, generator.integers(3, 20)))}\t{labels[topic]}")
    path.write_text("\n".join(lines))
    return path


def write_tags(path: Path, count: int = 300, kinds: str = "OPQR") -> Path:
    """The topic of a word is its tag; words of one topic make one span."""
    generator = np.random.default_rng(0)
    lines = []
    for _ in range(count):
        for topic in generator.integers(len(kinds), size=generator.integers(3, 8)):
            for index, word in enumerate(words(generator, topic, generator.integers(1, 4))):
                lines.append(f"{word} {'O' if kinds[topic] == 'O' else 'IB'[index == 0] + '-' + kinds[topic]}")
        lines.append("")
    path.write_text("\n".join(lines))
    return path


def write_pairs(path: Path, count: int = 300, scores: str = "52") -> Path:
    """Texts of one topic have the first score, others the second."""
    generator = np.random.default_rng(0)
    lines = ["sentence1\tsentence2\tscore"]
    for index in range(count):
        first, second = generator.permutation(4)[:2]
        second = first if index % 2 else second
        texts = (" ".join(words(generator, topic, 8)) for topic in (first, second))
        lines.append("\t".join((*texts, scores[int(first != second)])))
    path.write_text("\n".join(lines))
    return path


def write_answers(path: Path, count: int = 240) -> Path:
    """The words of a document are of the topic after its query's. Each second query has a second document."""
    generator = np.random.default_rng(0)
    lines = ["query\tdocument"]
    for index in range(count):
        topic = int(generator.integers(18))
        query = " ".join(words(generator, topic, 6))
        lines += [f"{query}\t{' '.join(words(generator, topic + 1, 10))}" for _ in range(1 + index % 2)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    write_toy(folder)
    write_labels(folder / "labels.tsv")
    write_tags(folder / "tags.txt")
    write_pairs(folder / "pairs.tsv")
    write_answers(folder / "answers.tsv")
    return folder


@pytest.fixture(scope="module")
def classified(folder):
    """A classifier with the attention pooler, the figures of the run, and what it reported."""
    lines: list[str] = []
    figures = finetune(
        folder / "model",
        "labels",
        folder / "labels.tsv",
        folder / "classifier",
        SETTINGS,
        funnel=FUNNEL,
        pooling="attention",
        report=lines.append,
    )
    return figures, lines


@pytest.fixture(scope="module")
def commanded(folder):
    """The output of the command; it trains as `short` does."""
    arguments = ["--checkpoint", folder / "model", "--labels", folder / "labels.tsv", "-o", folder / "commanded"]
    options = ["--funnel", "1:2", "--pooling", "attention", "--steps", 8, "--every", 4, "--rows", 512]
    result = CliRunner().invoke(main, list(map(str, ["finetune", *arguments, *options, "--learning-rate", 0.01])))
    assert result.exit_code == 0, result.output
    return result.output


def short(folder: Path, output: Path, settings: Settings = SHORT, **options):
    options = {"funnel": FUNNEL, "pooling": "attention"} | options
    return finetune(folder / "model", "labels", folder / "labels.tsv", output, settings, **options)


def test_a_classifier_learns_through_a_funnel_and_is_served(folder, classified):
    """A fourth of the texts has each label. The engine has the accuracy that the run had on the held-out texts."""
    figures, lines = classified
    assert figures["accuracy"] > 0.8
    assert list(figures) == ["accuracy", "macro F1"]
    engine = Engine.load(folder / "classifier", backend="xla")
    assert engine.funnel == FUNNEL
    held_out, training = divide_units(read_data("labels", folder / "labels.tsv", HeadConfig()), SETTINGS.seed)
    assert (held_out.units, training.units) == (40, 360)
    assert set(held_out.sides[0].texts).isdisjoint(training.sides[0].texts)
    logits = engine.classify(held_out.sides[0].texts)
    assert {name: score.value for name, score in held_out.scores([logits], []).items()} == figures
    others = read_data("labels", write_labels(folder / "others.tsv", seed=1), HeadConfig())
    assert (engine.classify(others.sides[0].texts).argmax(axis=1) == others.gold).mean() > 0.8
    assert lines[0] == "360 texts to train on, 40 held out"
    assert "40 steps of about" in lines[1]


def test_the_new_checkpoint_says_how_it_was_trained(folder, classified):
    figures, _ = classified
    manifest = read_checkpoint(folder / "classifier", verify=True).manifest
    assert manifest.funnel == FUNNEL
    assert manifest.head == HeadConfig(
        pooling="attention",
        pooler=True,
        task="classify",
        labels=tuple(TOPICS),
        classifier_bias=True,
        classifier_input="pooled",
    )
    record = manifest.training
    assert (record.method, record.loss) == ("finetune", "cross-entropy; weights: all")
    assert record.source == hash_file(folder / "model" / "funnel.json")
    assert record.data == hash_file(folder / "labels.tsv")
    assert record.held_out == figures
    assert record.agreement is None
    before, after = weights_of(folder / "model"), weights_of(folder / "classifier")
    assert after.keys() - before.keys() == {"pooler.query", "classifier.weight", "classifier.bias"}
    assert not any(np.array_equal(before[name], after[name]) for name in before)
    run = folder / "classifier.training"
    assert {file.name for file in run.iterdir()} == {"run.json", "log.jsonl", "progress.png"}


def test_without_a_funnel(folder, tmp_path, classified):
    """The baseline of a classifier with a funnel: `evaluate` compares the two. It could be a teacher too."""
    assert short(folder, tmp_path / "new", SETTINGS, funnel=FunnelConfig())["accuracy"] > 0.8
    opened = read_checkpoint(tmp_path / "new")
    assert (opened.manifest.funnel, opened.manifest.training.method) == (FunnelConfig(), "finetune")
    check_untrained(tmp_path / "new", opened, "teacher")
    task = read_labels(write_labels(tmp_path / "others.tsv", seed=1), tuple(TOPICS))
    lines = evaluate(folder / "classifier", [], task, baseline=tmp_path / "new").lines
    assert [line.funnel for line in lines] == ["none", "1:2"]
    assert all(line.scores["accuracy"] > 0.8 for line in lines)


def test_a_tagger_learns_through_a_funnel_and_is_served(folder, tmp_path):
    figures = finetune(folder / "model", "tags", folder / "tags.txt", tmp_path / "new", SETTINGS, funnel=RECOVERED)
    assert list(figures) == ["span F1", "word accuracy"]
    assert figures["span F1"] > 0.3
    assert figures["word accuracy"] > 0.5  # the most frequent label has a fourth of the words
    engine = Engine.load(tmp_path / "new", backend="xla")
    assert engine.head.labels == ("B-P", "B-Q", "B-R", "I-P", "I-Q", "I-R", "O")
    held_out, _ = divide_units(read_data("tags", folder / "tags.txt", HeadConfig()), SETTINGS.seed)
    outputs = held_out.outputs(engine, held_out.inputs(engine, False))
    assert {name: score.value for name, score in held_out.scores(outputs, outputs).items()} == figures


@pytest.mark.parametrize(
    ("file", "figure", "above"), [("pairs.tsv", "Spearman", 0.6), ("answers.tsv", "nDCG@10", 0.05)]
)
def test_vectors_learn_from_pairs_through_a_funnel(folder, tmp_path, file, figure, above):
    """The checkpoint's classifier, which would no longer fit, is left out."""
    lines: list[str] = []
    options = {"funnel": FUNNEL, "report": lines.append}
    model = write_toy(tmp_path, OWN_LABELS)
    figures = finetune(model, "pairs", folder / file, tmp_path / "new", SETTINGS, **options)
    assert lines[0] == "the checkpoint's classifier (task classify, 5 labels) is left out"
    log = [json.loads(line) for line in (tmp_path / "new.training" / "log.jsonl").read_text().splitlines()]
    before = next(entry for entry in log if entry["step"] == 0)[figure]
    assert figures[figure] > max(above, before + 0.05)
    engine = Engine.load(tmp_path / "new", backend="xla")
    assert engine.head == HeadConfig()
    assert "classifier.weight" not in weights_of(tmp_path / "new")
    held_out, _ = divide_units(read_data("pairs", folder / file, HeadConfig()), SETTINGS.seed)
    outputs = held_out.outputs(engine, held_out.inputs(engine, False))
    found = held_out.scores(outputs, outputs)[figure].value
    assert found == pytest.approx(figures[figure], abs=1e-3)  # documents that are nearly as near may change places


def test_the_classifier_of_the_checkpoint_is_continued(folder, tmp_path):
    """It reads the last token as before. LoRA moves the head too, and the layers after the funnel by low ranks."""
    model = write_toy(tmp_path, OWN_LABELS)
    settings = dataclasses.replace(SHORT, train="lora:4", steps=40, every=20)
    figures = finetune(model, "labels", folder / "labels.tsv", tmp_path / "new", settings, funnel=FUNNEL)
    assert read_checkpoint(tmp_path / "new").head == OWN_LABELS
    assert figures["accuracy"] > 0.4
    before, after = weights_of(model), weights_of(tmp_path / "new")
    moved = {name for name in after if not np.array_equal(before[name], after[name])}
    assert moved == {f"layers.1.{name}" for name in ("qkv", "attention_output", "gate_up", "down")} | {
        "classifier.weight"
    }
    assert np.linalg.matrix_rank(after["layers.1.down"] - before["layers.1.down"], tol=1e-5) == 4


@pytest.mark.parametrize(
    ("head", "funnel"),
    [
        (HeadConfig("attention", True, task="classify", labels=("a", "b"), classifier_input="pooled"), "1:2"),
        (HeadConfig("max", task="classify", labels=("a", "b"), classifier_input="pooled"), "0:3/mean/keep_first"),
        (HeadConfig(task="classify", labels=("a", "b"), classifier_bias=True), "1:2/keep_last"),
        (HeadConfig(task="tag", labels=("O", "B-P", "I-P"), classifier_bias=True), "1:2/keep_first/mean_last"),
        pytest.param(HeadConfig(task="tag", labels=("O", "B-P", "I-P")), "none", marks=pytest.mark.grid),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.task}-{value.classifier_input}-{value.pooling}",
)
def test_the_student_computes_what_the_engine_does(tmp_path, head, funnel):
    path, funnel = write_toy(tmp_path, head), FunnelConfig.parse(funnel)
    task = read_data("labels", write_labels(tmp_path / "labels.tsv", 200), HeadConfig())
    engine = Engine.load(path, funnel=funnel, max_batch_tokens=256, backend="xla")
    tokens = engine.token_ids(task.sides[0].texts)
    opened = read_checkpoint(path)
    reader = classifier(head, make_plan(opened.config, funnel), opened.config.pad_token_id)
    student = Student(opened.config, reader, funnel, "all", 256, 16, "float32", data_mesh(1))
    trained, frozen = student.divide(opened.weights, 0)
    groups = student.fill(tokens, np.arange(40, dtype=np.int32))
    packs = student.pack(tokens, groups, len(groups))
    found = np.asarray(jax.jit(student.outputs)(trained, frozen, packs))
    assert np.isfinite(found).all()
    if head.task == "classify":
        expected = engine.classify(tokens)
        np.testing.assert_allclose(found[packs.texts >= 0], expected[packs.texts[packs.texts >= 0]], atol=2e-5)
        return
    for rows, numbers in zip(found, packs.texts, strict=True):
        chosen = numbers[numbers >= 0]
        expected = engine.tag(tokens.take(chosen))
        first = spans(student.plan, tokens.lengths[chosen], 1).first
        for start, logits in zip(first, expected, strict=True):
            np.testing.assert_allclose(rows[start : start + len(logits)], logits, atol=2e-5)


def test_the_command(folder, commanded):
    assert re.search(
        rf"Wrote {folder / 'commanded'}: accuracy [01]\.\d+, macro F1 [01]\.\d+ on held-out data", commanded
    )
    assert read_checkpoint(folder / "commanded").manifest.funnel == FUNNEL
    arguments = ["finetune", "--checkpoint", folder / "model", "--labels", folder / "labels.tsv"]
    again = CliRunner().invoke(main, list(map(str, [*arguments, "-o", folder / "commanded"])))
    assert again.exit_code == 2
    assert "exists" in again.output
    both = CliRunner().invoke(main, list(map(str, [*arguments, "-o", folder / "both", "--tags", folder / "tags.txt"])))
    assert "the data are given by --labels --tags; give one of --labels, --tags, --pairs" in both.output


# ------------------------------------------------------------------------------------------- runs that stop


def test_a_run_that_was_stopped_continues_to_the_same_bits(folder, tmp_path, monkeypatch, commanded):
    """It is stopped between two states, and then by a full disk in the last one. The command ran the whole of it."""
    log, savez = run_folder.RunFolder.log, np.savez

    def stop(self, entry):
        log(self, entry)
        if entry["step"] == 6 and "loss" in entry:
            raise KeyboardInterrupt

    def full(file, *arrays):
        if np.ndim(arrays[0]) == 0 and arrays[0] == 8:  # the state begins with its step
            raise OSError(errno.ENOSPC, "No space left on device")
        savez(file, *arrays)

    monkeypatch.setattr(run_folder.RunFolder, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        short(folder, tmp_path / "new")
    monkeypatch.undo()
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match=r"cannot write .*state.npz: No space left on device; the state before it is"):
        short(folder, tmp_path / "new", resume=True)
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()
    figures = short(folder, tmp_path / "new", resume=True)
    for name, array in weights_of(folder / "commanded").items():
        np.testing.assert_array_equal(weights_of(tmp_path / "new")[name], array)
    assert all(f"{name} {value:.4f}" in commanded for name, value in figures.items())


def test_a_run_that_diverges_names_the_texts(folder, tmp_path):
    settings = dataclasses.replace(SHORT, every=8, learning_rate=1e30)
    with pytest.raises(
        ConfigError,
        match=r"the loss of step \d+ is nan, on the texts labels.tsv, line \d+, labels.tsv, line .*and \d+ more: "
        "training has diverged. The last good state is kept in",
    ):
        short(folder, tmp_path / "new", settings)
    assert not (tmp_path / "new").exists()


def test_a_folder_of_another_run_is_not_touched(folder, tmp_path, commanded):
    shutil.copytree(folder / "commanded.training", tmp_path / "new.training")
    with pytest.raises(ConfigError, match=r"new.training exists: .*--resume"):
        short(folder, tmp_path / "new")
    with pytest.raises(ConfigError, match=r"does not have a run to resume"):
        short(folder, tmp_path / "other", resume=True)
    with pytest.raises(ConfigError, match=r"had another settings: settings was"):
        short(folder, tmp_path / "new", SETTINGS, resume=True)
    with pytest.raises(ConfigError, match=r"had another pooling: pooling was 'attention', now it is 'mean'"):
        short(folder, tmp_path / "new", resume=True, pooling="mean")


# ------------------------------------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([f"w{i} w2\ta" for i in range(250)], r"all texts in bad.tsv have the label 'a'; give texts of at least two"),
        ([f"w{i}\t{'ab'[i % 2]}" for i in range(199)], r"bad.tsv has 199 different texts; give at least 200"),
        (["w1 w2\ta"] * 300, r"1 different texts in bad.tsv are too few"),
        ([f"w{i}\ta\tb" for i in range(9)], r"bad.tsv, line 2 has 3 columns; it must have 2: text, label"),
        ([f"w{i}\t{'abc'[i % 2 + (i > 297)]}" for i in range(300)], r"label 'c' has 1 different texts in bad.tsv"),
        ([f"w{i}\t" for i in range(250)], r"bad.tsv, line 2: label is ''"),
        ([], r"bad.tsv has a header and no rows"),
    ],
)
def test_labels_that_cannot_be_used(folder, tmp_path, rows, message):
    file = tmp_path / "bad.tsv"
    file.write_text("\n".join(["text\tlabel", *rows]))
    with pytest.raises(InputError, match=message):
        finetune(folder / "model", "labels", file, tmp_path / "new", SHORT, funnel=FUNNEL)
    assert not list(tmp_path.glob("new*"))


def test_labels_that_the_checkpoint_does_not_have(folder, tmp_path):
    model = write_toy(tmp_path, HeadConfig(task="classify", labels=("a", "b")))
    with pytest.raises(InputError, match=r"labels.tsv, line \d+: label '[cd]' is not one of the checkpoint's labels"):
        finetune(model, "labels", folder / "labels.tsv", tmp_path / "new", SHORT, funnel=FUNNEL)
    one = write_labels(tmp_path / "one.tsv", labels="b")
    with pytest.raises(InputError, match=r"all texts in one.tsv have the label 'b'; give texts of at least two labels"):
        finetune(model, "labels", one, tmp_path / "new", SHORT, funnel=FUNNEL)
    rare = tmp_path / "rare.tsv"
    rare.write_text("text\tlabel\n" + "\n".join(f"w{i} w1\t{'ab'[i == 7]}" for i in range(300)))
    with pytest.raises(
        InputError,
        match=r"rare.tsv has too few texts of the label 'b': none of them is among the 30 that are held out; give at "
        "least 10 of each label",
    ):
        finetune(model, "labels", rare, tmp_path / "new", SHORT, funnel=FUNNEL)
    assert not list(tmp_path.glob("new*"))


def test_tags_that_cannot_be_used(folder, tmp_path):
    def run(file: Path, model: Path = folder / "model", **options):
        finetune(model, "tags", file, tmp_path / "new", SHORT, **{"funnel": RECOVERED} | options)

    tags = folder / "tags.txt"
    with pytest.raises(
        ConfigError, match=r"funnel 1:2: tags need a row for each token; add a recovery, as in 1:2/mean_last"
    ):
        run(tags, funnel=FUNNEL)
    with pytest.raises(ConfigError, match=r"pooling='max' has no effect: the classifier reads the row of each token"):
        run(tags, pooling="max")
    with pytest.raises(ConfigError, match=r"tagged sentences cannot be cut"):
        run(tags, truncate=True)
    model = write_toy(tmp_path, HeadConfig(task="tag", labels=("O", "B-P", "I-P")))
    with pytest.raises(InputError, match=r"tags.txt, line \d+: tag 'B-[QR]' is not one of the checkpoint's labels"):
        run(tags, model)
    bad = tmp_path / "bad.txt"
    for text, message in (
        ("w1\n", "bad.txt, line 1 has one column"),
        ("w1 PER\n", "tag 'PER' must be O, or B, I, E or S"),
        ("".join(f"w{i} O\n\n" for i in range(300)), "bad.txt has no span: every tag is O"),
        (
            "".join(f"w{i} {'OB'[i == 7]}{'-P' * (i == 7)}\n\n" for i in range(300)),
            "none of the 30 sentences of bad.txt",
        ),
        ("".join(f"w{i} B-P\n\n" for i in range(30)), "bad.txt has 30 different sentences; give at least 200"),
    ):
        bad.write_text(text)
        with pytest.raises(InputError, match=message):
            run(bad)
    assert not list(tmp_path.glob("new*"))


def test_pairs_that_cannot_be_used(folder, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"first": "w1", "second": "w2"}\n')

    def run(file: Path):
        finetune(folder / "model", "pairs", file, tmp_path / "new", SHORT, funnel=FUNNEL)

    with pytest.raises(
        InputError, match=r"all scores in same.tsv are 5: the correlation with a constant is not defined"
    ):
        run(write_pairs(tmp_path / "same.tsv", scores="55"))
    with pytest.raises(InputError, match=r"few.tsv has 120 different pairs; give at least 200"):
        run(write_pairs(tmp_path / "few.tsv", 120))
    with pytest.raises(InputError, match=r"answers.tsv has 120 different queries; give at least 200"):
        run(write_answers(tmp_path / "answers.tsv", 120))
    with pytest.raises(InputError, match=r"must have sentence1, sentence2, score or query, document"):
        run(bad)
    one = tmp_path / "one.tsv"
    one.write_text("".join(f"w{i} w1\tw{i} w2\t{int(i == 7)}\n" for i in range(300)))
    with pytest.raises(InputError, match=r"the 30 pairs of one.tsv that are held out all have one score"):
        run(one)
    assert not list(tmp_path.glob("new*"))


def test_options_that_cannot_be(folder, tmp_path):
    labels = folder / "labels.tsv"
    with pytest.raises(ConfigError, match=r"form='texts' is unknown; choose one of labels, tags, pairs"):
        finetune(folder / "model", "texts", labels, tmp_path / "new", SHORT)
    for train in ("after", "lora:4"):
        with pytest.raises(
            ConfigError,
            match=f"train='{train}' moves what comes after the funnel, but there is no funnel; give one, e.g. ",
        ):
            short(folder, tmp_path / "new", dataclasses.replace(SHORT, train=train), funnel=FunnelConfig())
    with pytest.raises(ConfigError, match=r"pooling='median' is unknown"):
        short(folder, tmp_path / "new", pooling="median")
    model = write_toy(tmp_path, OWN_LABELS)
    with pytest.raises(
        ConfigError, match=r"pooling='max' has no effect: the classifier reads the row of the last token"
    ):
        finetune(model, "labels", labels, tmp_path / "new", SHORT, pooling="max")
    long = tmp_path / "long.tsv"
    long.write_text(labels.read_text() + f"\n{'w1 ' * 300}\ta")
    with pytest.raises(
        InputError, match=r"long.tsv, line 402: the text has 300 tokens, more than the limit of 128; shorten"
    ):
        finetune(folder / "model", "labels", long, tmp_path / "new", SHORT)
    assert not list(tmp_path.glob("new*"))


def test_both_texts_of_a_pair_are_in_a_step_and_what_answers_a_query_is_no_negative(folder):
    opened, settings = read_checkpoint(folder / "model"), Settings(steps=1, packs=2)
    student = Student(opened.config, SentenceVectors(HeadConfig()), FUNNEL, "all", 256, 16, "float32", data_mesh(1))
    held_out, training = divide_units(read_data("pairs", folder / "answers.tsv", HeadConfig()), seed=0)
    objective = Answering(student, training, held_out, Engine.load(folder / "model"), False, settings)
    packs, (places, negatives, counts) = objective.batch(3)
    numbers, queries = packs.texts.reshape(-1), len(training.sides[0].texts)
    pairs = [(numbers[first], numbers[second] - queries) for first, second in places[:, counts].T]
    assert len(pairs) == len(set(pairs)) > 8
    for row, (query, document) in enumerate(pairs):
        assert document in training.relevant[query]
        for column, (_, other) in enumerate(pairs):
            assert negatives[row, column] == (other not in training.relevant[query])
    assert not negatives[np.eye(len(counts), dtype=bool) & counts].any()
    small = Student(opened.config, SentenceVectors(HeadConfig()), FUNNEL, "all", 16, 3, "float32", data_mesh(1))
    objective = Answering(small, training, held_out, Engine.load(folder / "model"), False, Settings(steps=1))
    with pytest.raises(ConfigError, match=r"step 3 has room for [01] pairs in 1 packs of 16 rows"):
        objective.batch(3)


# ------------------------------------------------------------------------------------------- losses


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


COUNTS = np.array([True, True, True, False, True])


def test_cross_entropy_is_the_mean_over_the_rows_that_count():
    logits = np.random.default_rng(0).standard_normal((2, 3, 4))
    labels = np.array([[1, -1, 3], [0, -1, -1]])
    log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -(log[0, 0, 1] + log[0, 2, 3] + log[1, 0, 0]) / 3
    assert float(cross_entropy(logits, labels)) == pytest.approx(expected, rel=1e-5)
    assert float(cross_entropy(logits, np.full((2, 3), -1))) == 0


def test_cosent_is_what_its_docstring_says():
    first, second = np.random.default_rng(1).standard_normal((2, 5, 8))
    scores = np.array([3.0, 1.0, 1.0, 9.0, 5.0])
    cosines = (unit(first) * unit(second)).sum(axis=1)
    found = [i for i in range(5) if COUNTS[i]]
    terms = [np.exp((cosines[a] - cosines[b]) / TEMPERATURE) for a in found for b in found if scores[a] < scores[b]]
    assert float(cosent(first, second, scores, COUNTS)) == pytest.approx(np.log1p(sum(terms)), rel=1e-5)
    assert float(cosent(first, second, np.ones(5), COUNTS)) == 0


def test_info_nce_is_what_its_docstring_says():
    queries, documents = np.random.default_rng(2).standard_normal((2, 5, 8))
    negatives = ~np.eye(5, dtype=bool)
    negatives[0, 4] = False  # it answers this query too
    exponentials = np.exp(unit(queries) @ unit(documents).T / TEMPERATURE)
    losses = []
    for i in np.flatnonzero(COUNTS):
        others = [j for j in np.flatnonzero(COUNTS) if negatives[i, j]]
        losses.append(-np.log(exponentials[i, i] / (exponentials[i, i] + exponentials[i, others].sum())))
    assert float(info_nce(queries, documents, negatives, COUNTS)) == pytest.approx(np.mean(losses), rel=1e-5)
