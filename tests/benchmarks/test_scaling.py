"""The points of each axis; exponents against exact power laws and known noise; memory that is used and given back."""

import numpy as np
import pytest

from funnel_benchmarks.measure import spread
from funnel_benchmarks.scaling import peak_memory
from funnel_benchmarks.scaling.axes import AXES, points
from funnel_benchmarks.scaling.peak_memory import watched_memory
from funnel_benchmarks.scaling.slopes import growths, log_log_slope


def shapes(axis, **options):
    given = {"layers": 24, "most_tokens": 16384, "cores": 8} | options
    found = points(axis, **given)
    assert all(point.axis == axis for point in found)
    return [(point.x, point.sequences, point.tokens, point.layers) for point in found]


def test_every_axis_grows_in_its_own_direction():
    assert shapes("tokens") == [(tokens, 1, tokens, 24) for tokens in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)]
    assert shapes("batch") == [(count, count, 512, 24) for count in (1, 2, 4, 8, 16)]
    assert shapes("depth") == [(depth, 2, 512, depth) for depth in (1, 7, 12, 18, 24)]
    counts = (1, 2, 4, 8, 16, 32, 64, 128)
    assert shapes("split") == [(count, count, 4096 // count, 24) for count in counts]
    assert shapes("threads") == [(1, 2, 512, 24), (8, 2, 512, 24)]
    assert shapes("engines") == [(1, 2, 512, 24), (2, 2, 512, 24)]


def test_threads_and_engines_differ_in_nothing_but_their_number():
    sizes = {"layers": 24, "most_tokens": 16384, "cores": 8}
    assert [(point.threads, point.engines, point.calls) for point in points("threads", **sizes)] == [
        (1, 1, 1),
        (8, 1, 1),
    ]
    assert [(point.threads, point.engines, point.calls) for point in points("engines", **sizes)] == [
        (None, 1, 2),
        (None, 2, 2),
    ]
    assert len(points("threads", **sizes | {"cores": 1})) == 1


def test_small_models_and_small_batches_have_fewer_points():
    assert [x for x, *_ in shapes("depth", layers=3)] == [1, 2, 3]
    assert shapes("depth", layers=1) == [(1, 2, 512, 1)]
    assert [x for x, *_ in shapes("tokens", most_tokens=1000)] == [128, 256, 512]
    assert shapes("batch", most_tokens=1000) == [(count, count, 32, 24) for count in (1, 2, 4, 8, 16)]
    assert shapes("split", most_tokens=128) == [(1, 1, 128, 24), (2, 2, 64, 24), (4, 4, 32, 24)]
    for axis in AXES:
        for point in points(axis, layers=24, most_tokens=1000, cores=2):
            assert point.lengths.sum() <= 1000


def test_points_have_names_of_their_own():
    names = [point.name for axis in AXES for point in points(axis, layers=24, most_tokens=16384, cores=8)]
    assert len(set(names)) == len(names) == 30
    assert names[0] == "tokens 128: 1 x 128 tokens, 24 layers"


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 2.25])
def test_an_exact_power_law_has_its_exponent_for_certain(exponent):
    x = [128, 256, 512, 4096]
    slope = log_log_slope(x, [3e-5 * size**exponent for size in x])
    assert slope == pytest.approx((exponent,) * 3, abs=1e-9)


def test_a_slope_and_its_interval_by_hand():
    """Logarithms x = -1, 0, 1 and y = -1, 0.3, 0.7: slope 0.85, residuals 0.15 * (-1, 2, -1), t = 12.706."""
    slope = log_log_slope(np.exp([-1.0, 0.0, 1.0]), np.exp([-1.0, 0.3, 0.7]))
    error = np.sqrt(6 * 0.15**2 / 1 / 2)
    assert slope == pytest.approx((0.85 - 12.7062 * error, 0.85, 0.85 + 12.7062 * error), rel=1e-5)


def test_the_interval_holds_the_true_exponent_as_often_as_it_says():
    generator, x, draws = np.random.default_rng(3), np.array([128, 256, 512, 1024, 4096]), 3000
    held = 0
    for noise in generator.lognormal(sigma=0.1, size=(draws, len(x))):
        low, _, high = log_log_slope(x, 2e-4 * x**1.3 * noise)
        held += low <= 1.3 <= high
    assert 0.93 <= held / draws <= 0.97


