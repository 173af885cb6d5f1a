"""`funnel evaluate` and its function, on tiny random models."""

import dataclasses
import gc
import importlib.util
import json
import shutil
import weakref
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from scipy.stats import spearmanr

from funnel_engine import ConfigError, Engine, FunnelByLength, FunnelConfig, InputError, convert
from funnel_engine.cli import main
from funnel_engine.flops import forward_flops
from funnel_training.evaluate import compare_funnels, evaluate
from funnel_training.tasks.labels import read_labels
from funnel_training.tasks.pairs import read_pairs
from funnel_training.tasks.tags import read_tags
from funnel_training.tasks.texts import read_texts
from hugging_face_models import build, gemma2
from sentence_models import PROMPTS, save_embedding_gemma
from toy_checkpoints import random_texts, save

FUNNELS = [FunnelConfig.parse("1:2/mean"), FunnelConfig.parse("2:2/keep_first")]
LABELS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("bare"), "Gemma2Model")


@pytest.fixture(scope="module")
def files(tmp_path_factory, checkpoint) -> Path:
    """pairs.csv, whose scores are near to the model's own similarities, and texts.txt."""
    folder = tmp_path_factory.mktemp("data")
    left, right = random_texts(40, seed=1), random_texts(40, seed=2)
    engine = Engine.load(checkpoint, attention="bidirectional")
    gold = (engine.embed(left) * engine.embed(right)).sum(axis=1)
    gold += 0.3 * gold.std() * np.random.default_rng(3).normal(size=40)
    lines = [f"{x},{y},{score:.6f}" for x, y, score in zip(left, right, gold, strict=True)]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    (folder / "texts.txt").write_text("\n".join(random_texts(120)) + "\n")
    return folder


def run(*arguments: object):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def assert_refused(result, *parts: str):
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in result.stderr


def test_scores_are_those_of_engines_that_are_loaded_with_the_funnels(checkpoint, files):
    task = read_pairs(files / "pairs.csv")
    by_length = FunnelByLength([(0, None), (9, FUNNELS[0])])
    result = evaluate(checkpoint, [*FUNNELS, by_length], task, attention="bidirectional", pooling="max")
    rows = [line.split(",") for line in (files / "pairs.csv").read_text().splitlines()]
    left, right, gold = zip(*rows, strict=True)
    expected = []
    for funnel in (FunnelConfig(), *FUNNELS, by_length):
        engine = Engine.load(checkpoint, funnel=funnel, attention="bidirectional", pooling="max")
        cosines = (engine.embed(left) * engine.embed(right)).sum(axis=1)
        expected.append(spearmanr(cosines, np.array(gold, float)).statistic)
    assert [line.scores["Spearman"] for line in result.lines] == pytest.approx(expected, abs=1e-12)
    assert [(line.funnel, line.funneled) for line in result.lines] == [
        ("none", "nothing"),
        ("1:2/mean", "all"),
        ("2:2/keep_first", "all"),
        ("0=none+9=1:2/mean", "all"),
    ]
    assert result.lines[1].ideal_latency < result.lines[3].ideal_latency < 1
    assert len(set(expected)) == 4
    for line, score in zip(result.lines[1:], expected[1:], strict=True):
        ratio = line.ratios["Spearman"]
        assert ratio.value == pytest.approx(score / expected[0])
        assert ratio.low < ratio.value < ratio.high
    assert result.lines[0].ratios == {"Spearman": None}


def test_documents_alone_can_be_funneled(checkpoint, files):
    task = read_texts(files / "texts.txt")
    result = evaluate(checkpoint, FUNNELS[:1], task, attention="bidirectional")
    exact, both, documents = result.lines
    assert [(line.funnel, line.funneled) for line in result.lines] == [
        ("none", "nothing"),
        ("1:2/mean", "all"),
        ("1:2/mean", "documents"),
    ]
    assert all(score == pytest.approx(1) for score in exact.scores.values())
    assert both.scores["overlap@10"] < documents.scores["overlap@10"] < 1
    assert both.scores["cosine"] == documents.scores["cosine"]
    engine = Engine.load(checkpoint, attention="bidirectional")
    lengths = [engine.token_ids(list(side.texts)).lengths for side in task.sides]
    full = [forward_flops(engine.config, FunnelConfig(), side) for side in lengths]
    funneled = [forward_flops(engine.config, FUNNELS[0], side) for side in lengths]
    assert both.ideal_latency == sum(funneled) / sum(full) < documents.ideal_latency < 1
    assert documents.ideal_latency == (full[0] + funneled[1]) / sum(full)


