"""A funnel that is chosen by the number of tokens of a sequence: results, programs, weights, and what is refused."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from click.testing import CliRunner

from funnel_engine import (
    CheckpointError,
    ConfigError,
    Engine,
    FunnelByLength,
    FunnelConfig,
    HeadConfig,
    convert,
    parse_funnel,
)
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.cli import main
from funnel_engine.config import read_funnel
from funnel_engine.flops import forward_flops, ideal_ratio
from funnel_engine.inspection import inspect_checkpoint
from tiny_models import CONFIG, make_engine, random_ids
from toy_checkpoints import save

NONE = FunnelConfig()
MEAN, TWO = FunnelConfig.parse("1:2/mean"), FunnelConfig.parse("0:2,2:3/keep_first/tile")
PAIRS = [(0, None), (10, "1:2/mean"), (33, TWO)]
STARTS, FUNNELS = (0, 10, 33), (NONE, MEAN, TWO)
LENGTHS = [5, 64, 1, 33, 17, 9, 50, 8, 10, 40, 32, 2, 64, 3]
CLASSIFIER = HeadConfig(task="classify", labels=("no", "yes", "maybe"))
TAGGER = HeadConfig(task="tag", labels=("O", "B", "I", "E"), classifier_bias=True)


def class_of(length: int) -> int:
    return sum(length >= start for start in STARTS) - 1


@pytest.mark.parametrize(
    ("head", "call"),
    [(HeadConfig(), "embed"), (HeadConfig(), "hidden_states"), (CLASSIFIER, "classify"), (TAGGER, "tag")],
)
def test_every_sequence_gets_the_bits_of_its_funnel_in_the_order_of_the_inputs(head, call):
    funnels = FUNNELS
    if call == "tag":
        funnels = tuple(dataclasses.replace(each, recovery="mean_last") if each.strides else each for each in FUNNELS)
    policy = make_engine(head, funnel=list(zip(STARTS, funnels, strict=True)))
    ids = random_ids(LENGTHS)
    results = getattr(policy, call)(ids)
    assert len(results) == len(ids)
    for number, funnel in enumerate(funnels):
        members = [index for index, length in enumerate(LENGTHS) if class_of(length) == number]
        alone = getattr(make_engine(head, funnel=funnel), call)([ids[index] for index in members])
        for index, expected in zip(members, alone, strict=True):
            np.testing.assert_array_equal(results[index], expected)


def test_one_class_is_the_funnel_itself():
    ids = random_ids(LENGTHS)
    alone, listed = make_engine(funnel=MEAN), make_engine(funnel=[(0, MEAN)])
    assert listed.funnel == MEAN
    np.testing.assert_array_equal(listed.embed(ids), alone.embed(ids))
    assert listed.describe() == alone.describe()
    assert listed.programs[0].compiled.keys() == alone.programs[0].compiled.keys()
    different = {"compile_seconds"}
    assert {name: n for name, n in listed.stats().items() if name not in different} == {
        name: n for name, n in alone.stats().items() if name not in different
    }


def test_nothing_compiles_after_warmup_and_a_class_has_only_the_buckets_that_it_can_need():
    engine = make_engine(CLASSIFIER, funnel=PAIRS)
    told = []
    engine.warmup(progress=lambda done, total: told.append((done, total)))
    compiled = engine.stats()["compilations"]
    assert told == [(done, compiled) for done in range(1, compiled + 1)]
    for programs, start in zip(engine.programs, STARTS, strict=True):
        assert programs.buckets[0] >= programs.plan.rows_needed(start)
        assert all(key.sequences <= max(1, 4 * key.rows // max(start, 1)) for key in programs.compiled)
    assert engine.programs[2].buckets[0] > engine.programs[0].buckets[0] == 8
    assert engine.programs[0].buckets[-1] == 64  # many short sequences are one batch
    for lengths in ([1], [64], [9] * 7, [10] * 30, [33, 33], [32, 9], LENGTHS * 3):
        ids = random_ids(lengths)
        engine.embed(ids), engine.classify(ids), engine.hidden_states(ids)
    stats = engine.stats()
    assert (stats["compilations"], stats["compilations_after_warmup"]) == (compiled, 0)


def test_a_warmup_of_chosen_buckets_covers_every_class():
    engine = make_engine(funnel=PAIRS)
    engine.warmup(progress=False, buckets=[16])
    assert [{key.rows for key in programs.compiled} for programs in engine.programs] == [
        {programs.bucket(16)} for programs in engine.programs
    ]
    engine.embed(random_ids([9, 5, 12]))  # 14 rows of the first class
    assert engine.stats()["compilations_after_warmup"] == 0


def test_stats_are_those_of_all_classes_and_of_each():
    engine = make_engine(funnel=PAIRS)
    engine.embed(random_ids(LENGTHS))
    engine.embed(random_ids([4]))
    stats = engine.stats()
    parts = stats["by_length"]
    assert [(part["from_tokens"], part["funnel"]) for part in parts] == [(0, "none"), (10, str(MEAN)), (33, str(TWO))]
    assert (stats["calls"], stats["sequences"], stats["tokens"]) == (2, len(LENGTHS) + 1, sum(LENGTHS) + 4)
    assert [part["sequences"] for part in parts] == [7, 3, 5]
    for name in ("sequences", "tokens", "batches", "padding_rows", "compilations", "compile_seconds"):
        assert stats[name] == sum(part[name] for part in parts)
    json.dumps(stats)


def test_the_weights_are_on_the_device_once():
    engine = make_engine(funnel=PAIRS)
    assert len({id(programs.params) for programs in engine.programs}) == 1
    names = [set(layer) for layer in engine.params["layers"]]
    assert names == [set(layer) for layer in make_engine().params["layers"]]


def test_a_layer_has_its_projections_in_the_forms_that_its_funnels_need():
    pooled = FunnelConfig.after(1, pool_query_only=True)
    policy, ids = make_engine(funnel=[(0, None), (10, pooled)]), random_ids(LENGTHS)
    first, second, third = policy.params["layers"]
    assert {"qkv", "q", "kv"} <= second.keys()
    assert not {"q", "kv"} & (first.keys() | third.keys())
    for length, rows, sequence in zip(LENGTHS, policy.hidden_states(ids), ids, strict=True):
        expected = make_engine(funnel=pooled if length >= 10 else NONE).hidden_states([sequence])[0]
        np.testing.assert_allclose(rows, expected, atol=1e-5)
    both = make_engine(funnel=[(0, pooled), (10, dataclasses.replace(pooled, pool="mean"))])
    assert "qkv" not in both.params["layers"][1]


def test_describe_has_every_class_and_says_which_one_no_sequence_reaches():
    engine = make_engine(funnel=PAIRS, max_batch_tokens=32, backend="xla")
    assert len(engine.programs) == 2
    lines = dict(line.split("  ", 1) for line in engine.describe().splitlines())
    ratio = ideal_ratio(CONFIG, MEAN, np.array([32], np.int32))
    assert lines["funnel from 0"].strip() == "none; ideal latency ratio at 9 tokens 1.000"
    assert lines["funnel from 10"].strip().startswith("2:1 before layer 1; mean pooling")
    assert lines["funnel from 10"].endswith(f"at 32 tokens {ratio:.3f}")
    assert lines["funnel from 33"].endswith("not used: a sequence has at most 32 tokens")
    assert "pool_norm" in lines  # also before a sequence has needed it
    assert lines["buckets"].strip() == "7 from 8 to 32 rows; 3 from 16 to 32 rows"


def test_tag_names_the_class_without_a_row_for_each_token():
    with pytest.raises(ConfigError, match=r"strides \(1, 2\), for 10 tokens or more, there is one row per 2 tokens"):
        make_engine(TAGGER, funnel=[(0, None), (10, "1:2")]).tag(random_ids([4]))


def test_the_ideal_latency_adds_up_over_the_classes():
    lengths, policy = np.array(LENGTHS, np.int32), read_funnel(PAIRS)
    expected = sum(forward_flops(CONFIG, FUNNELS[class_of(length)], np.array([length], np.int32)) for length in LENGTHS)
    assert forward_flops(CONFIG, policy, lengths) == expected
    assert ideal_ratio(CONFIG, policy, lengths) == expected / forward_flops(CONFIG, NONE, lengths)


def test_the_short_form_is_read_and_written():
    text = "0=none+10=1:2/mean+33=0:2,2:3/keep_first/tile"
    assert parse_funnel(text) == FunnelByLength(PAIRS) == read_funnel(PAIRS)
    assert str(parse_funnel(text)) == text
    assert parse_funnel("1:2/mean") == parse_funnel("0=1:2/mean") == MEAN
    assert FunnelByLength(PAIRS).total_stride == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0=", "'0=' must be TOKENS=FUNNEL, e.g. 64=6:2/mean"),
        ("=1:2", "'=1:2' must be TOKENS=FUNNEL"),
        ("0=none+", "'' must be TOKENS=FUNNEL"),
        ("0=none+1:2", "'1:2' must be TOKENS=FUNNEL"),
        ("0=none+64=1:2=2", "'1:2=2' must be LAYER:STRIDE"),
        ("-1=none", "'-1=none' must be TOKENS=FUNNEL"),
        ("9999999999=none", "must be TOKENS=FUNNEL"),
        ("0=none+8=1:2/median", "'median' is unknown"),
        ("8=none", r"the first funnel is for 8 tokens or more; add one for 0, e.g. \(0, None\)"),
        ("0=none+8=1:2+8=1:3", "numbers of tokens must ascend, but 8 comes after 8"),
    ],
)
def test_a_short_form_that_is_wrong_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_funnel(text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"classes=\(\) must be pairs"),
        ((1, 2), r"funnel\[0\]=1 must be a pair \(tokens, funnel\)"),
        ([(0, None, 3)], r"funnel\[0\]=\(0, None, 3\) must be a pair"),
        (["0=none"], r"funnel\[0\]='0=none' must be a pair"),
        ([(0, None), (64, 2)], r"funnel\[1\]: 2 must be a FunnelConfig, its short form"),
        ([(0, None), (64, "2")], "'2' must be LAYER:STRIDE"),
        ([(0.0, None)], r"funnel\[0\]: tokens=0.0 must be an integer of at least 0"),
        ([(-1, None)], "tokens=-1 must be"),
        ([(0, None), (True, MEAN)], "tokens=True must be"),
        ([(5, None)], "the first funnel is for 5 tokens or more"),
        ([(0, None), (30, MEAN), (20, TWO)], "numbers of tokens must ascend, but 20 comes after 30"),
        ([(0, None), (65, MEAN)], "the funnel 1:2/mean is for 65 tokens or more, but the longest sequence .* has 64"),
        ([(0, None), (20, "5:2")], "6 strides but the model has only 3 layers"),
        ({0: None}, "must be a FunnelConfig; .* chooses by length"),
    ],
)
def test_a_list_that_is_wrong_is_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(funnel=value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_length")
    save(folder, "Gemma2Model").rename(folder / "plain")
    convert(folder / "plain", folder / "funneled", dtype="float32", funnel=PAIRS)
    return folder


def test_a_checkpoint_stores_the_funnels_and_runs_them(checkpoint):
    assert read_checkpoint(checkpoint / "funneled").manifest.funnel == FunnelByLength(PAIRS)
    ids = random_ids([4, 12, 40], vocab_size=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = Engine.load(checkpoint / "funneled", max_batch_tokens=64)
        asked = Engine.load(checkpoint / "plain", funnel=PAIRS, max_batch_tokens=64)
        same = Engine.load(checkpoint / "funneled", funnel=PAIRS, max_batch_tokens=64)
    np.testing.assert_array_equal(own.embed(ids), asked.embed(ids))
    assert own.describe() == asked.describe() == same.describe()
    with pytest.warns(UserWarning, match=r"meant for the funnel 0=none\+10=1:2/mean\+.*, but it is loaded with 1:2"):
        other = Engine.load(checkpoint / "funneled", funnel=MEAN, max_batch_tokens=64)
    assert f"the funnel {FunnelByLength(PAIRS)}" in other.describe()


def test_it_is_converted_again_and_inspected(checkpoint, tmp_path):
    convert(checkpoint / "funneled", tmp_path / "again", dtype="float32")
    facts = inspect_checkpoint(tmp_path / "again", seq_len=20)
    assert facts["intended_funnel"] == facts["funnel"] == str(FunnelByLength(PAIRS))
    assert facts["ideal_ratio"] == inspect_checkpoint(tmp_path / "again", seq_len=20, funnel=MEAN)["ideal_ratio"] < 1
    assert inspect_checkpoint(tmp_path / "again", seq_len=9)["ideal_ratio"] == 1
    convert(checkpoint / "funneled", tmp_path / "single", dtype="float32", funnel=[(0, "1:2")])
    assert read_checkpoint(tmp_path / "single").manifest.funnel == FunnelConfig.after(1)


def test_the_command_line_takes_the_short_form(checkpoint, tmp_path):
    (tmp_path / "texts").write_text("a funnel\n" + "pools pairs of " * 5 + "\n")
    arguments = ["embed", checkpoint / "plain", tmp_path / "texts", "-o", tmp_path / "v.npy"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--funnel", "0=none+10=1:2/mean"])
    assert result.exit_code == 0, result.output
    engine = Engine.load(checkpoint / "plain", funnel=[(0, None), (10, MEAN)])
    expected = engine.embed((tmp_path / "texts").read_text().splitlines())
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


def funnel_fields(*classes):
    return {"classes": list(classes)}


FIELDS = json.loads(json.dumps(dataclasses.asdict(MEAN)))


@pytest.mark.parametrize(
    ("funnel", "message"),
    [
        (funnel_fields(), r"classes=\(\) must be pairs"),
        ({"classes": None}, "funnel.classes is None; it must be a JSON list"),
        ({"classes": {}}, "funnel.classes is {}; it must be a JSON list"),
        (funnel_fields([0, FIELDS]) | {"more": 1}, "funnel has the unknown 'more'"),
        (funnel_fields([0, FIELDS]) | {"strides": []}, "funnel"),
        (funnel_fields([0]), r"funnel.classes\[0\] has 1 entries; it must have 2"),
        (funnel_fields([0, None]), r"funnel.classes\[0\]\[funnel\] is None; it must be a JSON dict"),
        (funnel_fields([0, "1:2"]), "is '1:2'; it must be a JSON dict"),
        (funnel_fields([True, FIELDS]), r"\[tokens\] is True; it must be a JSON int"),
        (funnel_fields([3, FIELDS]), "the first funnel is for 3 tokens or more"),
        (funnel_fields([0, FIELDS], [0, FIELDS]), "numbers of tokens must ascend"),
        (funnel_fields([0, FIELDS], [10**9, FIELDS]), "is for 1000000000 tokens or more, but the longest sequence"),
        (funnel_fields([0, FIELDS], [9, FIELDS | {"strides": [1] * 40}]), "40 strides but the model has only"),
        (funnel_fields([0, funnel_fields([0, FIELDS])]), "funnel"),
        ([[0, FIELDS]], "it must be a JSON dict"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(checkpoint, tmp_path, funnel, message):
    convert(checkpoint / "plain", tmp_path / "model", dtype="float32")
    file = tmp_path / "model" / "funnel.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"funnel": funnel}))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(tmp_path / "model")
    assert "funnel.json" in str(caught.value)


def test_a_manifest_of_version_3_is_read(checkpoint, tmp_path):
    convert(checkpoint / "plain", tmp_path / "model", dtype="float32", funnel=MEAN)
    file = tmp_path / "model" / "funnel.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 3}))
    assert read_checkpoint(tmp_path / "model").manifest.funnel == MEAN
