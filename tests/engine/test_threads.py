"""How many threads an engine's kernels use: asked for, from OMP_NUM_THREADS, or all."""

import re

import jax
import numpy as np
import pytest

from funnel_engine import ConfigError, FunnelConfig
from funnel_engine.threads import MOST_THREADS, count_threads
from funnel_engine.xla_options import compiler_options
from tiny_models import make_engine

IDS = [[5, 6, 7, 8, 9], [10, 11]]


def test_what_is_asked_for_wins_over_the_environment(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert count_threads(None) == 0
    assert count_threads(3) == 3
    for value, expected in (("2", 2), (" 4 ", 4), ("6,2", 6), ("", 0)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert count_threads(None) == expected
        assert count_threads(1) == 1


def test_numbers_that_are_none(monkeypatch):
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(ConfigError, match="threads="):
            count_threads(wrong)
    for wrong in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv("OMP_NUM_THREADS", wrong)
        with pytest.raises(ConfigError, match=f"OMP_NUM_THREADS='{wrong}' must be an integer from 1 to 1024"):
            count_threads(None)


def test_more_threads_than_the_kernels_ever_use(monkeypatch):
    assert count_threads(MOST_THREADS) == MOST_THREADS
    with pytest.raises(ConfigError, match="threads=1025 must be an integer from 1 to 1024"):
        count_threads(1025)
    monkeypatch.setenv("OMP_NUM_THREADS", "1000000")
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS='1000000' must be an integer from 1 to 1024"):
        count_threads(None)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernels_of_an_engine_are_told(threads):
    engine = make_engine(funnel=FunnelConfig.after(1), threads=threads)
    engine.embed(IDS)
    (forward,) = [program.result() for key, program in engine.programs[0].compiled.items() if key[0] == "forward"]
    told = re.findall(r"threads = (\d+)", forward.as_text())
    assert len(told) > 10
    assert set(told) == {str(threads)}


def test_one_thread_is_one_for_xla_too(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler_options("cpu", threads=1) == {"xla_cpu_multi_thread_eigen": False}
    assert compiler_options("cpu", threads=2) == {}
    jax.jit(lambda x: x + 1).lower(np.ones(3)).compile(compiler_options=compiler_options("cpu", threads=1))


def test_two_engines_of_different_threads_live_side_by_side():
    one, two = (make_engine(threads=threads) for threads in (1, 2))
    vectors = [engine.embed(IDS) for engine in (one, two, one, two)]
    assert all((other == vectors[0]).all() for other in vectors[1:])
