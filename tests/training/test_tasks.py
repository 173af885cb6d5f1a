"""Each form of data: what is read, scored and refused. The outputs of models are made by hand."""

import json
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from funnel_engine import InputError
from funnel_training.tasks.labels import HeadLabels, ProbeLabels, read_labels
from funnel_training.tasks.pairs import Pairs, read_pairs
from funnel_training.tasks.retrieval import Retrieval, read_beir
from funnel_training.tasks.tags import read_tags, spans
from funnel_training.tasks.texts import read_texts


def write(path, *lines: str):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def pair_lines(count: int = 20) -> list[str]:
    return [f"left {n},right {n % 7},{n % 5}" for n in range(count)]


# Pairs


def test_pairs_are_scored_by_spearman_of_the_cosine(tmp_path):
    task = read_pairs(write(tmp_path / "pairs.csv", *pair_lines(30), pair_lines()[3]))
    assert isinstance(task, Pairs)
    assert (task.units, task.duplicates) == (30, 1)
    (side,) = task.sides
    assert len(side.texts) == len(set(side.texts)) == 37
    vectors = np.random.default_rng(0).normal(size=(37, 6))
    by_text = dict(zip(side.texts, vectors, strict=True))
    cosines = []
    for n in range(30):
        x, y = by_text[f"left {n}"], by_text[f"right {n % 7}"]
        cosines.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    scores = task.scores([vectors], [vectors])
    assert scores["Spearman"].value == pytest.approx(spearmanr(cosines, [n % 5 for n in range(30)]).statistic)
    assert dict(zip(side.texts, side.places, strict=True))["right 6"] == "pairs.csv, line 7"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b,1"] * 30, "1 different pairs in pairs.csv are too few for a comparison; give at least 20"),
        ([f"a {n},b,3.0" for n in range(30)], "all scores in pairs.csv are 3: the correlation with a constant is not"),
        ([*pair_lines(), "x,y,nan"], "pairs.csv, line 21: score is 'nan'"),
        (["one,two,three", *pair_lines()], "pairs.csv, line 1: score is 'three'; it must be a finite number"),
        ([*pair_lines(), "x,,1"], "pairs.csv, line 21: sentence2 is ''"),
        ([*pair_lines(), "x,y"], "pairs.csv, line 21 has 2 columns"),
    ],
)
def test_bad_pairs_are_refused(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        read_pairs(write(tmp_path / "pairs.csv", *lines))


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    task = read_pairs(write(tmp_path / "pairs.csv", *pair_lines()))
    vectors = np.ones((len(task.sides[0].texts), 4))
    vectors[5, 2] = np.nan
    with pytest.raises(InputError, match="row 5 of the sentences' vectors is not finite"):
        task.scores([vectors], [vectors])


# Retrieval


def test_pairs_of_query_and_document_are_a_retrieval(tmp_path):
    """Query n has document n, and query 0 has two."""
    lines = [f"query {n}\tdocument {n}" for n in range(25)]
    task = read_pairs(write(tmp_path / "pairs.tsv", *lines, lines[4], "query 0\tdocument 7"))
    assert isinstance(task, Retrieval)
    assert (task.units, task.duplicates) == (25, 1)
    queries, documents = task.sides
    assert (queries.prompt, documents.prompt) == ("query", "document")
    assert list(documents.texts) == [f"document {n}" for n in range(25)]
    assert task.relevant[:2] == ({0: 1.0, 7: 1.0}, {1: 1.0})
    scores = task.scores([np.eye(25), np.eye(25)], [])
    assert list(scores) == ["nDCG@10"]  # of 25 documents all are in the first 100
    first = (1 + 1 / np.log2(9)) / (1 + 1 / np.log2(3))  # document 7 has the eighth place, by its number
    assert scores["nDCG@10"].value == pytest.approx((24 + first) / 25)


def beir_folder(folder, documents: int = 130, queries: int = 22):
    """Query n has the relevant documents n (grade 2) and n + 1; "q3" is a document too."""
    ids = ["q3" if n == 50 else f"d{n}" for n in range(documents)]
    corpus = [{"_id": name, "title": f"title {name}", "text": f"text {name}"} for name in ids]
    corpus[1] |= {"title": ""}
    corpus[2] |= {"text": ""}
    write(folder / "corpus.jsonl", *map(json.dumps, corpus))
    write(folder / "queries.jsonl", *(json.dumps({"_id": f"q{n}", "text": f"query {n}"}) for n in range(queries + 3)))
    judged = [f"q{n}\td{n + more}\t{2 - more}" for n in range(queries) for more in (0, 1)]
    judged += [f"q{queries}\td5\t0", "q3\tq3\t1", "q0\td0\t2"]
    write(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", *judged)
    return folder


def test_beir(tmp_path):
    task = read_beir(beir_folder(tmp_path))
    queries, documents = task.sides
    assert (task.units, task.duplicates) == (22, 1)
    assert list(queries.texts) == [f"query {n}" for n in range(22)]  # not the one whose only grade is 0
    assert list(documents.texts[:4]) == ["title d0 text d0", "text d1", "title d2", "title d3 text d3"]
    assert task.relevant[3] == {3: 2.0, 4: 1.0}  # not q3 itself
    assert task.same == (None, None, None, 50, *[None] * 18)
    assert list(task.files) == ["corpus.jsonl", "queries.jsonl", "test.tsv"]
    generator = np.random.default_rng(1)
    scores = task.scores([generator.normal(size=(22, 5)), generator.normal(size=(130, 5))], [])
    assert list(scores) == ["nDCG@10", "recall@100"]
    assert 0 < scores["nDCG@10"].value < scores["recall@100"].value < 1


def test_beir_takes_the_only_file_of_qrels(tmp_path):
    folder = beir_folder(tmp_path)
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "dev.tsv")
    assert read_beir(folder).units == 22
    write(folder / "qrels" / "train.tsv", "q0\td0\t1")
    with pytest.raises(InputError, match=r"qrels has dev.tsv, train.tsv; it must have test.tsv, or one file only"):
        read_beir(folder)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (
            "corpus.jsonl",
            '{"_id": "d0", "text": "again"}',
            "corpus.jsonl, line 131: the _id 'd0' occurs a second",
        ),
        ("corpus.jsonl", '{"_id": "d999", "title": "", "text": " "}', "line 131: the document has neither a title nor"),
        ("corpus.jsonl", '{"_id": 5, "text": "x"}', "corpus.jsonl, line 131: _id is 5"),
        ("queries.jsonl", '{"_id": "q99"}', "queries.jsonl, line 26 lacks text"),
        ("qrels/test.tsv", "q0\tnone\t1", "test.tsv, line 49: the id 'none' is not in corpus.jsonl; complete the"),
        ("qrels/test.tsv", "none\td0\t1", "test.tsv, line 49: the id 'none' is not in queries.jsonl"),
        ("qrels/test.tsv", "q0\td9\thigh", "test.tsv, line 49: score is 'high'"),
        ("qrels/test.tsv", "q0 d9 1", "test.tsv, line 49 has 1 columns"),
    ],
)
def test_bad_beir_folders_are_refused(tmp_path, file, line, message):
    folder = beir_folder(tmp_path)
    with (folder / file).open("a") as opened:
        opened.write(line + "\n")
    with pytest.raises(InputError, match=message):
        read_beir(folder)


