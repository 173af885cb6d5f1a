"""`funnel plan` and its search, on tiny random models. Latencies are made up: what a contender computes."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

import funnel_transformer_models as models
from funnel_engine import ConfigError, Engine, FunnelConfig, InputError, convert, parse_funnel
from funnel_engine.checkpoints.convert import prepare_destination
from funnel_engine.checkpoints.convert import save as save_checkpoint
from funnel_engine.checkpoints.native import read_source
from funnel_engine.checkpoints.source import TrainingRecord
from funnel_engine.cli import main
from funnel_training import plan as planning
from funnel_training.contenders import Contender, cut, token_limits
from funnel_training.engines import engine_maker, first_layers, read_checkpoint_as
from funnel_training.latency import Latency, measure_in_turns
from funnel_training.metrics import agreement
from funnel_training.plan import Plan, Search, count_half, plan, rung_sizes
from funnel_training.plan_command import conclude
from funnel_training.scores import mean
from funnel_training.statistics import Ratio, judge, paired_ratio
from funnel_training.tasks.pairs import read_pairs
from funnel_training.tasks.tags import read_tags
from funnel_training.tasks.texts import read_texts
from tiny_models import WORDS
from toy_checkpoints import random_texts, save

FUNNELS = [
    FunnelConfig.parse(text)
    for text in ("1:2/mean", "1:2/first", "1:4/first", "2:2/mean", "2:3/mean/compact", "2:2", "2:8/mean/keep_first")
]
MAX_LOSS = 0.2


@pytest.fixture(autouse=True)
def _shared_programs(monkeypatch):
    """A plan keeps its programs in its folder, which it sets for the process. Here all have those of the whole run."""
    monkeypatch.setattr(planning, "PROGRAMS", jax.config.values["jax_compilation_cache_dir"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("plan"), "Gemma2Model")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.txt"
    path.write_text("\n".join(random_texts(240)) + "\n")
    return path


def computed(contender: Contender, baseline, other) -> Latency:
    return Latency(contender.computed, 1.0, contender.computed, contender.computed, contender.computed)


def never(*arguments):
    raise AssertionError("a complete run computes nothing again")


def make_plan(checkpoint: Path, texts: Path, output: Path, **options) -> Plan:
    options = {"funnels": FUNNELS, "max_loss": MAX_LOSS, "measure": computed, "attention": "bidirectional"} | options
    return plan(checkpoint, read_texts(texts), output=output, **options)


def run(*arguments: object):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def assert_refused(result, *parts: str):
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def expected(checkpoint, texts, tmp_path_factory) -> Plan:
    """A plan in one run."""
    return make_plan(checkpoint, texts, tmp_path_factory.mktemp("expected"))


def test_the_winner_is_that_of_a_brute_force_search(checkpoint, texts, expected):
    """Every funnel on all queries of both halves, with engines and vectors of its own."""
    task = read_texts(texts)
    order, half = task.order(planning.SEED), 24
    documents = list(task.sides[1].texts)
    engine = Engine.load(checkpoint, attention="bidirectional")
    ratios: dict[str, list[Ratio]] = {}
    for funnel in FUNNELS:
        other = Engine.load(checkpoint, attention="bidirectional", funnel=funnel)
        for units in (order[:half], order[half:]):
            chosen = [task.sides[0].texts[unit] for unit in units] + documents
            overlaps = agreement(engine.embed(chosen), other.embed(chosen), range(24)).overlaps
            ratios.setdefault(str(funnel), []).append(paired_ratio(mean(np.ones(24)), mean(overlaps)))
    cost = {each.name: each.computed for each in expected.candidates}
    within = [
        name
        for name, each in ratios.items()
        if all(judge(ratio, 24, MAX_LOSS).kind == "within" for ratio in each) and cost[name] < 0.99
    ]
    assert expected.winner == min(within, key=lambda name: cost[name])
    assert 1 <= len(within) < len(FUNNELS)
    for each in expected.candidates:
        if each.held_out is not None:
            assert each.ratio == ratios[each.name][0]
            assert each.held_out == ratios[each.name][1]
            assert each.verdict == judge(each.held_out, 24, MAX_LOSS)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Texts of 3 to 40 words."""
    generator = np.random.default_rng(3)
    found = (" ".join(generator.choice(WORDS[4:], generator.integers(3, 40))) for _ in range(260))
    path = tmp_path_factory.mktemp("mixed") / "texts.txt"
    path.write_text("\n".join(list(dict.fromkeys(found))[:240]) + "\n")
    return path


