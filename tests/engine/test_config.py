"""ModelConfig, FunnelConfig and the layer-by-layer plan of both: what they say and what they refuse."""

import dataclasses
import math

import numpy as np
import pytest

from funnel_engine.config import RECOVERIES, FunnelConfig, LayerStep, ModelConfig, Rope, layer_steps
from funnel_kernels import ConfigError

VALID = {
    "family": "gemma2",
    "vocab_size": 11,
    "hidden_size": 6,
    "intermediate_size": 7,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "layer_types": ("sliding", "full"),
    "query_scale": 0.5,
    "attention": "causal",
    "max_positions": 9,
    "full_rope": Rope(1e6, 8.0),
    "sliding_rope": Rope(1e4),
    "causal_window": (4, 0),
    "bidirectional_window": (2, 2),
}


def model(**changed):
    return ModelConfig(**(VALID | changed))


def test_windows_and_ropes_follow_the_layer_and_the_attention():
    causal, bidirectional = model(), model(attention="bidirectional")
    assert causal.num_layers == 2
    assert (causal.window("full"), causal.window("sliding")) == ((None, 0), (4, 0))
    assert (bidirectional.window("full"), bidirectional.window("sliding")) == ((None, None), (2, 2))
    assert (causal.rope("full"), causal.rope("sliding")) == (Rope(1e6, 8.0), Rope(1e4))


def test_the_attention_can_be_overridden():
    replaced = dataclasses.replace(model(), attention="bidirectional")
    assert replaced.window("sliding") == (2, 2)