def test_too_small_or_missing_beir_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"qrels has no .tsv file"):
        read_beir(tmp_path)
    with pytest.raises(InputError, match="19 queries with a relevant document are too few"):
        read_beir(beir_folder(tmp_path / "queries", queries=19))
    folder = beir_folder(tmp_path / "documents")
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot read .*corpus.jsonl: No such file"):
        read_beir(folder)
    lines = [f"query {n},document {n % 10}" for n in range(30)]
    with pytest.raises(InputError, match="10 documents are too few for nDCG@10; give at least 11"):
        read_pairs(write(tmp_path / "pairs.csv", *lines))


# Labels


def label_lines(count: int = 60) -> list[str]:
    return [f"text {n},{'abc'[n % 3]}" for n in range(count)]


def test_a_probe_reads_the_labels_from_the_vectors(tmp_path):
    task = read_labels(write(tmp_path / "labels.csv", *label_lines(), label_lines()[8]))
    assert type(task) is ProbeLabels
    assert (task.units, task.duplicates, task.labels) == (60, 1, ("a", "b", "c"))
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(3, 8))
    near = centers[task.gold] + 0.1 * generator.normal(size=(60, 8))
    assert task.scores([near], [near])["accuracy"].value == 1
    nothing = generator.normal(size=(60, 8))
    scores = task.scores([nothing], [nothing])
    assert 0.1 < scores["accuracy"].value < 0.6
    assert 0.1 < scores["macro F1"].value < 0.6


