"""What surrounds the numbers in `Engine`: splitting, order, options, counters, threads, refusals."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np
import pytest

from funnel_engine import (
    BackendUnavailable,
    CheckpointError,
    ConfigError,
    Engine,
    FunnelConfig,
    HeadConfig,
    InputError,
)
from funnel_engine.results import finish_vectors
from funnel_engine.text import TextConfig
from funnel_engine.weights import random_weights
from tiny_models import CONFIG, make_engine, random_ids, tokenize

CLASSIFIER = HeadConfig(task="classify", labels=("no", "yes", "maybe"))
TAGGER = HeadConfig(task="tag", labels=("O", "B", "I", "E"), classifier_bias=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(tokenizer=tokenize, text=TextConfig(begin=2, prompts={"query": "query: ", "none": ""}))


def test_a_large_call_is_split_and_keeps_its_order(engine):
    ids = random_ids([5, 64, 1, 33, 17, 2, 50, 8, 21, 40] * 3)
    batches = engine.stats()["batches"]
    together = engine.hidden_states(ids)
    assert engine.stats()["batches"] - batches >= sum(map(len, ids)) // 64
    for sequence, rows in zip(ids, together, strict=True):
        assert rows.shape == (len(sequence), CONFIG.hidden_size)
        np.testing.assert_allclose(rows, engine.hidden_states([sequence])[0], atol=1e-5)


def test_started_calls_run_one_after_another_and_return_what_the_methods_return():
    engine = make_engine(TAGGER, funnel=FunnelConfig.after(1, recovery="mean_last"))
    inputs = [engine.token_ids(random_ids(lengths, seed)) for seed, lengths in enumerate([[9, 40, 3], [64, 5], [1]])]
    vectors, rows, logits = (
        [call.result() for call in [engine.start(each, method) for each in inputs]]  # all are started before the first
        for method in ("embed", "hidden_states", "tag")
    )
    assert engine.stats()["calls"] == 9
    for ids, *found in zip(inputs, vectors, rows, logits, strict=True):
        np.testing.assert_array_equal(finish_vectors(found[0], CONFIG.hidden_size, normalize=True), engine.embed(ids))
        np.testing.assert_array_equal(finish_vectors(found[0], 7, normalize=True), engine.embed(ids, truncate_dim=7))
        for result, expected in ((found[1], engine.hidden_states(ids)), (found[2], engine.tag(ids))):
            assert len(result) == len(expected)
            for one, other in zip(result, expected, strict=True):
                np.testing.assert_array_equal(one, other)
    with pytest.raises(ConfigError, match="classify needs a head for this task"):
        engine.start(inputs[0], "classify")


def test_rows_needed_are_those_of_the_funnel_for_each_length():
    engine = make_engine(funnel=[(0, None), (10, FunnelConfig.after(1, stride=4))])
    np.testing.assert_array_equal(engine.rows_needed(np.array([9, 10, 3, 13], np.int32)), [9, 12, 3, 16])
    assert engine.batch_rows == 64


def test_all_forms_of_input_agree(engine):
    ids = [[2, 4, 5, 6], [2, 10]]
    expected = engine.embed(ids)
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(engine.embed(["a small funnel", "tokens"]), expected)
    np.testing.assert_array_equal(engine.embed((np.concatenate(ids), np.array([0, 4, 6]))), expected)
    np.testing.assert_allclose(engine.embed("tokens"), expected[1:], atol=1e-6)


def test_prompts(engine):
    np.testing.assert_array_equal(engine.embed("a", prompt_name="query"), engine.embed("query: a"))
    with pytest.raises(InputError, match=r"prompt_name='document' is unknown; this checkpoint's prompts: query, none"):
        engine.embed("a", prompt_name="document")
    with pytest.raises(InputError, match="prompt_name='query' needs texts"):
        engine.embed([[3, 4]], prompt_name="query")


def test_the_default_prompt_is_for_texts_only():
    engine = make_engine(
        tokenizer=tokenize, text=TextConfig(begin=2, prompts={"query": "query: "}, default_prompt_name="query")
    )
    np.testing.assert_array_equal(engine.embed("a"), engine.embed([[2, 3, 3, 4]]))


def test_normalize_and_truncate(engine):
    ids = random_ids([3, 9])
    raw = engine.embed(ids, normalize=False)
    np.testing.assert_allclose(engine.embed(ids), raw / np.linalg.norm(raw, axis=1, keepdims=True), rtol=1e-5)
    cut = raw[:, :7]
    np.testing.assert_allclose(
        engine.embed(ids, truncate_dim=7), cut / np.linalg.norm(cut, axis=1, keepdims=True), rtol=1e-5
    )
    np.testing.assert_array_equal(engine.embed(ids, truncate_dim=np.int64(7)), engine.embed(ids, truncate_dim=7))
    for size in (0, CONFIG.hidden_size + 1, 3.5, True):
        with pytest.raises(InputError, match=f"truncate_dim={size}"):
            engine.embed(ids, truncate_dim=size)


@pytest.mark.parametrize("value", ["query", 16, None, 0, np.array([True])])
@pytest.mark.parametrize("flag", ["normalize", "truncate"])
def test_a_flag_is_true_or_false(engine, flag, value):
    with pytest.raises(InputError, match=rf"{flag}=.* must be True or False"):
        engine.embed([[3, 4]], **{flag: value})
    ids = random_ids([3])
    np.testing.assert_array_equal(engine.embed(ids, **{flag: np.True_}), engine.embed(ids, **{flag: True}))


def test_the_flag_of_every_other_call(engine):
    for call in (engine.hidden_states, engine.token_ids, make_engine(CLASSIFIER).classify, make_engine(TAGGER).tag):
        with pytest.raises(InputError, match="truncate='left' must be True or False"):
            call([[3, 4]], truncate="left")
    with pytest.raises(InputError, match="progress=1 must be True or False"):
        engine.warmup(progress=1)


def test_options_of_calls_have_names(engine):
    for call in (
        lambda: engine.embed(["a"], "query"),
        lambda: engine.embed(["a"], 16),
        lambda: engine.hidden_states(["a"], True),
        lambda: engine.warmup(False),
        lambda: Engine.load("nowhere", FunnelConfig()),
    ):
        with pytest.raises(TypeError, match="positional"):
            call()


def test_token_ids_are_what_the_texts_are_run_as(engine):
    texts = ["a small funnel", "pools"]
    ids, offsets, types = ragged = engine.token_ids(texts, prompt_name="query")
    assert [part.tolist() for part in np.split(ids, offsets[1:-1])] == [[2, 3, 3, 4, 5, 6], [2, 3, 3, 7]]
    assert types is None  # this model has none
    np.testing.assert_array_equal(engine.embed(ragged), engine.embed(texts, prompt_name="query"))
    with pytest.raises(InputError, match="input 1 has 66 tokens, more than the limit of 64"):
        engine.token_ids(["a", "a " * 65])


def test_texts_in_an_array_get_the_prompt(engine):
    texts = ["a small funnel", "pools pairs"]
    expected = engine.embed(texts, prompt_name="query")
    np.testing.assert_array_equal(engine.embed(np.array(texts), prompt_name="query"), expected)


def test_a_result_that_is_kept_does_not_hold_its_batch(engine):
    ids = random_ids([2, 60, 60])
    tagger = make_engine(TAGGER)
    for results in (engine.hidden_states(ids), tagger.tag(ids)):
        assert all(rows.base is None and rows.flags.owndata and rows.flags.writeable for rows in results)
    assert engine.embed(ids, normalize=False, truncate_dim=3).flags.owndata
    assert engine.embed(ids, truncate_dim=3).flags.owndata
    assert make_engine(CLASSIFIER).classify(ids).flags.owndata


def test_a_refused_call_leaves_the_engine_usable(engine):
    before = engine.embed([[3, 4]])
    for bad in ([], [[]], [[-1]], [[3] * 65]):
        with pytest.raises(InputError):
            engine.embed(bad)
    np.testing.assert_array_equal(engine.embed([[3, 4]]), before)


def test_the_longest_sequence_is_bounded_by_the_model_and_by_the_batch():
    with pytest.raises(InputError, match="65 tokens, more than the limit of 64"):
        make_engine(max_batch_tokens=1000).embed(random_ids([65]))
    with pytest.raises(InputError, match="33 tokens, more than the limit of 32"):
        make_engine(max_batch_tokens=32).embed(random_ids([33]))
    full = FunnelConfig((1, 2), keep_first=True)  # the lead row must not cost a token
    assert make_engine(max_batch_tokens=32, funnel=full).embed(random_ids([32])).shape == (1, CONFIG.hidden_size)


@pytest.mark.parametrize("funnel", [FunnelConfig(), FunnelConfig.after(1, stride=3)], ids=["whole", "funnel"])
def test_nothing_compiles_after_warmup(funnel):
    engine = make_engine(CLASSIFIER, funnel=funnel, max_batch_tokens=24)
    engine.warmup(progress=False)
    compiled = engine.stats()["compilations"]
    assert compiled >= len(engine.programs[0].buckets) * 3
    for lengths in ([1], [24], [1] * 30, [5, 24, 3, 3, 9], [2] * 7):
        ids = random_ids(lengths)
        engine.embed(ids), engine.classify(ids), engine.hidden_states(ids)
    stats = engine.stats()
    assert stats["compilations"] == compiled
    assert stats["compilations_after_warmup"] == 0


def test_a_warmup_of_chosen_buckets_compiles_those_that_hold_the_rows():
    engine = make_engine()
    small, *_, largest = engine.programs[0].buckets
    engine.warmup(progress=False, buckets=[small - 1, np.int32(small), 1])
    assert {rows for _, rows, _ in engine.programs[0].compiled} == {small}
    engine.embed([[5, 6, 7]])
    assert engine.stats()["compilations_after_warmup"] == 0
    engine.warmup(progress=False, buckets=[largest])
    assert {rows for _, rows, _ in engine.programs[0].compiled} == {small, largest}
    for wrong, message in (
        ([0], rf"buckets\[0\]=0 must be an integer from 1 to {largest}"),
        ([1, largest + 1], rf"buckets\[1\]={largest + 1} must"),
        ([True], r"buckets\[0\]=True"),
        ([2.0], r"buckets\[0\]=2.0"),
        ("8", r"buckets\[0\]='8'"),
        (8, "buckets=8 must be a list of numbers of rows"),
        ([], r"buckets=\[\] must be a list"),
    ):
        with pytest.raises(InputError, match=message):
            engine.warmup(progress=False, buckets=wrong)


def test_a_warmup_reports_its_progress_and_ends_with_what_that_raises():
    engine, told = make_engine(max_batch_tokens=24), []
    engine.warmup(progress=lambda done, total: told.append((done, total)))
    programs = engine.stats()["compilations"]
    assert told == [(done, programs) for done in range(1, programs + 1)]
    engine = make_engine(max_batch_tokens=4096)

    def stop(done, total):
        raise StopAsyncIteration

    with pytest.raises(StopAsyncIteration):
        engine.warmup(progress=stop)
    assert engine.stats()["compilations"] < 2 * len(engine.programs[0].buckets)
    engine.embed([[5, 6, 7]])
    assert engine.stats()["compilations_after_warmup"] == 0


def test_a_compilation_after_warmup_is_counted():
    engine = make_engine(max_batch_tokens=16)
    engine.warmup(progress=False)
    (programs,) = engine.programs
    programs.buckets = (*programs.buckets, 48)  # as if a bucket had been forgotten
    engine.embed(random_ids([16, 16, 16]))
    assert engine.stats()["compilations_after_warmup"] == 2  # the encoder and its head


def test_stats_count_calls_tokens_and_padding():
    engine = make_engine()
    engine.embed(random_ids([3, 4]))
    engine.embed(random_ids([20]))
    stats = engine.stats()
    assert (stats["calls"], stats["sequences"], stats["tokens"], stats["batches"]) == (2, 3, 27, 2)
    assert stats["padding_rows"] == (8 - 7) + (20 - 20)
    assert stats["compilations"] == 4
    assert stats["compile_seconds"] > 0


def test_many_threads_get_the_same_as_one(engine):
    calls = [random_ids([1 + (7 * i) % 50, 1 + i % 5], seed=i) for i in range(24)]
    alone = [engine.embed(ids) for ids in calls]
    fresh = make_engine()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(fresh.embed, calls))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)
    assert fresh.stats()["calls"] == len(calls)
    assert fresh.stats()["compilations"] == len(fresh.programs[0].compiled)  # none was compiled twice


def test_bfloat16_is_close_to_float32():
    ids = random_ids([5, 40])
    low = {name: w.astype(ml_dtypes.bfloat16) for name, w in random_weights(CONFIG, HeadConfig(), "float32", 7).items()}
    half = Engine(CONFIG, HeadConfig(), low, max_batch_tokens=64)
    whole = Engine(CONFIG, HeadConfig(), {name: w.astype(np.float32) for name, w in low.items()}, max_batch_tokens=64)
    np.testing.assert_allclose(half.embed(ids), whole.embed(ids), atol=0.02)


def test_another_funnel_shares_the_weights_and_nothing_else():
    ids = random_ids([9, 40, 3, 64])
    engine = make_engine(funnel=FunnelConfig.after(1), max_batch_tokens=64)
    engine.warmup(progress=False)
    before, vectors = engine.stats(), engine.embed(ids)
    for funnel in (FunnelConfig(), FunnelConfig.after(2, stride=4), [(0, None), (20, "1:2/mean")]):
        other, alone = engine.with_funnel(funnel), make_engine(funnel=funnel)
        np.testing.assert_array_equal(other.embed(ids), alone.embed(ids))
        assert np.abs(other.embed(ids) - vectors).max() > 1e-3
        assert jax.tree.all(jax.tree.map(lambda one, two: one is two, other.params, engine.params))
        assert (other.funnel, other.batch_rows) == (alone.funnel, alone.batch_rows)
        assert other.stats()["compilations_after_warmup"] == 0 < other.stats()["compilations"]
    assert engine.stats() == before | {
        name: engine.stats()[name] for name in ("calls", "sequences", "tokens", "batches", "padding_rows")
    }
    assert engine.stats()["calls"] == 1
    np.testing.assert_array_equal(engine.embed(ids), vectors)


def test_a_funnel_that_needs_weights_in_another_form_is_refused():
    pools_queries = FunnelConfig.after(1, pool_query_only=True)
    for first, second in ((pools_queries, FunnelConfig()), (FunnelConfig(), pools_queries)):
        with pytest.raises(ConfigError, match="cannot share weights: with pool_query_only, layer 1 "):
            make_engine(funnel=first).with_funnel(second)
    both = make_engine(funnel=[(0, None), (16, pools_queries)])  # has both forms
    ids = random_ids([9, 40])
    for funnel in (FunnelConfig(), pools_queries):
        np.testing.assert_array_equal(both.with_funnel(funnel).embed(ids), make_engine(funnel=funnel).embed(ids))
    with pytest.raises(ConfigError, match="strides"):
        both.with_funnel(FunnelConfig((1, 1, 1, 1, 2)))


def test_describe_names_what_runs():
    text = make_engine(funnel=FunnelConfig.after(1, recovery="sum_max"), backend="reference").describe()
    for part in ("gemma2", "3 layers", "bidirectional", "2:1 before layer 1", "sum_max", "reference", "8 to 64 rows"):
        assert part in text


def test_describe_is_a_table_whatever_the_length_of_a_name():
    engine = make_engine(backend="xla")
    lines = engine.describe().splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == list(engine.facts())
    assert "linear_add_norm  xla" in lines
    assert len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines}) == 1


def test_classify_reads_the_last_token_that_is_not_padding():
    engine = make_engine(CLASSIFIER)
    one, padded, inside, all_pads = [5, 6, 7], [5, 6, 7, 0, 0], [5, 0, 7], [0, 0]
    logits = engine.classify([one, padded, inside, all_pads])
    weight = random_weights(CONFIG, CLASSIFIER, "float32", 7)["classifier.weight"]
    rows = engine.hidden_states([one, padded, inside, all_pads])
    expected = np.stack([rows[0][2], rows[1][2], rows[2][2], rows[3][0]]) @ weight.T
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_tag_refuses_a_funnel_without_recovery():
    ids = random_ids([4, 7])
    with pytest.raises(ConfigError, match=r"one row per 2 tokens; load with a recovery, e\.g\..*mean_last"):
        make_engine(TAGGER, funnel=FunnelConfig.after(1)).tag(ids)
    logits = make_engine(TAGGER, funnel=FunnelConfig.after(1, recovery="mean_last")).tag(ids)
    assert [rows.shape for rows in logits] == [(4, 4), (7, 4)]


def test_a_task_needs_its_classifier():
    with pytest.raises(ConfigError, match="classify needs a head for this task, but this checkpoint's task is tag"):
        make_engine(TAGGER).classify([[3]])
    with pytest.raises(ConfigError, match=r"tag needs a head .* task is none; convert a ForTokenClassification"):
        make_engine().tag([[3]])


def test_bad_options():
    with pytest.raises(BackendUnavailable, match="backend 'cuda' does not exist in this build; choose one of auto"):
        make_engine(backend="cuda")
    with pytest.raises(BackendUnavailable, match=r"backend \['xla'\] does not exist"):
        make_engine(backend=["xla"])
    for backend in ("tpu", "triton"):
        with pytest.raises(
            BackendUnavailable, match=f"is not served by backend '{backend}': {backend}: JAX runs on cpu"
        ):
            make_engine(backend=backend)
    with pytest.raises(ConfigError, match="max_batch_tokens=0 must be an integer from 1 to 16777216"):
        make_engine(max_batch_tokens=0)
    with pytest.raises(ConfigError, match="max_batch_tokens=2147483648 must be an integer from 1 to 16777216"):
        make_engine(max_batch_tokens=2**31)
    with pytest.raises(ConfigError, match="funnel=2 must be a FunnelConfig"):
        make_engine(funnel=2)
    with pytest.raises(ConfigError, match="4 strides but the model has only 3 layers"):
        make_engine(funnel=FunnelConfig((1, 1, 1, 2)))
    with pytest.raises(ConfigError, match=r"strides \(9, 8\) pool 72 tokens into one row, but .* has 64"):
        make_engine(funnel=FunnelConfig((9, 8)))
    for wrong in ("xla", 3, b"xla"):
        with pytest.raises(ConfigError, match="mesh="):
            make_engine(mesh=wrong)
    with pytest.raises(ConfigError, match="pooler=1 must be True or False"):
        HeadConfig(pooler=1)
    with pytest.raises(ConfigError, match="pooling='attention' needs the learned query"):
        HeadConfig(pooling="attention")


def test_weights_that_do_not_fit_are_all_listed():
    weights = random_weights(CONFIG, HeadConfig(), "float32", seed=7)
    del weights["final_norm"]
    weights["extra"] = weights["layers.1.down"]
    weights["layers.0.qkv"] = weights["layers.0.qkv"][:-1]
    with pytest.raises(CheckpointError) as caught:
        Engine(CONFIG, HeadConfig(), weights)
    for part in ("final_norm is missing", "extra is unknown", "layers.0.qkv has shape (63, 24), not (64, 24)"):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes_are_refused(dtype):
    weights = {k: w.astype(dtype) for k, w in random_weights(CONFIG, HeadConfig(), "float32", 7).items()}
    with pytest.raises(CheckpointError, match=f"matrices are {np.dtype(dtype)} .* all matrices must be one of"):
        Engine(CONFIG, HeadConfig(), weights)


def test_causal_rows_do_not_see_later_tokens():
    ids = random_ids([30])
    causal = dataclasses.replace(CONFIG, attention="causal")
    rows = make_engine(config=causal).hidden_states(ids)[0]
    changed = ids[0].copy()
    changed[20] += 1
    other = make_engine(config=causal).hidden_states([changed])[0]
    assert np.abs(rows - other)[:20].max() == 0
    assert np.abs(rows - other)[20:].max() > 0


def test_compiled_programs_outlive_the_process(tmp_path, other_programs):
    for place in ("one", "other"):  # the second engine's directory is used too
        make_engine(compilation_cache=tmp_path / place).embed(random_ids([5]))
    assert any((tmp_path / "one").iterdir())
    assert any((tmp_path / "other").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file cannot be made: File exists"):
        make_engine(compilation_cache=tmp_path / "file")


@pytest.mark.parametrize("place", ["", 3, True, b"cache"])
def test_a_cache_without_a_name_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"compilation_cache=.* is not the path of a directory; give a path, or None"):
        make_engine(compilation_cache=place).embed(random_ids([5]))
    assert not list(tmp_path.iterdir())