def test_a_funnel_by_length_wins_where_it_is_faster(checkpoint, mixed, tmp_path):
    """Its scores, which were composed of those of its funnels, are those of an engine that runs it."""
    funnels = [FunnelConfig.parse(text) for text in ("1:2/mean", "2:2/mean", "1:3/mean")]
    found = make_plan(checkpoint, mixed, tmp_path, funnels=funnels)
    singles = [each for each in found.candidates if each.kind == "funnel"]
    (composed,) = [each for each in found.candidates if each.kind == "by length"]
    assert composed.computed < min(each.computed for each in singles if each.ratio.low >= 1 - MAX_LOSS) - 0.01
    assert found.winner == composed.name
    assert composed.verdict.kind == "within"
    policy = parse_funnel(composed.name)
    assert len({str(funnel) for _, funnel in policy.classes}) > 1
    task = read_texts(mixed)
    order, documents = task.order(planning.SEED), list(task.sides[1].texts)
    exact, other = (
        Engine.load(checkpoint, attention="bidirectional", funnel=funnel) for funnel in (FunnelConfig(), policy)
    )
    for units, ratio in ((order[:24], composed.ratio), (order[24:], composed.held_out)):
        chosen = [task.sides[0].texts[unit] for unit in units] + documents
        overlaps = agreement(exact.embed(chosen), other.embed(chosen), range(24)).overlaps
        assert ratio == paired_ratio(mean(np.ones(24)), mean(overlaps))
    lines = conclude(found, checkpoint)
    assert f'  FunnelByLength.parse("{found.winner}")' in lines
    assert f"  funnel convert {checkpoint} NEW --funnel {found.winner}" in lines
    assert make_plan(checkpoint, mixed, tmp_path, funnels=funnels, resume=True, measure=never) == found


def test_funnels_that_cannot_win_are_not_run(expected):
    by_name = {each.name: each for each in expected.candidates}
    assert by_name["1:4/first"].ideal < by_name["1:2/first"].ideal
    assert by_name["1:4/first"].skipped == "it pools more than 1:2/first, which loses too much"
    assert by_name["2:8/mean/keep_first"].computed > 0.99
    assert by_name["2:8/mean/keep_first"].skipped == "it saves nothing"
    assert by_name["1:2/first"].ratio.high < 1 - MAX_LOSS
    for each in (by_name["1:4/first"], by_name["2:8/mean/keep_first"]):
        assert (each.units, each.ratio, each.latency) == (0, None, None)


def test_a_checkpoint_that_was_trained_for_a_funnel_has_no_funnels_skipped_for_pooling_more(
    checkpoint, texts, tmp_path
):
    """It may lose less with its own funnel than with one that pools less."""
    convert(checkpoint, tmp_path / "trained", dtype="float32", funnel=FunnelConfig.parse("1:4/first"))
    found = make_plan(tmp_path / "trained", texts, tmp_path / "out", funnels=FUNNELS[1:3])
    assert [each.units for each in found.candidates if each.kind == "funnel"] == [24, 24]


def test_a_checkpoint_with_a_record_of_training_is_refused(checkpoint, texts, tmp_path):
    record = TrainingRecord("distill", "0" * 64, "f" * 64, "cosine", 3, None, {}, {})
    model = dataclasses.replace(read_source(checkpoint), funnel=FUNNELS[1], training=record)
    save_checkpoint(model, prepare_destination(tmp_path / "trained", checkpoint, False), "float32")
    with pytest.raises(ConfigError, match="so it cannot be the baseline, which runs without a funnel"):
        make_plan(tmp_path / "trained", texts, tmp_path / "out")


def test_a_funnel_transformer_has_no_funnel_to_find(texts, tmp_path):
    models.save(models.random_model(), tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "engine")
    options = "--checkpoint", tmp_path / "engine", "--texts", texts, "--output", tmp_path / "out", "--max-loss", 0.2
    assert_refused(run(*options), "is a Funnel-Transformer, which was trained for the funnel between its blocks")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_candidates_are_the_checkpoints_own_funnel_and_the_grid_for_the_token_that_it_reads(
    checkpoint, texts, tmp_path, monkeypatch, pooling
):
    convert(checkpoint, tmp_path / "trained", dtype="float32", funnel=FunnelConfig.parse("1:2,2:3/mean"))
    made = planning.grid
    monkeypatch.setattr(planning, "grid", lambda *arguments, **options: made(*arguments, **options)[1:2] * 2)
    found = make_plan(tmp_path / "trained", texts, tmp_path / "out", funnels=None, pooling=pooling)
    kept = {"mean": "1:2/mean/keep_first", "last": "1:2/mean/keep_last"}[pooling]
    assert [each.name for each in found.candidates if each.kind == "funnel"] == ["1:2,2:3/mean", kept]