def test_a_text_is_predicted_by_a_probe_that_has_not_seen_it(tmp_path):
    """Vectors of their own for every text, from which only a probe that has seen the text can know its label."""
    task = read_labels(write(tmp_path / "labels.csv", *label_lines()))
    assert task.scores([np.eye(60)], [])["accuracy"].value < 0.6


def test_the_checkpoints_classifier_predicts_names_and_numbers(tmp_path):
    lines = [json.dumps({"text": f"text {n}", "label": ["no", 1, "2"][n % 3]}) for n in range(30)]
    task = read_labels(write(tmp_path / "labels.jsonl", *lines), ("no", "yes", "perhaps"))
    assert type(task) is HeadLabels
    assert task.sides[0].prompt is None  # as `Engine.classify`
    np.testing.assert_array_equal(task.gold, [n % 3 for n in range(30)])
    logits = np.random.default_rng(1).normal(size=(30, 3))
    scores, predicted = task.scores([logits], [logits]), logits.argmax(axis=1)
    assert scores["accuracy"].value == (predicted == task.gold).mean()
    assert scores["macro F1"].value == pytest.approx(f1_score(task.gold, predicted, average="macro"))
    logits[4, 0] = np.inf
    with pytest.raises(InputError, match="row 4 of the logits is not finite"):
        task.scores([logits], [logits])


@pytest.mark.parametrize(
    ("lines", "head", "message"),
    [
        ([*label_lines(), "x,d"], (), r"label 'd' has 1 different texts in labels.csv; give at least 5"),
        ([f"text {n},a" for n in range(30)], (), r"all texts in labels.csv have the label 'a'"),
        (label_lines(15), (), "15 different texts in labels.csv are too few"),
        ([*label_lines(), "x, "], (), r"labels.csv, line 61: label is ' '"),
        (label_lines(), ("a", "b"), r"labels.csv, line 3: label 'c' is not one of the checkpoint's labels: 'a', 'b'"),
        ([f"text {n},{n % 3}" for n in range(30)], ("a", "b"), r"line 3: label '2' is not one of the checkpoint's"),
        ([f"text {n},-1" for n in range(30)], ("a", "b"), r"line 1: label '-1' is not one of"),
    ],
)
def test_bad_labels_are_refused(tmp_path, lines, head, message):
    with pytest.raises(InputError, match=message):
        read_labels(write(tmp_path / "labels.csv", *lines), head)


# Tags

LABELS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "E-ORG", "S-ORG")


def encode(length: int, chosen: list[tuple[int, int, str]], scheme: str) -> list[str]:
    tags = ["O"] * length
    for first, end, kind in chosen:
        tags[first:end] = [f"I-{kind}"] * (end - first)
        tags[first] = f"B-{kind}"
        if scheme == "IOBES":
            tags[end - 1] = f"E-{kind}"
            if end - first == 1:
                tags[first] = f"S-{kind}"
    return tags