@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "max_positions"],
)
@pytest.mark.parametrize("value", [0, -4, 2.0, "8", None, True])
def test_a_size_must_be_a_positive_integer(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r} must be an integer of at least 1"):
        model(**{name: value})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"num_kv_heads": 8}, "num_heads=4 must be a multiple of num_kv_heads=8"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"layer_types": ()}, "at least one layer"),
        ({"layer_types": ("full", "global")}, "layer type='global' is unknown; choose one of full, sliding"),
        ({"attention": "both"}, "attention='both' is unknown; choose one of bidirectional, causal"),
        ({"causal_window": None}, "sliding layers but no window; set sliding_window"),
        ({"bidirectional_window": None}, "sliding layers but no window; set sliding_window"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be a finite number above 0"),
        ({"norm_eps": math.nan}, "norm_eps=nan must be a finite number above 0"),
        ({"query_scale": -1.0}, "query_scale=-1.0 must be a finite number above 0"),
        ({"softcap": 0.0}, "softcap=0.0 must be a finite number above 0"),
        ({"softcap": "50"}, "softcap='50' must be a finite number above 0"),
        ({"norm_eps": True}, "norm_eps=True must be a finite number above 0"),
        ({"post_norms": 1}, "post_norms=1 must be True or False"),
        ({"qk_norm": "no"}, "qk_norm='no' must be True or False"),
        ({"full_rope": (1e4, 1.0)}, r"full_rope=\(10000.0, 1.0\) must be a Rope"),
        ({"sliding_rope": Rope(-1e4)}, "sliding_rope.theta=-10000.0 must be a finite number above 0"),
        ({"softcap": -50.0}, "softcap=-50.0 must be a finite number above 0"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        model(**changed)


def test_a_model_without_sliding_layers_needs_no_window():
    config = model(layer_types=("full", "full"), causal_window=None, bidirectional_window=None)
    assert config.window("full") == (None, 0)


# FunnelConfig


def test_the_default_is_no_funnel():
    funnel = FunnelConfig()
    assert (funnel.strides, funnel.total_stride, funnel.output_stride) == ((), 1, 1)
    assert layer_steps(model(), funnel) == [
        LayerStep(0, "sliding", 1, 1, 1, shares_keys=False),
        LayerStep(1, "full", 1, 1, 1, shares_keys=False),
    ]


def test_after_counts_full_length_layers():
    assert FunnelConfig.after(6) == FunnelConfig((1, 1, 1, 1, 1, 1, 2))
    assert FunnelConfig.after(0, stride=3, pool="mean") == FunnelConfig((3,), pool="mean")


def test_total_stride_and_output_stride():
    funnel = FunnelConfig([1, 2, 1, 3])
    assert funnel.strides == (1, 2, 1, 3)
    assert (funnel.total_stride, funnel.output_stride) == (6, 6)
    recovered = dataclasses.replace(funnel, recovery="tile")
    assert (recovered.total_stride, recovered.output_stride) == (6, 1)


def test_equal_funnels_are_equal_and_hash_alike():
    assert hash(FunnelConfig([1, 2])) == hash(FunnelConfig((1, 2)))


@pytest.mark.parametrize(
    ("text", "funnel"),
    [
        ("none", FunnelConfig()),
        ("6:2", FunnelConfig.after(6)),
        ("0:3/mean", FunnelConfig((3,), pool="mean")),
        ("2:2,8:4/first/last", FunnelConfig((1, 1, 2, 1, 1, 1, 1, 1, 4), pool="first", positions="last")),
        (
            "1:2/mean/mid/keep_first/pool_query_only/mean_last/after_norm",
            FunnelConfig(
                (1, 2),
                pool="mean",
                positions="mid",
                keep_first=True,
                pool_query_only=True,
                recovery="mean_last",
                recovery_site="after_norm",
            ),
        ),
        ("6:2/mean/keep_last", FunnelConfig.after(6, pool="mean", keep_last=True)),
    ],
)
def test_the_short_form_is_read_and_written(text, funnel):
    assert FunnelConfig.parse(text) == funnel
    assert str(funnel) == text


def test_the_options_of_a_short_form_come_in_any_order_and_a_default_may_be_given():
    assert FunnelConfig.parse("1:2/tile/max") == FunnelConfig((1, 2), recovery="tile")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' must be LAYER:STRIDE"),
        ("6", "'6' must be LAYER:STRIDE"),
        ("6:2,", "'' must be LAYER:STRIDE"),
        ("-1:2", "'-1:2' must be LAYER:STRIDE"),
        ("6:" + "9" * 5000, "must be LAYER:STRIDE"),
        ("99999:2", "must be LAYER:STRIDE"),
        ("6:2,6:2", "layers must ascend, but 6 comes after 6"),
        ("6:0", r"strides\[6\]=0"),
        ("6:2/average", "'average' is unknown; options are max, mean"),
        ("6:2/mean/max", "'max' gives pool a second time"),
        ("6:1/tile", "needs a funnel"),
        ("6:2/keep_first/keep_last", "keep_first and keep_last cannot be used together"),
    ],
)
def test_a_short_form_that_is_wrong_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        FunnelConfig.parse(text)


@pytest.mark.parametrize("stride", [0, -1, 2.0, "2", None, True, math.nan])
def test_a_stride_must_be_a_positive_integer(stride):
    with pytest.raises(ConfigError, match=r"strides\[1\]=.* must be an integer of at least 1"):
        FunnelConfig((1, stride))
    with pytest.raises(ConfigError, match=r"strides\[2\]=.* must be an integer of at least 1"):
        FunnelConfig.after(2, stride=stride)


@pytest.mark.parametrize("strides", [2, None, 2.5, True])
def test_strides_must_be_a_sequence(strides):
    with pytest.raises(ConfigError, match="strides"):
        FunnelConfig(strides)