def test_rivals_are_timed_and_scored_beside_the_funnels(checkpoint, texts, expected):
    rivals = {each.name: each for each in expected.candidates if each.kind != "funnel"}
    assert set(rivals) >= {"first layer", "first 2 layers"}
    assert any(name.endswith("tokens") for name in rivals)
    engine = Engine.load(checkpoint, attention="bidirectional")
    ids = engine.token_ids(list(read_texts(texts).sides[1].texts))
    int8 = rivals.pop("int8 weights")
    assert (int8.kind, int8.computed, int8.held_out) == ("dtype", 1, None)
    assert 0.9 < int8.ratio.low <= int8.ratio.high <= 1
    for each in rivals.values():
        assert each.latency.ratio == each.computed < 1
        assert each.ratio.high < 1
        assert each.held_out is None
        if each.kind == "tokens":
            limit = int(each.name.split()[1])
            assert cut(ids, limit).lengths.max() == limit
            np.testing.assert_array_equal(cut(ids, limit).lengths, np.minimum(ids.lengths, limit))
    assert expected.where_it_loses() == []


def test_a_funnel_loses_where_a_rival_is_faster(expected):
    """With a bound that the first layers keep."""
    loose = dataclasses.replace(expected, options=expected.options | {"max_loss": 0.45})
    names = [each.candidate.name for each in loose.where_it_loses()]
    assert "first layer" in names
    assert not any(name.endswith("tokens") for name in names)


def test_int8_that_saves_time_is_named_beside_the_winner(checkpoint, expected):
    def timed(ratio: float) -> list[str]:
        latency = Latency(ratio, 1.0, ratio, ratio, ratio)
        candidates = [
            dataclasses.replace(each, latency=latency) if each.kind == "dtype" else each for each in expected.candidates
        ]
        return conclude(dataclasses.replace(expected, candidates=candidates), checkpoint)

    assert timed(1.5) == conclude(expected, checkpoint)
    (line,) = set(timed(0.25)) - set(timed(1.5))
    assert line.startswith("Without a funnel, int8 weights take 0.250 of the time and keep ")
    assert line.endswith("plan again with --dtype int8.")


def test_the_first_layers_are_those_of_transformers(checkpoint):
    source = checkpoint.parent / "source"
    model = transformers.Gemma2Model.from_pretrained(source, num_hidden_layers=2, attn_implementation="eager").eval()
    ids = [2, 5, 7, 4, 6]
    part = first_layers(read_checkpoint_as(checkpoint), 2)
    (rows,) = engine_maker(part)(FunnelConfig()).hidden_states([ids])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    np.testing.assert_allclose(rows, expected, atol=1e-4)


def test_tokens_are_cut_to_three_quarters_half_and_a_quarter():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    limits = token_limits(lengths)
    shares = [np.minimum(lengths, limit).sum() / lengths.sum() for limit in limits]
    assert shares == pytest.approx([0.75, 0.5, 0.25], abs=0.02)
    assert token_limits(np.array([3, 3, 3])) == []


@pytest.mark.parametrize("done", [1, 5, 9])
def test_an_interrupted_run_continues_to_the_same_result(checkpoint, texts, tmp_path, expected, monkeypatch, done):
    class Killed(BaseException):
        pass

    write = planning.Journal.get

    def get(journal, key, compute):
        if len(journal.results) == done and key not in journal.results:
            (tmp_path / ".progress.json.1.partial").write_text('{"facts": {"chec')
            raise Killed
        return write(journal, key, compute)

    monkeypatch.setattr(planning.Journal, "get", get)
    with pytest.raises(Killed):
        make_plan(checkpoint, texts, tmp_path)
    monkeypatch.undo()
    before = json.loads((tmp_path / "progress.json").read_text())["results"]
    assert len(before) == done
    assert make_plan(checkpoint, texts, tmp_path, resume=True) == expected
    assert json.loads((tmp_path / "progress.json").read_text())["results"].items() >= before.items()

    assert make_plan(checkpoint, texts, tmp_path, resume=True, measure=never) == expected