@pytest.mark.parametrize("scheme", ["IOB2", "IOBES"])
def test_spans_are_those_that_were_marked(scheme):
    generator = np.random.default_rng(0)
    for _ in range(200):
        bounds = np.sort(generator.integers(0, 15, 6))
        chosen = [
            (int(first), int(end), str(generator.choice(["PER", "ORG"])))
            for first, end in pairwise(bounds)
            if first < end and generator.random() < 0.7
        ]
        assert spans(encode(15, chosen, scheme)) == set(chosen)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O I-X I-X O", {(1, 3, "X")}),
        ("B-X I-Y I-Y", {(0, 1, "X"), (1, 3, "Y")}),
        ("B-X B-X", {(0, 1, "X"), (1, 2, "X")}),
        ("E-X E-X", {(0, 1, "X"), (1, 2, "X")}),
        ("S-X I-X", {(0, 1, "X"), (1, 2, "X")}),
        ("B-X E-Y", {(0, 1, "X"), (1, 2, "Y")}),
        ("B-X-Y I-X-Y", {(0, 2, "X-Y")}),
        ("O O", set()),
    ],
)
def test_spans_of_tags_that_are_no_valid_sequence(tags, expected):
    assert spans(tags.split()) == expected


def sentence_lines(count: int = 20) -> list[str]:
    return [line for n in range(count) for line in (f"Ann{n} NNP B-PER", "Lee NNP I-PER", "left VBD O", "")]


