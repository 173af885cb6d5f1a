"""Batches of the requests of many clients: own results, turns, limits, and requests that nobody waits for any more."""

import asyncio
import time

import numpy as np
import pytest

from funnel_engine import FunnelConfig, HeadConfig
from funnel_engine.inputs import Ragged, join
from funnel_serving.batcher import Batcher, concatenate
from funnel_serving.metrics import Metrics
from funnel_serving.refusals import Refusal
from gated_engine import GatedEngine
from tiny_models import make_engine, random_ids

LATER = 1e9
POISON = 99


@pytest.fixture(scope="module")
def tiny():
    return make_engine(HeadConfig(task="tag", labels=("O", "B")), funnel=FunnelConfig.after(1, recovery="mean_last"))


@pytest.fixture
def engine(tiny):
    return GatedEngine(tiny)


@pytest.fixture
def batcher(engine):
    batcher = Batcher(engine, Metrics(), max_waiting_rows=1000, max_waiting_requests=20)
    yield batcher
    engine.gate.set()
    assert batcher.close(60)


def ids(*lengths, seed=0):
    return join(random_ids(list(lengths), seed, vocab_size=POISON))


def value(metric):
    return metric._value.get()


async def until(condition):
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not happen")


def test_each_request_gets_its_own_results_in_order(batcher, engine, tiny):
    engine.gate.set()
    generator = np.random.default_rng(1)
    inputs = [ids(*generator.integers(1, 40, generator.integers(1, 5)), seed=seed) for seed in range(9)]
    methods = ["embed", "hidden_states", "tag"] * 3

    async def run():
        requests = [batcher.submit(*pair, LATER) for pair in zip(methods, inputs, strict=True)]
        return await asyncio.gather(*(request.future for request in requests))

    for method, each, results in zip(methods, inputs, asyncio.run(run()), strict=True):
        call = tiny.start(each, method).result()
        assert len(results) == len(call)
        for one, other in zip(results, call, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert all(sum(tiny.rows_needed(np.array(lengths))) <= tiny.batch_rows for _, lengths in engine.started)


def test_results_have_the_bits_of_the_engine_for_the_same_batch(batcher, engine, tiny):
    engine.gate.set()
    each = ids(20, 7, 12)

    async def run():
        return await batcher.submit("embed", each, LATER).future

    np.testing.assert_array_equal(asyncio.run(run()), tiny.start(each, "embed").result())


def test_requests_that_wait_share_a_batch_and_take_turns(batcher, engine):
    """A request that fills many batches does not block one that comes later."""

    async def run():
        first = batcher.submit("embed", ids(64), LATER)
        await until(lambda: len(engine.started) == 1)
        with batcher._changed:
            long = batcher.submit("embed", ids(*[16] * 12), LATER)
            short = batcher.submit("embed", ids(5, 7), LATER)
        engine.gate.set()
        await asyncio.gather(first.future, short.future, long.future)

    asyncio.run(run())
    lengths = [each for _, each in engine.started]
    assert lengths[:2] == [[64], [16, 16, 16, 5, 7]]
    assert sum(map(sum, lengths[2:])) == 9 * 16


def test_a_batch_starts_while_another_runs_once_it_is_as_large(batcher, engine):
    async def run():
        requests = [batcher.submit("embed", ids(20), LATER)]
        await until(lambda: len(engine.started) == 1)
        requests.append(batcher.submit("embed", ids(10), LATER))
        await asyncio.sleep(0.1)
        assert len(engine.started) == 1  # 10 rows are fewer than the 20 that run
        requests.append(batcher.submit("embed", ids(10, seed=2), LATER))
        await until(lambda: len(engine.started) == 2)
        requests.append(batcher.submit("embed", ids(64), LATER))
        await asyncio.sleep(0.1)
        assert len(engine.started) == 2  # one runs, and one is ready
        engine.gate.set()
        await asyncio.gather(*(request.future for request in requests))

    asyncio.run(run())
    assert engine.started == [("embed", [20]), ("embed", [10, 10]), ("embed", [64])]


def test_a_batch_has_one_method_and_the_others_keep_their_place(batcher, engine):
    async def run():
        requests = [batcher.submit("embed", ids(64), LATER)]
        await until(lambda: len(engine.started) == 1)
        with batcher._changed:
            requests += [
                batcher.submit(method, ids(length), LATER)
                for method, length in [("tag", 3), ("embed", 4), ("tag", 5), ("embed", 6)]
            ]
        engine.gate.set()
        await asyncio.gather(*(request.future for request in requests))

    asyncio.run(run())
    assert engine.started == [("embed", [64]), ("tag", [3, 5]), ("embed", [4, 6])]


def test_a_request_is_admitted_whole_or_refused(batcher, engine):
    async def run():
        running = batcher.submit("embed", ids(64), LATER)
        await until(lambda: len(engine.started) == 1)
        with pytest.raises(
            Refusal, match="the inputs need at least 1024 rows, more than the 1000 of the whole queue"
        ) as refusal:
            batcher.submit("embed", ids(*[64] * 16), LATER)
        assert (refusal.value.status, refusal.value.retry_after) == (413, None)
        long = batcher.submit("embed", ids(*[60] * 16), LATER)  # one part of it is packed at once, behind the first
        await until(lambda: len(engine.started) == 2)
        with pytest.raises(
            Refusal, match=r"1 requests with 900 rows wait; .* and this one needs at least 120 rows"
        ) as refusal:
            batcher.submit("embed", ids(60, 60), LATER)
        assert refusal.value.status == 429
        assert 1 <= refusal.value.retry_after <= 30
        assert value(batcher.metrics.waiting_rows) == 900
        batcher.submit("embed", ids(60), LATER)
        short = [batcher.submit("embed", ids(1), LATER) for _ in range(18)]
        with pytest.raises(Refusal, match=r"20 requests with .* wait"):
            batcher.submit("embed", ids(1), LATER)
        engine.gate.set()
        await asyncio.gather(running.future, long.future, *(request.future for request in short))
        assert value(batcher.metrics.waiting_rows) == value(batcher.metrics.waiting_requests) == 0

    asyncio.run(run())


def test_requests_that_nobody_waits_for_do_not_run(batcher, engine):
    async def run():
        running = batcher.submit("embed", ids(64), LATER)
        await until(lambda: len(engine.started) == 1)
        gone = batcher.submit("embed", ids(3), LATER)
        late = batcher.submit("embed", ids(5), time.perf_counter() - 1)
        wanted = batcher.submit("embed", ids(7), LATER)
        gone.future.cancel()
        batcher.drop(gone)
        assert value(batcher.metrics.waiting_rows) == 12 + 2 * 0 + sum(late.rows) - 5 + sum(wanted.rows) - 7
        engine.gate.set()
        await asyncio.gather(running.future, wanted.future)
        assert not late.future.done()  # its client is told by the service

    asyncio.run(run())
    assert [lengths for _, lengths in engine.started] == [[64], [7]]
    assert value(batcher.metrics.dropped) == 2
    assert value(batcher.metrics.waiting_rows) == 0


def test_only_the_guilty_request_of_a_failed_batch_fails(batcher, engine, caplog):
    engine.poison = POISON

    async def run():
        running = batcher.submit("embed", ids(64), LATER)
        await until(lambda: len(engine.started) == 1)
        with batcher._changed:
            requests = [batcher.submit("embed", ids(4, seed=seed), LATER) for seed in range(3)]
            requests[1].inputs.ids[2] = POISON
        engine.gate.set()
        return await asyncio.gather(running.future, *(each.future for each in requests), return_exceptions=True)

    results = asyncio.run(run())
    assert [type(result) for result in results] == [np.ndarray, np.ndarray, Refusal, np.ndarray]
    assert results[2].status == 500
    assert "RuntimeError" in results[2].message
    assert "poison" in caplog.text


def test_a_result_that_is_not_finite_is_refused(batcher, engine):
    engine.spoiled = POISON

    async def run():
        requests = [batcher.submit("embed", ids(40 + seed, seed=seed), LATER) for seed in range(2)]
        requests[1].inputs.ids[3] = POISON
        engine.gate.set()
        return await asyncio.gather(*(each.future for each in requests), return_exceptions=True)

    good, bad = asyncio.run(run())
    assert np.isfinite(good).all()
    assert (bad.kind, bad.status) == ("inference", 500)
    assert value(batcher.metrics.nonfinite) == 1


def test_progress_is_watched_only_while_there_is_work(batcher, engine):
    async def run():
        assert batcher.seconds_without_progress() == 0
        request = batcher.submit("embed", ids(5), LATER)
        await asyncio.sleep(0.05)
        assert 0.05 <= batcher.seconds_without_progress() < 60
        engine.gate.set()
        await request.future
        await until(lambda: batcher.seconds_without_progress() == 0)

    asyncio.run(run())


def test_a_batcher_that_closes_finishes_its_work_and_takes_no_more(tiny):
    engine = GatedEngine(tiny)
    batcher = Batcher(engine, Metrics(), max_waiting_rows=1000, max_waiting_requests=20)

    async def run():
        requests = [batcher.submit("embed", ids(50), LATER) for _ in range(4)]
        assert not batcher.close(0.05)
        with pytest.raises(Refusal, match="the server stops"):
            batcher.submit("embed", ids(5), LATER)
        engine.gate.set()
        await asyncio.gather(*(request.future for request in requests))

    asyncio.run(run())
    assert batcher.close(60)


def test_sequences_with_and_without_token_types_share_a_batch():
    (first,) = random_ids([3], seed=1)
    (second,) = random_ids([2], seed=2)
    typed = Ragged(first, np.array([0, 3], np.int32), np.array([0, 1, 1], np.int32))
    plain = Ragged(second, np.array([0, 2], np.int32))
    joined = concatenate([plain, typed])
    np.testing.assert_array_equal(joined.ids, [*second, *first])
    np.testing.assert_array_equal(joined.offsets, [0, 2, 5])
    np.testing.assert_array_equal(joined.types, [0, 0, 0, 1, 1])
    assert concatenate([plain, plain]).types is None