def test_a_run_is_only_continued_with_what_it_had(checkpoint, texts, tmp_path):
    make_plan(checkpoint, texts, tmp_path, funnels=FUNNELS[3:4])
    again = functools.partial(make_plan, checkpoint, texts, tmp_path, funnels=FUNNELS[3:4])
    with pytest.raises(ConfigError, match="already has a run; continue it with --resume, or give another folder"):
        again()
    with pytest.raises(
        ConfigError, match=r"had another max_loss: max_loss was .*, now it is .*; give what it had, or another folder"
    ):
        again(resume=True, max_loss=0.3)
    with pytest.raises(ConfigError, match="had another grid"):
        again(resume=True, funnels=FUNNELS)
    with pytest.raises(ConfigError, match="had another attention"):
        again(resume=True, attention="causal")
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    convert(checkpoint.parent / "source", other, dtype="bfloat16", overwrite=True)
    with pytest.raises(ConfigError, match="had another checkpoint"):
        make_plan(other, texts, tmp_path, funnels=FUNNELS[3:4], resume=True, dtype="float32")
    more = tmp_path / "texts.txt"
    more.write_text(texts.read_text() + "a small funnel\n")
    with pytest.raises(ConfigError, match="had another data"):
        make_plan(checkpoint, more, tmp_path, funnels=FUNNELS[3:4], resume=True)
    for content in ("{", "[]", '{"facts": [], "results": {}}', '{"facts": {}}'):
        (tmp_path / "progress.json").write_text(content)
        with pytest.raises((InputError, ConfigError), match=r"progress.json cannot be read|had another checkpoint"):
            again(resume=True)


