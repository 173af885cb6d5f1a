"""The part of the grid that a simulated TPU gets: it is smaller, and leaves no value of an option out."""

import dataclasses

import pytest

from option_grid import CASES, SIMULATED, SMALL, refuses


@pytest.mark.parametrize("op", SIMULATED)
def test_every_value_of_every_option_is_simulated(op):
    values = []
    for cases in (CASES[op], SIMULATED[op]):
        served = [dataclasses.asdict(case) for case in cases.values() if not refuses(op, "tpu", case)]
        values.append({(name, str(value)) for case in served for name, value in case.items()})
    assert values[0] - values[1] <= {("layout", str(dataclasses.asdict(SMALL)))}
    assert len(SIMULATED[op]) <= len(CASES[op]) / 3