def test_one_engine_lives_at_a_time(checkpoint, files):
    made: list[weakref.ref] = []

    def make(funnel: FunnelConfig) -> Engine:
        gc.collect()
        assert not any(engine() for engine in made)
        engine = Engine.load(checkpoint, funnel=funnel, attention="bidirectional")
        made.append(weakref.ref(engine))
        return engine

    lines = compare_funnels(make, FUNNELS, read_pairs(files / "pairs.csv"))
    assert len(lines) == len(made) == 3


def test_the_baseline_can_be_another_checkpoint(checkpoint, files, tmp_path):
    """As before and after a training: the same tokenizer, other weights."""
    before = tmp_path / "before"
    shutil.copytree(checkpoint, before)
    weights = before / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4000:] = np.random.default_rng(0).normal(size=1000).astype(np.float32).tobytes()
    weights.write_bytes(content)
    task = read_texts(files / "texts.txt")
    result = evaluate(checkpoint, FUNNELS[:1], task, baseline=before)
    again = evaluate(before, FUNNELS[:1], task)
    assert result.lines[0] == again.lines[0]
    assert result.lines[1].scores["overlap@10"] < again.lines[1].scores["overlap@10"]
    assert (result.checkpoint["name"], result.baseline["name"]) == ("model", "before")
    manifest = json.loads((before / "funnel.json").read_text())
    manifest["text"]["prompts"] = {"query": "q: "}
    (before / "funnel.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="checkpoint and the baseline have different prompts or limits; the baseline"):
        evaluate(checkpoint, FUNNELS, task, baseline=before)
    manifest["head"]["pooling"] = "last"
    (before / "funnel.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="different heads or pooling"):
        evaluate(checkpoint, FUNNELS, task, baseline=before)


def test_int8_is_evaluated_like_any_dtype(checkpoint, tmp_path):
    """As a dtype of the same checkpoint, and as a checkpoint beside the one that it was made from."""
    (tmp_path / "texts.txt").write_text("\n".join(random_texts(100)) + "\n")
    task = read_texts(tmp_path / "texts.txt")
    convert(checkpoint, tmp_path / "int8", dtype="int8")
    loaded, converted = (
        evaluate(checkpoint, FUNNELS[:1], task, dtype="int8"),
        evaluate(tmp_path / "int8", FUNNELS[:1], task),
    )
    assert loaded.options["dtype"] == converted.options["dtype"] == "int8"
    assert loaded.lines == converted.lines
    beside = evaluate(tmp_path / "int8", FUNNELS[:1], task, baseline=checkpoint)
    exact = evaluate(checkpoint, FUNNELS[:1], task)
    assert beside.lines[1].scores["cosine"] == pytest.approx(exact.lines[1].scores["cosine"], abs=0.01)


def test_prompts_of_the_checkpoint_are_put_before_the_texts(tmp_path):
    save_embedding_gemma(tmp_path)
    convert(tmp_path / "source", tmp_path / "model", dtype="float32")
    lines = [f"{text},{text} and {text}" for text in random_texts(30)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    task = read_pairs(tmp_path / "pairs.csv")
    result = evaluate(tmp_path / "model", [], task)
    assert (
        result.data["prompts"]
        == {"queries": "query", "documents": "document"}
        == {
            "queries": next(iter(PROMPTS)),
            "documents": list(PROMPTS)[1],
        }
    )
    engine = Engine.load(tmp_path / "model")
    inputs = task.inputs(engine, truncate=False)
    for side, ids, name in zip(task.sides, inputs, PROMPTS, strict=True):
        np.testing.assert_array_equal(task.run(engine, ids), engine.embed(list(side.texts), prompt_name=name))


def test_a_classifier_is_scored_on_its_own_labels(tmp_path):
    path = save(tmp_path, "Gemma2ForSequenceClassification", id2label=dict(enumerate(LABELS)))
    texts = random_texts(30)
    logits = Engine.load(path).classify(texts)
    gold = np.where(np.arange(30) % 3, logits.argmax(axis=1), 0)
    lines = [json.dumps({"text": text, "label": LABELS[label]}) for text, label in zip(texts, gold, strict=True)]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    result = run(path, "--labels", tmp_path / "labels.jsonl", "--funnel", "2:2/mean", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    exact, funneled = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert exact["scores"]["accuracy"] == pytest.approx((gold == logits.argmax(axis=1)).mean())
    expected = Engine.load(path, funnel=FunnelConfig.parse("2:2/mean")).classify(texts).argmax(axis=1)
    assert funneled["scores"]["accuracy"] == pytest.approx((gold == expected).mean())


def test_a_tagger_is_scored_on_the_first_token_of_each_word(tmp_path):
    """The word "pairs-of" has three tokens, and "query:" two."""
    path = save(tmp_path, "Gemma2ForTokenClassification", id2label=dict(enumerate(LABELS)))
    generator = np.random.default_rng(0)
    sentences = [text.replace("pools", "pairs-of").split() for text in random_texts(25)]
    tags = [[str(tag) for tag in generator.choice(["O", "B-PER", "B-ORG"], len(words))] for words in sentences]
    lines = [
        "\n".join(f"{word} {tag}" for word, tag in zip(words, sentence_tags, strict=True))
        for words, sentence_tags in zip(sentences, tags, strict=True)
    ]
    (tmp_path / "tags.txt").write_text("\n\n".join(lines))
    task = read_tags(tmp_path / "tags.txt", LABELS)
    funnel = FunnelConfig.parse("1:2/mean_last")
    exact, funneled = evaluate(path, [funnel], task, attention="bidirectional").lines
    for line, chosen in ((exact, FunnelConfig()), (funneled, funnel)):
        engine = Engine.load(path, funnel=chosen, attention="bidirectional")
        right = words = 0
        for sentence, gold in zip(sentences, tags, strict=True):
            predicted = engine.tag(" ".join(sentence))[0].argmax(axis=1)
            token = 1  # after BOS
            for word, tag in zip(sentence, gold, strict=True):
                right += LABELS[predicted[token]] == tag
                words += 1
                token += {"pairs-of": 3, "query:": 2}.get(word, 1)
            assert token == len(predicted)
        assert line.scores["word accuracy"] == pytest.approx(right / words)
    assert any("pairs-of" in sentence for sentence in sentences)
    result = run(path, "--tags", tmp_path / "tags.txt", "--funnel", "1:2")
    assert_refused(result, "funnel 1:2: tags need a row for each token; add a recovery, as in 1:2/mean_last")
    result = run(path, "--tags", tmp_path / "tags.txt", "--truncate")
    assert_refused(result, "tagged sentences cannot be cut, because every word has a tag; leave truncate out")
    long = "\n".join(["small B-PER"] * 2100)
    (tmp_path / "tags.txt").write_text("\n\n".join([*lines, long]))
    number = sum(map(len, sentences)) + len(sentences) + 1
    result = run(path, "--tags", tmp_path / "tags.txt")
    assert_refused(
        result, f"tags.txt, line {number}: the sentence has 2101 tokens, more than the limit of 2048; split it"
    )


def test_the_command_shows_a_table_and_writes_everything(checkpoint, files, tmp_path):
    output = tmp_path / "out.json"
    arguments = ["--funnel", "2:2/mean/keep_first"] * 2  # the second is the same
    options = "--attention", "bidirectional", "--pooling", "first", "--dtype", "bfloat16", "--backend", "reference"
    result = run(checkpoint, "--texts", files / "texts.txt", *arguments, *options, "--json", output)
    assert result.exit_code == 0, result.output
    for part in ("bidirectional attention, pooling first, bfloat16", "texts.txt: 24 queries, 96 documents"):
        assert part in result.stdout
    rows = [line.split("│")[1:4] for line in result.stdout.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[:2]] for row in rows] == [
        ["none", "nothing"],
        ["2:2/mean/keep_first", "all"],
        ["2:2/mean/keep_first", "documents"],
    ]
    written = json.loads(output.read_text())
    expected = evaluate(
        checkpoint,
        [FunnelConfig.parse("2:2/mean/keep_first")],
        read_texts(files / "texts.txt"),
        attention="bidirectional",
        pooling="first",
        dtype="bfloat16",
        backend="reference",
    )
    assert written == json.loads(json.dumps(dataclasses.asdict(expected)))
    assert written["checkpoint"] == written["baseline"]
    assert written["checkpoint"]["manifest_sha256"] == sha256((checkpoint / "funnel.json").read_bytes()).hexdigest()
    assert written["data"]["files"] == {"texts.txt": sha256((files / "texts.txt").read_bytes()).hexdigest()}
    assert (written["data"]["units"], written["statistics"]["seed"]) == (24, 0)
    assert {"funnel-engine", "jax", "scipy"} <= written["versions"].keys()


def test_a_score_that_is_nothing_without_a_funnel_has_no_ratio(checkpoint, tmp_path):
    generator = np.random.default_rng(0)
    lines = [f"{text},{text} of,{generator.random():.4f}" for text in random_texts(30)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    result = run(checkpoint, "--pairs", tmp_path / "pairs.csv", "--funnel", "1:2", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out.json").read_text())["lines"][1]["ratios"] == {"Spearman": None}


def test_wrong_options_are_refused_in_one_line(checkpoint, files, tmp_path):
    texts = "--texts", files / "texts.txt"
    assert_refused(run(checkpoint), "given by no option; give one of --texts, --pairs, --beir, --labels, --tags")
    assert_refused(run(checkpoint, *texts, "--labels", "x.csv"), "the data are given by --texts --labels; give one of")
    assert_refused(run(checkpoint, *texts, "--funnel", "6"), "funnel '6': '6' must be LAYER:STRIDE")
    assert_refused(
        run(checkpoint, *texts, "--funnel", "none"), "funnel 'none' pools nothing, as the baseline; leave it"
    )
    assert_refused(run(checkpoint, *texts, "--funnel", "9:2"), "10 strides but the model has only 3 layers")
    assert_refused(run(checkpoint, *texts, "--json", tmp_path / "out.txt"), "'out.txt' must end in .json")
    assert_refused(run(tmp_path, *texts), "is not a checkpoint of this engine")
    assert_refused(run(checkpoint, "--tags", files / "texts.txt"), "--tags needs a token classifier", "task is none")
    assert_refused(run(checkpoint, "--texts", tmp_path / "nothing.txt"), "cannot read", "No such file")
    assert_refused(run(checkpoint, *texts, "--pooling", "attention"), "pooler.query")


def test_a_text_that_is_too_long_is_named_by_its_line(checkpoint, files, tmp_path):
    lines = (files / "texts.txt").read_text().splitlines()
    lines[50] = "a " * 3000
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    texts = "--texts", tmp_path / "texts.txt"
    assert_refused(run(checkpoint, *texts), "texts.txt, line 51: the text has 3001 tokens, more than the limit of 2048")
    assert run(checkpoint, *texts, "--truncate").exit_code == 0


def test_half_a_surrogate_pair_is_named_by_its_line(checkpoint, tmp_path):
    rows = [{"sentence1": f"a {n}", "sentence2": "b", "score": n} for n in range(25)]
    rows[7]["sentence1"] = "\ud800"
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"pairs.jsonl, line 8: the text contains half of a surrogate pair"):
        evaluate(checkpoint, FUNNELS, read_pairs(tmp_path / "pairs.jsonl"))


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path, files):
    build(transformers.Gemma2Model, gemma2()).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model")
    assert_refused(run(tmp_path / "model", "--texts", files / "texts.txt"), "this checkpoint has no tokenizer")


def test_what_must_be_installed_is_said(checkpoint, files, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    result = run(checkpoint, "--texts", files / "texts.txt")
    assert_refused(result, "scikit-learn is not installed; run: pip install 'funnel-engine[train]'")


def test_labels_outside_the_classifiers_are_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("\n".join(f"text {n},{n}" for n in range(30)))
    with pytest.raises(InputError, match="line 4: label '3' is not one of the checkpoint's labels: 'no', 'yes'"):
        read_labels(tmp_path / "labels.csv", ("no", "yes", "both"))
