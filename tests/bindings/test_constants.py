"""What Python and C++ both have to know: the compiled module says its values, and they are the same."""

import pytest

import funnel_native
from funnel_engine.threads import MOST_THREADS
from funnel_kernels.linear.reference import GROUP
from funnel_kernels.pool_norm import POOLS
from funnel_kernels.recover_norm import MODES

PAIRS = {
    "GROUP": GROUP,
    "INSTRUCTION_SETS": funnel_native.INSTRUCTION_SETS,
    "LIMIT": funnel_native.LIMIT,
    "MODES": MODES,
    "MOST_THREADS": MOST_THREADS,
    "POOLS": POOLS,
}


@pytest.mark.parametrize(("name", "value"), PAIRS.items(), ids=PAIRS)
def test_python_and_the_module_agree(name, value):
    assert getattr(funnel_native.handlers(), name) == value


def test_every_constant_of_the_module_is_paired_or_taken_from_it():
    constants = {name for name in vars(funnel_native.handlers()) if name.isupper()}
    assert constants == {*PAIRS, "UNIT"}