@pytest.mark.parametrize("layers", [-1, 1.0, "2", None, True])
def test_layers_before_the_funnel_must_be_a_count(layers):
    with pytest.raises(ConfigError, match=f"layers={layers!r} must be an integer of at least 0"):
        FunnelConfig.after(layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "min"}, "pool='min' is unknown; choose one of max, mean, first"),
        ({"pool": None}, "pool=None is unknown"),
        ({"pool": ["max"]}, r"pool=\['max'\] is unknown"),
        ({"positions": "middle"}, "positions='middle' is unknown; choose one of first, last, mid, compact"),
        ({"recovery": "sum"}, "recovery='sum' is unknown; choose one of tile, sum_first, .*, max_last"),
        ({"recovery": ""}, "recovery='' is unknown"),
        ({"recovery_site": "after"}, "recovery_site='after' is unknown; choose one of before_norm, after_norm"),
        ({"positions": "compact", "pool_query_only": True}, "'compact' .* use positions 'first', 'last' or 'mid'"),
        ({"pool_query_only": "no"}, "pool_query_only='no' must be True or False"),
        ({"pool_query_only": None}, "pool_query_only=None must be True or False"),
        ({"keep_first": "false"}, "keep_first='false' must be True or False"),
        ({"keep_first": 2}, "keep_first=2 must be True or False"),
        ({"keep_last": 1}, "keep_last=1 must be True or False"),
        (
            {"keep_first": True, "keep_last": True},
            "keep_first and keep_last cannot be used together, .* use keep_last if",
        ),
    ],
)
def test_an_option_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FunnelConfig((1, 2), **options)


def test_values_of_numpy_are_taken_as_those_of_python():
    config = model(num_heads=np.int64(4), qk_norm=np.True_, norm_eps=np.float32(0.5))
    assert [type(value) for value in (config.num_heads, config.qk_norm, config.norm_eps)] == [int, bool, float]
    funnel = FunnelConfig([1, 2, np.int32(3)], keep_first=np.bool_(True), keep_last=np.bool_(False))
    assert [type(value) for value in (*funnel.strides, funnel.keep_first, funnel.keep_last)] == [int] * 3 + [bool] * 2
    assert FunnelConfig.after(np.int64(1), stride=np.int8(2)) == FunnelConfig((1, 2))


def test_options_of_a_funnel_have_names():
    with pytest.raises(TypeError, match="positional"):
        FunnelConfig((1, 2), "mean")


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("strides", [(), (1,), (1, 1, 1)])
def test_a_recovery_without_a_funnel_is_refused(strides, recovery):
    with pytest.raises(ConfigError, match=f"recovery='{recovery}' needs a funnel, but all strides are 1; give a str"):
        FunnelConfig(strides, recovery=recovery)
    FunnelConfig((*strides, 2), recovery=recovery)


# layer_steps


def four_layers(**changed):
    return model(layer_types=("sliding", "full", "sliding", "full"), **changed)


def test_steps_of_two_funnels():
    assert layer_steps(four_layers(), FunnelConfig((1, 2, 1, 3))) == [
        LayerStep(0, "sliding", pool=1, query_stride=1, key_stride=1, shares_keys=False),
        LayerStep(1, "full", pool=2, query_stride=2, key_stride=2, shares_keys=False),
        LayerStep(2, "sliding", pool=1, query_stride=2, key_stride=2, shares_keys=False),
        LayerStep(3, "full", pool=3, query_stride=6, key_stride=6, shares_keys=False),
    ]


def test_with_pool_query_only_the_keys_of_a_pooling_layer_stay_unpooled():
    assert layer_steps(four_layers(), FunnelConfig((2, 3), pool_query_only=True)) == [
        LayerStep(0, "sliding", pool=2, query_stride=2, key_stride=1, shares_keys=False),
        LayerStep(1, "full", pool=3, query_stride=6, key_stride=2, shares_keys=False),
        LayerStep(2, "sliding", pool=1, query_stride=6, key_stride=6, shares_keys=False),
        LayerStep(3, "full", pool=1, query_stride=6, key_stride=6, shares_keys=False),
    ]


@pytest.mark.parametrize("strides", [(1, 1, 1, 1, 2), (1,) * 5, (2,) * 40])
def test_more_strides_than_layers_are_refused(strides):
    with pytest.raises(
        ConfigError, match=f"{len(strides)} strides but the model has only 4 layers; .* after layer 3 at"
    ):
        layer_steps(four_layers(), FunnelConfig(strides))
