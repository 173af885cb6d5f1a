"""How calls are timed, and how compilations are counted. Nothing here asserts how long anything takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funnel_benchmarks import measure
from funnel_benchmarks.measure import counting_compilations
from funnel_kernels.errors import FunnelError


def test_a_sample_lasts_long_enough_and_is_of_one_call(monkeypatch):
    now, calls = [0.0], []

    def call():
        calls.append(now[0])
        now[0] += 0.003
        return jnp.zeros(1)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    sample = measure.sampler(call, 0.02)
    calls.clear()
    assert sample() == pytest.approx(0.003)
    assert 7 <= len(calls) <= 9  # 0.02 / 0.003, and a fifth to be sure


def test_a_long_call_is_a_sample_by_itself():
    calls = []
    sample = measure.sampler(lambda: calls.append(1), 0.0)
    calls.clear()
    sample()
    assert len(calls) == 1


def test_calls_are_sampled_in_turns():
    order = []

    def sample(name):
        order.append(name)
        return float(len(order))

    assert measure.in_turns(partial(sample, "a"), partial(sample, "b"), 2) == ([1, 4, 5, 8], [2, 3, 6, 7])
    assert "".join(order) == "abbaabba"
    assert measure.alone(partial(sample, "c"), 2) == [9, 10, 11, 12]


def test_compiling_while_timing_is_an_error():
    sizes = iter(range(2, 20))

    def sample():
        jax.block_until_ready(jax.jit(lambda x: x * 3)(jnp.ones(next(sizes))))
        return 1.0

    with pytest.raises(FunnelError, match=r"\d programs were compiled while timing, and must not be"):
        measure.alone(sample, 1)


def test_a_spread_holds_quartiles_and_samples():
    assert measure.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "low": 2.0,
        "median": 3.0,
        "high": 4.0,
        "samples": [4.0, 1.0, 2.0, 3.0, 5.0],
    }


def test_compilations_are_counted_wherever_they_happen():
    function = jax.jit(lambda x: jnp.sin(x) * 1.625)
    with counting_compilations() as compiled:
        function(np.ones(3, np.float32))
    assert len(compiled) == 1
    with counting_compilations() as compiled:
        function(np.ones(3, np.float32))
    assert not compiled
    with counting_compilations() as compiled:
        function.lower(np.ones(4, np.float32)).compile()
    assert len(compiled) == 1
    function(np.ones(5, np.float32))
    assert len(compiled) == 1  # no longer listening