def test_tags_are_scored_by_span_f1_and_words(tmp_path):
    lines = ["-DOCSTART- -X- O", "", *sentence_lines(), *sentence_lines(1)]
    task = read_tags(write(tmp_path / "tags.conll", *lines), LABELS)
    assert (task.units, task.duplicates) == (20, 1)
    assert task.words[1] == ("Ann1", "Lee", "left")
    assert task.sides[0].places[1] == "tags.conll, line 7"
    right, half, wrong = [1, 2, 0], [1, 0, 0], [0, 0, 3]
    outputs = [np.array(each) for each in [right] * 10 + [half] * 6 + [wrong] * 3 + [[0, 0, 0]]]
    scores = task.scores([outputs], [outputs])
    precision, recall = 10 / 19, 10 / 20
    assert scores["span F1"].value == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores["word accuracy"].value == pytest.approx((30 + 12 + 0 + 1) / 60)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["word"], "tags.conll, line 1 has one column; it must have a word first and its tag last"),
        (["a PER"], r"tags.conll, line 1: tag 'PER' must be O, or B, I, E or S with a hyphen and a type"),
        (["a B-"], r"tag 'B-' must be O"),
        (["a B-LOC"], r"line 1: tag 'B-LOC' is not one of the checkpoint's labels: 'O', 'B-PER'"),
        (sentence_lines(3), "3 different sentences in tags.conll are too few"),
        ([line for n in range(25) for line in (f"w{n} O", "")], "tags.conll has no span: every tag is O"),
    ],
)
def test_bad_tags_are_refused(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        read_tags(write(tmp_path / "tags.conll", *lines), LABELS)


# Texts


def test_texts_are_split_into_queries_and_documents(tmp_path):
    lines = [f"text {n}" for n in range(150)]
    task = read_texts(write(tmp_path / "texts.txt", *lines, "", lines[7]))
    queries, documents = (set(side.texts) for side in task.sides)
    assert (len(queries), len(documents), task.duplicates) == (30, 120, 1)
    assert queries | documents == set(lines)
    assert task.sides[0].places[0] == f"texts.txt, line {int(task.sides[0].texts[0].split()[1]) + 1}"
    assert read_texts(tmp_path / "texts.txt") == task  # the same every time
    generator = np.random.default_rng(0)
    exact = [generator.normal(size=(30, 6)), generator.normal(size=(120, 6))]
    funneled = [side + 0.2 * generator.normal(size=side.shape) for side in exact]
    scores = {name: score.value for name, score in task.scores(funneled, exact).items()}
    assert list(scores)[:2] == ["overlap@10", "nDCG@10"]
    assert all(0.3 < value < 1 for value in scores.values())
    asymmetric = {name: score.value for name, score in task.scores([exact[0], funneled[1]], exact).items()}
    assert asymmetric["overlap@10"] > scores["overlap@10"]
    assert asymmetric["cosine"] == scores["cosine"]  # that of the documents
    assert all(score.value == pytest.approx(1) for score in task.scores(exact, exact).values())


@pytest.mark.parametrize("count", [1, 99])
def test_too_few_texts_are_refused(tmp_path, count):
    lines = [f"text {n}" for n in range(count)] * 2
    with pytest.raises(InputError, match=f"texts.txt has {count} different texts; give at least 100, one in each line"):
        read_texts(write(tmp_path / "texts.txt", *lines))


# Parts of a task


def outputs_of(task) -> list[np.ndarray]:
    """A vector for each text of each side, which depends on the text only."""
    return [np.stack([vector_of(text) for text in side.texts]) for side in task.sides]


def vector_of(text: str) -> np.ndarray:
    return np.random.default_rng(list(text.encode())).normal(size=5)


def test_a_part_of_pairs_keeps_their_sentences(tmp_path):
    task = read_pairs(write(tmp_path / "pairs.csv", *pair_lines(40)))
    units = np.array([30, 2, 9, 17])
    part = task.take(units, 0.1)
    assert part.units == 4
    assert set(part.sides[0].texts) == {f"left {n}" for n in units} | {f"right {n % 7}" for n in units}
    whole, few = (each.scores(outputs_of(each), [])["Spearman"] for each in (task, part))
    np.testing.assert_allclose(few.predicted, whole.predicted[units])
    np.testing.assert_array_equal(few.gold, whole.gold[units])
    assert sorted(task.order(0)) == list(range(40)) != list(task.order(0))
    assert list(task.order(0)) == list(task.order(0)) != list(task.order(1))


def test_a_part_of_a_retrieval_has_a_share_of_the_documents(tmp_path):
    task = read_beir(beir_folder(tmp_path / "beir", documents=150))
    units = np.array([20, 3, 7])
    whole = task.take(units, 1.0)
    expected = task.scores(outputs_of(task), [])["nDCG@10"].numerators[units]
    np.testing.assert_allclose(whole.scores(outputs_of(whole), [])["nDCG@10"].numerators, expected)
    half, tenth = task.take(units, 0.5), task.take(units, 0.1)
    assert set(tenth.sides[1].texts) < set(half.sides[1].texts) < set(whole.sides[1].texts)
    relevant = {task.sides[1].texts[number] for unit in units for number in task.relevant[unit]}
    assert {tenth.sides[1].texts[number] for grades in tenth.relevant for number in grades} == relevant
    assert 15 <= len(tenth.sides[1].texts) <= 15 + len(relevant)
    assert tenth.sides[0].texts == [task.sides[0].texts[unit] for unit in units]


def test_a_part_of_texts_has_a_share_of_the_documents(tmp_path):
    task = read_texts(write(tmp_path / "texts.txt", *(f"text {n}" for n in range(200))))
    part = task.take(np.arange(10, 30), 0.25)
    assert [len(side.texts) for side in part.sides] == [20, 40]
    assert part.sides[0].places == task.sides[0].places[10:30]
    outputs = outputs_of(part)
    assert part.scores(outputs, outputs)["overlap@10"].value == 1


def test_a_part_of_labels_has_each_of_them_as_often(tmp_path):
    labels = ["rare"] * 10 + ["often"] * 50
    task = read_labels(write(tmp_path / "labels.csv", *(f"text {n},{label}" for n, label in enumerate(labels))))
    order = task.order(0)
    assert sorted(order) == list(range(60))
    assert task.least_units == 36
    for count in (6, 12, 30, 36):
        assert abs((task.take(order[:count], 1.0).gold == task.labels.index("rare")).sum() - count / 6) <= 1
    part = task.take(order[:36], 1.0)
    assert [task.labels[number] for number in part.gold] == [labels[unit] for unit in order[:36]]
    assert part.scores(outputs_of(part), [])["accuracy"].units == 36
    assert HeadLabels(task.files, 0, task.sides, task.labels, task.gold).least_units == 20


def test_a_part_of_tags_is_some_sentences(tmp_path):
    task = read_tags(write(tmp_path / "tags.txt", *sentence_lines(25)), ("O", "B-PER", "I-PER", "B-ORG"))
    part = task.take(np.array([4, 1]), 1.0)
    assert part.words == (task.words[4], task.words[1])
    assert part.tags == (task.tags[4], task.tags[1])
    assert part.sides[0].texts == [task.sides[0].texts[4], task.sides[0].texts[1]]
