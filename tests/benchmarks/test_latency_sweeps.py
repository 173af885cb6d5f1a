"""The ready-made sweeps, and their savings beside the paper's."""

import dataclasses

import pytest

from funnel_benchmarks.funnels import funnel_name
from funnel_benchmarks.latency.command import SWEEPS, sweep_batches, sweep_funnels
from funnel_benchmarks.latency.suite import Batch, Suite, beside_paper
from funnel_benchmarks.models import preset_model
from funnel_engine import FunnelConfig
from funnel_engine.config import RECOVERIES
from funnel_engine.flops import ideal_ratio


@pytest.mark.parametrize(("name", "layers", "places"), [("gemma-2b", 18, (2, 8, 14)), ("gemma-7b", 28, (2, 14, 20))])
def test_a_sweep_has_every_kind_of_funnel(name, layers, places):
    model = preset_model(name, None)
    assert (name in SWEEPS, model.config.num_layers) == (True, layers)
    funnels = sweep_funnels(layers)
    names = [funnel_name(funnel) for funnel in funnels]
    assert len(set(names)) == len(names)
    first, middle, late = places
    expected = [f"{stride}:1 after {layer}" for stride in (2, 4) for layer in range(2, layers, 2)]
    expected += [f"2:1 after {first}, 2:1 after {middle}", f"2:1 after {middle}, 2:1 after {late}"]
    expected += [f"2:1 after {layer}, pool_query_only" for layer in places]
    expected += [f"2:1 after {middle}, recovery {recovery}" for recovery in RECOVERIES]
    assert names == expected
    Suite(model=model, funnels=funnels, batches=sweep_batches(False), backend="auto", repeats=1)  # it fits the model


def test_batches_have_as_many_tokens_at_every_length():
    assert [batch.name for batch in sweep_batches(False)] == ["16 x 512 tokens", "2 x 4096 tokens", "1 x 8192 tokens"]
    assert [batch.name for batch in sweep_batches(True)] == ["1 x 512 tokens"]


def test_a_quick_sweep_takes_two_cores_a_quarter_of_an_hour():
    """By its work: two calls to warm up and A B B A for each funnel, at the rate of 6 s for 512 tokens."""
    (batch,) = sweep_batches(True)
    config = preset_model("gemma-2b", None).config
    funnels = sum(4 * ideal_ratio(config, funnel, batch.lengths) + 2 for funnel in sweep_funnels(18))
    assert 12 * 60 < 6 * funnels < 18 * 60


def test_the_first_layers_of_a_preset_keep_their_keys():
    assert preset_model("gemma4-e2b", None, depth=17).config.kv_shared_layers == 2
    assert preset_model("gemma4-e2b", None, depth=5).config.kv_shared_layers == 0


def row(funnel: FunnelConfig, saving: float, batch: str = "2 x 512 tokens"):
    return {
        "funnel": {"name": funnel_name(funnel), **dataclasses.asdict(funnel)},
        "batch": {"name": batch},
        "saving_percent": saving,
    }


def content(*rows, layers=18):
    return {"options": {"model": {"layers": layers}}, "rows": list(rows)}


def test_the_papers_places_are_put_beside_ours():
    rows = [row(FunnelConfig.after(layer), saving) for layer, saving in ((2, 43.21), (8, 26.0), (16, 5.04))]
    long = row(FunnelConfig.after(2), 48.0, "1 x 8192 tokens")
    assert beside_paper(content(*rows, long)) == [
        "43.2 % after layer 2 (paper: 44 %), 5.0 % after layer 16 (paper: about 5 %); 2 x 512 tokens",
        "48.0 % after layer 2 (paper: 44 %); 1 x 8192 tokens",
    ]


def test_what_the_paper_has_not_measured_is_put_beside_nothing():
    others = [
        FunnelConfig.after(2, stride=4),
        FunnelConfig((1, 1, 2, 2)),
        FunnelConfig.after(2, pool="mean"),
        FunnelConfig.after(2, recovery="tile"),
        FunnelConfig.after(16, pool_query_only=True),
        FunnelConfig.after(8),
    ]
    assert beside_paper(content(*(row(funnel, 40.0) for funnel in others))) == []
    assert beside_paper(content(row(FunnelConfig.after(2), 40.0), layers=28)) == []


def test_a_batch_of_drawn_lengths_says_where_they_are_from():
    batch = Batch(sweep_batches(True)[0].lengths.repeat(2), "by hand")
    assert batch.name == "2 x 512 tokens"
    batch.lengths[0] = 3
    assert batch.name == "2 sequences of 3 to 512 tokens, 515 in all: by hand"
