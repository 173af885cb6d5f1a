"""The grid of funnels, and what they cost without being run."""

import dataclasses

import numpy as np
import pytest

from funnel_engine import FunnelConfig
from funnel_engine.config import layer_steps
from funnel_engine.flops import forward_flops, layer_flops
from funnel_engine.packing import make_plan, pack
from funnel_engine.presets import preset
from funnel_training.candidates import computed_flops, depths, grid, pools_more
from tiny_models import CONFIG

parse = FunnelConfig.parse


def test_the_grid_of_a_model_has_about_200_funnels():
    funnels = grid(18)
    assert len(set(funnels)) == len(funnels) == 207
    assert depths(18) == [2, 5, 8, 11, 14, 17]
    assert parse("14:2/mean") in funnels
    assert parse("2:8/keep_first") in funnels
    assert parse("2:2,11:2/mean") in funnels
    assert all(parse(str(funnel)) == funnel for funnel in funnels)


def test_the_grid_of_a_model_that_reads_the_last_token_keeps_it_alone():
    funnels, others = grid(18, reads_last=True), grid(18)
    assert parse("2:8/keep_last") in funnels
    mirrored = [dataclasses.replace(funnel, keep_first=False, keep_last=funnel.keep_first) for funnel in others]
    assert funnels == mirrored


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 26])
def test_a_grid_fits_its_model(layers):
    for funnel in grid(layers, recovery="mean_last"):
        assert len(funnel.strides) <= layers
        assert funnel.recovery == "mean_last"
        assert funnel.total_stride > 1


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, per_layer_width=7)], ids=["", "per layer"])
def test_padding_is_computed_too(config):
    """Against the rows of a packed batch, none of which is empty at the end."""
    lengths = np.random.default_rng(0).integers(1, 40, 25).astype(np.int32)
    for funnel in map(parse, ("1:2/mean", "1:4/keep_first", "1:2,2:2/keep_last", "1:2,2:2/mean/pool_query_only")):
        plan = make_plan(config, funnel)
        rows = int(plan.rows_needed(lengths).sum())
        batch = pack(plan, np.zeros(lengths.sum(), np.int32), np.concatenate([[0], np.cumsum(lengths)]), rows)
        pairs = {key: int((interval.hi - interval.lo).sum()) for key, interval in batch.intervals.items()}
        expected = sum(
            layer_flops(
                config,
                step,
                tokens=rows,
                queries=rows // step.query_stride,
                keys=rows // step.key_stride,
                pairs=pairs[step.query_stride, step.key_stride, step.layer_type],
            )
            for step in layer_steps(config, funnel)
        )
        assert computed_flops(config, funnel, lengths) == expected > forward_flops(config, funnel, lengths)
    assert computed_flops(config, FunnelConfig(), lengths) == forward_flops(config, FunnelConfig(), lengths)


def test_short_texts_gain_nothing_from_a_large_stride():
    config, lengths = preset("gemma-2b"), np.full(10, 9, np.int32)
    exact = forward_flops(config, FunnelConfig(), lengths)
    assert computed_flops(config, parse("14:8/keep_first"), lengths) > exact
    assert computed_flops(config, parse("2:2/mean"), lengths) < exact


@pytest.mark.parametrize(
    ("funnel", "other", "expected"),
    [
        ("6:4/mean", "6:2/mean", True),
        ("2:2/mean", "6:2/mean", True),
        ("2:2,6:2/mean", "6:2/mean", True),
        ("2:2,6:2/mean", "2:2/mean", True),
        ("6:4/mean/mean_last", "6:2/mean/mean_last", True),
        ("6:4/mean/mean_last", "6:2/mean", False),
        ("6:2/mean", "6:2/mean", False),
        ("6:2/mean", "6:4/mean", False),
        ("6:4/mean", "2:2/mean", False),  # more at the end, but less before
        ("6:4/mean", "6:2", False),
        ("6:4/mean/keep_first", "6:2/mean", False),
    ],
)
def test_which_of_two_funnels_pools_more(funnel, other, expected):
    assert pools_more(parse(funnel), parse(other)) is expected
