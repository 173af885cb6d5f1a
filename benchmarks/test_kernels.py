"""The cases of `funnel bench kernels` under pytest-benchmark: `pytest benchmarks --benchmark-only`.

Gemma 2B's sizes, 2 x 512 tokens, bfloat16. `extra_info` of a result has the work of a call, and the share that it
reaches of the ceiling that bounds it.
"""

import jax
import numpy as np
import pytest

from funnel_benchmarks.kernels.allocator import keep_freed_memory
from funnel_benchmarks.kernels.cases import Sizes, cases
from funnel_benchmarks.kernels.ceilings import ceilings
from funnel_benchmarks.kernels.suite import backends_here, bound
from funnel_benchmarks.models import preset_model

DTYPE = "bfloat16"
SIZES = Sizes(preset_model("gemma-2b", DTYPE, depth=4), np.full(2, 512, np.int32))


@pytest.fixture(scope="session")
def measured_ceilings():
    keep_freed_memory()
    with ceilings(DTYPE) as measured:
        yield measured


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("case", cases(SIZES), ids=lambda case: case.name)
def test_kernel(benchmark, case, backend, measured_ceilings):
    call = case.make(backend)
    benchmark.pedantic(lambda: jax.block_until_ready(call()), warmup_rounds=1, rounds=5)
    ceiling, work = bound(case, measured_ceilings)
    seconds = work / ceiling.work * ceiling.sample()
    share = seconds / benchmark.stats.stats.median
    benchmark.extra_info.update(flops=case.flops, bytes=case.bytes, bound=ceiling.name, share=share)
