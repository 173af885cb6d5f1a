"""Arrivals against the properties of a Poisson process; the server against examples by hand and queueing theory."""

import numpy as np
import pytest
from scipy import stats

from funnel_benchmarks.serve.requests import ARRIVALS_SEED, IDS_SEED, LENGTHS_SEED, Requests, poisson_arrivals
from funnel_benchmarks.serve.server import serve
from funnel_kernels.errors import ConfigError, InputError

COUNT = 40_000


class Clock:
    """Time that passes only when somebody sleeps or works."""

    def __init__(self, shortened: float = 1.0):
        self.now, self.shortened, self.slept = 1000.0, shortened, 0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept += 1
        self.now += max(self.shortened * seconds, 1e-6)


def simulate(arrivals, sizes, budget, service, clock=None):
    """Serves with `service(first, stop)` seconds a batch; also what was embedded, and when it began."""
    clock, calls = clock or Clock(), []
    begin = clock.now

    def embed(first, stop):
        calls.append((first, stop, clock.now - begin))
        clock.now += service(first, stop)

    served = serve(np.array(arrivals, float), np.array(sizes), budget, embed, clock=clock, sleep=clock.sleep)
    return served, calls


def test_gaps_are_exponential_and_independent():
    gaps = np.diff(poisson_arrivals(5.0, COUNT), prepend=0.0)
    assert gaps.min() > 0
    assert stats.kstest(gaps, stats.expon(scale=1 / 5).cdf).pvalue > 0.01
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 3 / np.sqrt(COUNT)


def test_counts_in_windows_have_the_mean_and_variance_of_a_poisson_variable():
    rate, window = 5.0, 2.0
    arrivals = poisson_arrivals(rate, COUNT)
    counts = np.histogram(arrivals, np.arange(0, arrivals[-1] - window, window))[0]
    deviation = np.sqrt(rate * window / len(counts))
    assert counts.mean() == pytest.approx(rate * window, abs=3 * deviation)
    assert counts.var() == pytest.approx(rate * window, rel=3 * np.sqrt(2 / len(counts)))


def test_a_seed_says_which_arrivals_and_the_rate_how_close_they_are():
    first = poisson_arrivals(1.0, COUNT, seed=3)
    np.testing.assert_array_equal(first, poisson_arrivals(1.0, COUNT, seed=3))
    np.testing.assert_allclose(poisson_arrivals(4.0, COUNT, seed=3), first / 4, rtol=1e-12)
    other = poisson_arrivals(1.0, COUNT, seed=4)
    assert abs(np.corrcoef(np.diff(first), np.diff(other))[0, 1]) < 3 / np.sqrt(COUNT)


def test_times_of_arrival_tell_nothing_of_lengths():
    lengths = Requests("passage", COUNT, 100).lengths
    gaps = np.diff(poisson_arrivals(1.0, COUNT), prepend=0.0)
    assert len({ARRIVALS_SEED, IDS_SEED, LENGTHS_SEED}) == 3  # the first numbers from one seed would go together
    assert abs(stats.spearmanr(gaps, lengths).statistic) < 3 / np.sqrt(COUNT)


def test_requests_are_taken_as_an_engine_wants_them(tmp_path):
    (tmp_path / "mine.txt").write_text("2\n5\n7\n")
    requests = Requests(str(tmp_path / "mine.txt"), 6, 50)
    assert requests.name == "mine.txt"
    ids, offsets = requests.take(2, 5)
    np.testing.assert_array_equal(np.diff(offsets), requests.lengths[2:5])
    assert (offsets[0], offsets[-1], offsets.dtype) == (0, len(ids), np.int32)
    start = requests.lengths[:2].sum()
    all_ids, _ = requests.inputs
    np.testing.assert_array_equal(ids, all_ids[start : start + len(ids)])
    assert len(set(all_ids.tolist())) > 10
    assert all_ids.max() < 50
    assert requests.facts() == {
        "name": "mine.txt",
        "source": "file mine.txt",
        "tokens": int(requests.lengths.sum()),
        "shortest": int(requests.lengths.min()),
        "median": float(np.median(requests.lengths)),
        "longest": int(requests.lengths.max()),
    }


