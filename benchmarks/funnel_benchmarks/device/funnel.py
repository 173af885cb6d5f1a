"""What a funnel saves: the funneled engine against the same engine without it, in turns, and against the ideal."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from funnel_benchmarks.device import plots
from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.part import CELL, MILLISECONDS, RATIO, WITHOUT, Part, against_goal
from funnel_benchmarks.funnels import NO_FUNNEL
from funnel_benchmarks.measure import in_turns, spread
from funnel_benchmarks.results import Measurement, Row
from funnel_benchmarks.statistics import quartiles, ratio
from funnel_benchmarks.suite import Column, Plot, field
from funnel_engine import FunnelConfig
from funnel_engine.flops import ideal_ratio

GOAL = 0.97  # ideal ratio over measured ratio


def cells(bench: Bench) -> Iterator[Measurement]:
    for layer in bench.sizes.funnel_layers:  # both batches of a layer run in one compiled program
        for sequences, tokens in bench.sizes.batches:
            name = f"{sequences} x {tokens} tokens, after layer {layer}"
            yield name, partial(measure, bench, sequences, tokens, layer)


def measure(bench: Bench, sequences: int, tokens: int, layer: int) -> Row:
    lengths, funnel = np.full(sequences, tokens, np.int32), FunnelConfig.after(layer)
    without, with_funnel = (bench.sampler(bench.embedding(lengths, each)) for each in (NO_FUNNEL, funnel))
    baseline, funneled = in_turns(without, with_funnel, bench.sizes.repeats)
    measured = ratio(quartiles(funneled), quartiles(baseline))
    ideal = ideal_ratio(bench.sizes.config, funnel, lengths)
    return {
        "batch": f"{sequences} x {tokens}",
        "layer": layer,
        "seconds": spread(funneled),
        "baseline_seconds": spread(baseline),
        "ratio": measured._asdict(),
        "ideal_ratio": ideal,
        "efficiency": ideal / measured.median,
        "goal": GOAL,
    }


class Funnel(Part):
    name = "device funnel"
    title = "Funnels"
    note = (
        "The same engine with the funnel and without it, in turns. Efficiency is the ideal ratio of operations over "
        "the measured ratio of times."
    )
    columns = (
        CELL,
        MILLISECONDS,
        WITHOUT,
        RATIO,
        Column("ideal", field("ideal_ratio", ".3f")),
        Column("efficiency", against_goal("efficiency")),
    )
    measurements = staticmethod(cells)

    @classmethod
    def plots(cls, content: Row) -> list[Plot]:
        caption = "Latency ratio over the place of the funnel, measured and ideal"
        drawn = Plot(partial(plots.funnel, content), f"{caption}; the table has the same figures.", caption)
        return [drawn] if content["rows"] else []
