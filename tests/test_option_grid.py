"""The parts of the grid that an interpreted backend gets are smaller, and leave no value of an option out."""

import dataclasses

import pytest

from option_grid import CASES, SIMULATED, SMALL, cases_of, each_value_once, refuses


def values(op, cases, backend):
    served = [dataclasses.asdict(case) for case in cases if not refuses(op, backend, case)]
    return {(name, str(value)) for case in served for name, value in case.items()}


@pytest.mark.parametrize("op", SIMULATED)
def test_every_value_of_every_option_is_simulated(op):
    left_out = values(op, CASES[op].values(), "tpu") - values(op, SIMULATED[op].values(), "tpu")
    assert left_out <= {("layout", str(dataclasses.asdict(SMALL)))}
    assert len(SIMULATED[op]) <= len(CASES[op]) / 3


@pytest.mark.parametrize("backend", ["reference", "xla", "triton", "tpu"])
@pytest.mark.parametrize("op", SIMULATED)
def test_every_value_of_every_option_is_in_the_default_run(op, backend):
    cases = list(cases_of(op, backend))
    default = [case for _, case, is_default in cases if is_default]
    assert values(op, default, backend) == values(op, [case for _, case, _ in cases], backend)
    assert len(default) < len(cases) or (op, backend) == ("attention", "tpu")  # where each case is a layout


@pytest.mark.parametrize("op", CASES)
def test_the_kernels_for_cpus_get_the_whole_grid_by_default(op):
    """But for weights of float8, which they refuse."""
    cases = [case for case in CASES[op].values() if getattr(case, "weights", None) != "float8_e4m3fn"]
    assert [case for _, case, is_default in cases_of(op, "cpu") if is_default] == cases


def test_every_value_of_independent_options_is_in_the_default_run():
    (names, parameters) = each_value_once(number=(1, 2, 3), letter="ab").args
    assert names == ("number", "letter")
    assert [each.values for each in parameters] == [(1, "a"), (1, "b"), (2, "a"), (2, "b"), (3, "a"), (3, "b")]
    assert [each.values for each in parameters if not each.marks] == [(1, "a"), (2, "b"), (3, "a")]