def test_the_command_names_the_winner_and_what_to_paste(checkpoint, texts, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(planning, "plan", functools.partial(plan, funnels=FUNNELS, measure=computed))
    arguments = "--checkpoint", checkpoint, "--texts", texts, "--max-loss", MAX_LOSS, "--attention", "bidirectional"
    result = run(*arguments, "--output", tmp_path / "new" / "folder")
    assert result.exit_code == 0, result.output
    for part in (
        f'FunnelConfig.parse("{expected.winner}")',
        f"  --funnel {expected.winner}\n",
        f"funnel convert {checkpoint} NEW --funnel {expected.winner}",
        "7 funnels: 2 were not run, as they cannot win",
        "texts.txt: 24 queries to search, 24 to certify",
    ):
        assert part in result.stdout
    rows = [[cell.strip() for cell in line.split("│")] for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row[2] for row in rows if row[1] == "winner"] == [expected.winner]
    assert len(rows) == len(expected.timed())
    written = json.loads((tmp_path / "new" / "folder" / "plan.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(expected)))
    assert (tmp_path / "new" / "folder" / "plan.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "new" / "folder" / "plan.html").read_text()
    assert "data:image/png;base64," in page
    assert all(f"<td>{each.name}</td>" in page for each, _, _ in expected.timed())
    assert f"--funnel {expected.winner}\n" in page


def test_the_exit_status_is_1_if_nothing_qualifies(checkpoint, texts, tmp_path, monkeypatch):
    bad = [FunnelConfig.parse(text) for text in ("1:4/first", "1:3/first")]
    monkeypatch.setattr(planning, "plan", functools.partial(plan, funnels=bad, measure=computed))
    result = run("--checkpoint", checkpoint, "--texts", texts, "--max-loss", MAX_LOSS, "--output", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert "No funnel qualifies.\nThe best of them, 1:3/first, keeps 0." in result.stdout
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["winner"] is None
    assert (tmp_path / "out" / "plan.png").exists()


def test_a_funnel_that_is_not_faster_does_not_qualify(checkpoint, texts, tmp_path):
    slow = make_plan(
        checkpoint, texts, tmp_path, funnels=FUNNELS[3:4], measure=lambda *_: Latency(1.1, 1.0, 1.1, 1.0, 1.2)
    )
    assert slow.winner is None
    assert slow.candidates[0].ratio.low > 1 - MAX_LOSS
    assert slow.candidates[0].held_out is None


def test_bad_input_is_refused_in_one_line(checkpoint, texts, tmp_path):
    options = "--checkpoint", checkpoint, "--output", tmp_path / "out"
    assert_refused(run(*options, "--max-loss", 0.05), "given by no option; give one of --texts")
    assert_refused(
        run(*options, "--texts", texts, "--max-loss", 0.05),
        "48 queries are too few",
        "each half needs 60 for max_loss=0.05; give at least 600 different lines of data",
    )
    assert_refused(run(*options, "--texts", texts, "--max-loss", 1), "max_loss=1.0 must be below 1")
    (tmp_path / "texts.txt").write_text("one line\n")
    assert_refused(run(*options, "--texts", tmp_path / "texts.txt", "--max-loss", 0.2), "has 1 different texts")
    (tmp_path / "texts.txt").write_text("")
    assert_refused(run(*options, "--texts", tmp_path / "texts.txt", "--max-loss", 0.2), "is empty; give a file")
    (tmp_path / "file").write_text("")
    result = run("--checkpoint", checkpoint, "--texts", texts, "--max-loss", 0.2, "--output", tmp_path / "file" / "x")
    assert_refused(result, "cannot make the folder")


def test_scores_that_mean_nothing_are_refused(checkpoint, tmp_path):
    generator = np.random.default_rng(0)
    left, right = random_texts(60, seed=1), random_texts(60, seed=2)
    rows = [f"{x},{y},{generator.random():.3f}" for x, y in zip(left, right, strict=True)]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    task = read_pairs(tmp_path / "pairs.csv")
    with pytest.raises(InputError, match=r"Spearman without a funnel is -?0\.\d+ on half of the data, which is not"):
        plan(checkpoint, task, max_loss=0.2, output=tmp_path / "out", funnels=FUNNELS, measure=computed)
    (tmp_path / "pairs.csv").write_text("\n".join(f"{x},{y},3" for x, y in zip(left, right, strict=True)))
    result = run("--checkpoint", checkpoint, "--pairs", tmp_path / "pairs.csv", "--max-loss", 0.2)
    assert_refused(result, "all scores in pairs.csv are 3: the correlation with a constant is not defined")


def test_taggers_have_funnels_with_a_recovery_and_no_cut_inputs(tmp_path, monkeypatch):
    labels = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG")
    path = save(tmp_path, "Gemma2ForTokenClassification", id2label=dict(enumerate(labels)))
    engine = Engine.load(path, attention="bidirectional")
    sentences = [text for text in random_texts(120) if "query:" not in text]  # it has two tokens
    lines = []
    for sentence in sentences:
        predicted = engine.tag(sentence)[0].argmax(axis=1)[1:]
        lines.append("\n".join(f"{word} {labels[tag]}" for word, tag in zip(sentence.split(), predicted, strict=True)))
    (tmp_path / "tags.txt").write_text("\n\n".join(lines))
    made = planning.grid
    monkeypatch.setattr(planning, "grid", lambda *arguments, **options: made(*arguments, **options)[:2])
    task = read_tags(tmp_path / "tags.txt", labels)
    found = plan(
        path, task, max_loss=0.3, output=tmp_path / "out", measure=computed, attention="bidirectional", pooling="mean"
    )
    assert [each.kind for each in found.candidates] == ["funnel", "funnel", "layers", "layers", "dtype"]
    assert [each.name for each in found.candidates[:2]] == ["1:2/mean/mean_last", "1:2/mean/keep_first/mean_last"]
    assert found.data["score"] == "span F1"


# The search, on made-up ratios


class Results(dict):
    """A journal whose results are all there."""

    def get(self, key, compute):
        return self[key]


@dataclasses.dataclass
class Part:
    units: int
    unit: str = "queries"


@dataclasses.dataclass
class FakeRung:
    task: Part

    def baseline_facts(self):
        raise AssertionError

    ratio = baseline_facts


def made_up(funnels: dict[str, tuple[float, float, float, float]]) -> tuple[Search, list[Contender]]:
    """A search of funnels: for each its latency, the low end and the ratio on the search half, the low end held out."""
    results = Results()
    for number in range(2):
        results[f"baseline: 500 of {number}"] = {"score": "nDCG@10", "value": 0.6, "usable": True}
    contenders = []
    for name, (latency, low, value, held_out) in funnels.items():
        results[f"first 500: {name}"] = {"low": low, "value": value, "high": 2 * value - low}
        results[f"latency: {name}"] = dataclasses.asdict(Latency(latency, 1.0, latency, latency, latency))
        results[f"held out: {name}"] = {"low": held_out, "value": held_out + 0.02, "high": held_out + 0.04}
        contenders.append(Contender("funnel", name, latency, latency, lambda: None))
    search = Search([FakeRung(Part(500))], FakeRung(Part(500)), results, computed, 0.05)
    for each in contenders:
        search.score(each, 0)
        search.time(each, None, [])
    return search, contenders


def test_certification_goes_from_the_safest_to_the_fastest_and_stops_at_a_failure():
    funnels = {
        "2:2/mean": (0.5, 0.90, 0.94, 0.99),  # outside on the search half: never tried
        "5:2/mean": (0.6, 0.951, 0.96, 0.99),  # would pass, but comes after a failure
        "8:2/mean": (0.7, 0.955, 0.97, 0.94),  # fails
        "9:2/mean": (0.75, 0.955, 0.965, 0.99),  # slower and worse than 8:2: never tried
        "11:2/mean": (0.8, 0.96, 0.98, 0.96),
        "14:2/mean": (0.9, 0.98, 0.99, 0.97),
    }
    search, contenders = made_up(funnels)
    assert [each.name for each in search.sequence(contenders)] == ["14:2/mean", "11:2/mean", "8:2/mean", "5:2/mean"]
    assert search.certify(contenders) == "11:2/mean"
    tried = {each.name: search.candidate(each).verdict for each in contenders}
    assert {name: verdict.kind for name, verdict in tried.items() if verdict} == {
        "8:2/mean": "not shown",
        "11:2/mean": "within",
        "14:2/mean": "within",
    }
    assert tried["8:2/mean"].more_units > 0


def test_a_funnel_by_length_has_its_place_in_the_order_of_certification():
    """A failure of one that is safer ends the test before it."""
    for held_out, winner in ((0.96, "0=none+64=2:2/mean"), (0.94, None)):
        search, contenders = made_up(
            {"8:2/mean": (0.7, 0.96, 0.97, held_out), "0=none+64=2:2/mean": (0.6, 0.951, 0.96, 0.955)}
        )
        assert [each.name for each in search.sequence(contenders)] == ["8:2/mean", "0=none+64=2:2/mean"]
        assert search.certify(contenders) == winner


def test_the_closest_funnel_is_tried_if_the_search_half_shows_none():
    search, contenders = made_up({"2:2": (0.5, 0.90, 0.96, 0.9), "5:2": (0.7, 0.93, 0.97, 0.96), "8:2": (1.0, 1, 1, 1)})
    assert [each.name for each in search.sequence(contenders)] == ["5:2"]
    search, contenders = made_up({"2:2": (0.5, 0.90, 0.94, 0.9)})
    assert search.certify(contenders) is None
    assert search.sequence(contenders) == []


def test_those_that_none_beats_come_first():
    search, contenders = made_up(
        {"1:2": (0.5, 0.8, 0.9, 0), "2:2": (0.6, 0.8, 0.85, 0), "3:2": (0.7, 0.92, 0.95, 0), "4:2": (0.8, 0.7, 0.8, 0)}
    )
    assert [each.name for each in search.by_fronts(contenders)] == ["1:2", "3:2", "2:2", "4:2"]


def test_finalists_are_the_safest_and_the_cheapest_within_the_bound():
    funnels = {f"{n}:2": (0.5 + 0.02 * n, 0.951 + 0.001 * n, 0.97 + 0.001 * n, 0) for n in range(1, 12)}
    search, contenders = made_up(funnels)
    assert [each.name for each in search.finalists(contenders)] == ["11:2", "1:2", "2:2", "3:2", "4:2", "5:2"]


def test_rungs_grow_from_the_least_to_half_of_the_units():
    assert rung_sizes(200, 20) == [20, 43, 93, 200]
    assert rung_sizes(39, 20) == [39]
    assert rung_sizes(20, 20) == [20]


def test_timing_takes_turns_and_runs_each_once_before():
    calls: list[str] = []
    latency = measure_in_turns(lambda: calls.append("A"), lambda: calls.append("B"))
    assert "".join(calls) == "AB" + "ABBA" * 5
    assert latency.low <= latency.ratio <= latency.high


def test_each_half_has_enough_units(texts):
    task = read_texts(texts)
    assert count_half(task, 0.2) == 24
    with pytest.raises(InputError, match="48 queries are too few"):
        count_half(task, 0.1)
