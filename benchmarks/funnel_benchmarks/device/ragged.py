"""What a token of ragged sequences costs, against a token of equal ones.

Both batches have the same number of tokens, which is a bucket's size: what rounding up to a bucket costs is not in it.
"""

from collections.abc import Iterator
from functools import partial

from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.layouts import up_to
from funnel_benchmarks.device.part import CELL, Part, against_goal
from funnel_benchmarks.lengths import draw
from funnel_benchmarks.measure import in_turns, spread
from funnel_benchmarks.results import Measurement, Row
from funnel_benchmarks.statistics import quartiles
from funnel_benchmarks.suite import Column, field

NAMES = ("conll", "passage")
GOAL = 0.85  # of the equal lengths' rate


def cells(bench: Bench) -> Iterator[Measurement]:
    for name in NAMES:
        yield name, partial(measure, bench, name)


def measure(bench: Bench, name: str) -> Row:
    equal, tokens = bench.equal_lengths, bench.sizes.tokens
    ragged = up_to(tokens, draw(name, tokens, bench.seed))
    of_equal, of_ragged = (bench.sampler(bench.embedding(lengths)) for lengths in (equal, ragged))
    equal_samples, samples = in_turns(of_equal, of_ragged, bench.sizes.repeats)
    rates = [tokens / quartiles(each).median for each in (samples, equal_samples)]
    return {
        "sequences": len(ragged),
        "tokens": tokens,
        "seconds": spread(samples),
        "equal_seconds": spread(equal_samples),
        "tokens_per_second": rates[0],
        "equal_tokens_per_second": rates[1],
        "share": rates[0] / rates[1],
        "goal": GOAL,
    }


class Ragged(Part):
    name = "device ragged"
    title = "Ragged sequences"
    note = "Both batches have the same number of tokens, which is a bucket's size."
    columns = (
        CELL,
        Column("sequences", field("sequences", ",d")),
        Column("tokens", field("tokens", ",d")),
        Column("tokens/s", field("tokens_per_second", ",.0f")),
        Column("equal lengths", field("equal_tokens_per_second", ",.0f"), "tokens/s"),
        Column("share", against_goal("share")),
    )
    measurements = staticmethod(cells)