def row(axis, x, seconds, work):
    return {
        "axis": axis,
        "x": x,
        "seconds": spread([seconds] * 3),
        "baseline_seconds": spread([2 * seconds] * 3),
        "flops": work,
        "baseline_flops": 2 * work,
    }


def power_law(axis, seconds, work, sizes=(1, 2, 4, 8)):
    return [row(axis, x, 0.1 * x**seconds, 1e9 * x**work) for x in sizes]


def test_a_cost_that_grows_faster_than_its_work_is_flagged():
    rows = [*power_law("tokens", 2.4, 2.0), *power_law("batch", 1.0, 1.0), *power_law("depth", 0.7, 1.0)]
    found = list(growths(rows[::-1]))
    assert [(growth.axis, growth.engine) for growth in found[::2]] == [
        ("depth", "with funnel"),
        ("batch", "with funnel"),
        ("tokens", "with funnel"),
    ]
    assert [growth.engine for growth in found[1::2]] == ["no funnel"] * 3
    assert [growth.flagged for growth in found] == [False] * 4 + [True] * 2
    for growth in found[4:]:
        exponents = [slope.exponent for slope in (growth.seconds, growth.work, growth.seconds_over_work)]
        assert exponents == pytest.approx([2.4, 2.0, 1.2])


def test_a_steep_but_uncertain_exponent_is_not_flagged():
    rows = power_law("tokens", 1.2, 1.0)
    rows[1]["seconds"] = spread([3 * rows[1]["seconds"]["median"]])
    funnel, baseline = growths(rows)
    assert funnel.seconds_over_work.exponent > 1
    assert not funnel.flagged
    assert baseline.flagged


def test_the_figures_of_each_engine_are_its_own():
    rows = power_law("tokens", 1.0, 1.0)
    for each in rows:
        each["baseline_seconds"] = spread([each["x"] ** 1.5])
    assert [growth.seconds.exponent for growth in growths(rows)] == pytest.approx([1.0, 1.5])


def test_too_few_points_or_hardly_any_growth_have_no_exponent():
    assert not list(growths(power_law("tokens", 1.0, 1.0, sizes=(1, 8))))
    assert not list(growths(power_law("split", -0.5, -0.3)))  # 8 ** -0.3 is more than a half
    assert not list(growths([row("engines", x, 0.1, 1e9) for x in (1, 2, 3)]))
    assert len(list(growths(power_law("split", -0.5, -0.4)))) == 2


BALLAST = 25_000_000  # of eight bytes: 200 MB


def test_memory_sees_what_was_in_use_in_the_block_only():
    with watched_memory() as peaks:
        np.ones(BALLAST)
    assert peaks["process"] - peaks["before"] == pytest.approx(8 * BALLAST, abs=2e7)
    np.ones(BALLAST)  # an earlier cell
    with watched_memory() as peaks:
        np.ones(1000)
    assert peaks["process"] - peaks["before"] < 2e7


def test_memory_that_the_c_library_keeps_is_given_back():
    """Small blocks stay with malloc when they are freed; without being asked for them they would count as before."""
    with watched_memory() as empty:
        pass
    kept = [bytes(1000 + index % 7) for index in range(100_000)]
    with watched_memory() as full:
        pass
    assert full["before"] - empty["before"] > 9e7
    last = kept[-1]  # lies above the others, so that the heap does not shrink by itself
    del kept
    with watched_memory() as after:
        pass
    assert after["before"] - empty["before"] < 3e7
    assert len(last) >= 1000


def test_where_the_system_does_not_tell_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "PROCESS", tmp_path / "nowhere")
    with watched_memory() as peaks:
        np.ones(1000)
    assert peaks == {}


def test_a_device_s_own_count_is_taken(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 77}

    monkeypatch.setattr(peak_memory.jax, "local_devices", lambda: [Device()])
    with watched_memory() as peaks:
        pass
    assert peaks["device"] == 77