@pytest.mark.parametrize(
    ("source", "count", "error", "message"),
    [("conll", 0, ConfigError, "requests=0"), ("novels", 5, InputError, "'novels' is neither .* conll, sst2")],
)
def test_requests_that_cannot_be_drawn_are_refused(source, count, error, message):
    with pytest.raises(error, match=message):
        Requests(source, count, 100)


def test_an_example_by_hand():
    """Two requests fit into a batch, which takes 2 s. The second and third come during the first, and so does the
    fourth, for which the next batch has no room; before the last one the server sleeps."""
    served, calls = simulate([0.0, 1.0, 1.5, 2.0, 10.0], [3] * 5, 6, lambda first, stop: 2.0)
    assert calls == [(0, 1, 0.0), (1, 3, 2.0), (3, 4, 4.0), (4, 5, 10.0)]
    np.testing.assert_allclose(served.latencies, [2.0, 3.0, 2.5, 4.0, 2.0])
    assert served.batches.tolist() == [1, 2, 1, 1]
    assert (served.busy, served.seconds) == (8.0, 12.0)


def test_a_batch_holds_what_arrived_by_then_in_order_and_no_more_than_the_budget():
    generator = np.random.default_rng(1)
    arrivals, sizes = poisson_arrivals(10.0, 2000), generator.integers(1, 60, 2000)
    served, calls = simulate(arrivals, sizes, 64, lambda first, stop: 0.02 + 0.002 * sizes[first:stop].sum())
    assert [first for first, _, _ in calls] == [0, *(stop for _, stop, _ in calls[:-1])]
    assert calls[-1][1] == 2000
    full = 0
    for first, stop, now in calls:
        assert sizes[first:stop].sum() <= 64
        assert arrivals[stop - 1] <= now
        more = stop < 2000 and arrivals[stop] <= now  # waits already: then only the budget keeps it out
        full += more
        assert not more or sizes[first : stop + 1].sum() > 64
    assert 100 < full < len(calls)
    assert len(served.batches) == len(calls)


def test_a_slow_server_does_not_delay_arrivals():
    """Arrivals every second, 2 s of work each: the queue grows, and so does latency."""
    served, _ = simulate(np.arange(50), [1] * 50, 1, lambda first, stop: 2.0)
    np.testing.assert_allclose(served.latencies, 2.0 * np.arange(1, 51) - np.arange(50))
    assert served.seconds == served.busy == 100.0


def test_all_there_at_once_are_full_batches():
    served, _ = simulate(np.zeros(10), [2] * 10, 7, lambda first, stop: float(stop - first))
    assert served.batches.tolist() == [3, 3, 3, 1]
    np.testing.assert_allclose(served.latencies, [3, 3, 3, 6, 6, 6, 9, 9, 9, 10])


def test_a_sleep_that_ends_early_is_gone_on_with():
    clock = Clock(shortened=0.5)
    served, calls = simulate([8.0], [1], 1, lambda first, stop: 1.0, clock)
    assert clock.slept > 5
    assert calls[0][2] >= 8.0
    assert served.latencies[0] == pytest.approx(1.0, abs=1e-3)


def test_waiting_of_one_at_a_time_is_that_of_pollaczek_and_khinchine():
    """M/D/1: with service time s at load r, the mean waiting time is r * s / (2 * (1 - r))."""
    count, service, load = 60_000, 0.5, 0.6
    arrivals = poisson_arrivals(load / service, count)
    served, _ = simulate(arrivals, [1] * count, 1, lambda first, stop: service)
    waiting = served.latencies - service
    assert waiting.mean() == pytest.approx(load * service / (2 * (1 - load)), rel=0.03)
    assert (waiting < 1e-5).mean() == pytest.approx(1 - load, abs=0.01)  # who finds the server idle
    assert served.busy / served.seconds == pytest.approx(load, rel=0.02)
