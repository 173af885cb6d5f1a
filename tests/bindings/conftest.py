"""What the tests of the kernels in C++ share."""

import pytest

import funnel_native

SETS = funnel_native.INSTRUCTION_SETS
assert funnel_native.problem() is None  # registers them with JAX, whichever test comes first
HANDLERS = funnel_native.handlers()
BEST = HANDLERS.instruction_set()


@pytest.fixture(params=SETS[: SETS.index(BEST) + 1])
def instruction_set(request):
    """Each instruction set up to this machine's best; the kernels run with it, also in programs compiled before."""
    assert HANDLERS.limit_instruction_set(request.param)
    yield request.param
    HANDLERS.limit_instruction_set(BEST)
