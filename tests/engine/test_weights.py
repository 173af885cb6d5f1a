"""Names and shapes of the weights, the tree that the model reads, and random weights."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from funnel_engine import BackendUnavailable, ConfigError, Engine
from funnel_engine.config import FunnelConfig, ModelConfig, Rope
from funnel_engine.heads import DenseConfig, HeadConfig
from funnel_engine.weights import count_parameters, expected_shapes, nest, prepare_weight, random_weights
from funnel_kernels import PackedWeight, native_calls
from option_grid import packed_weight, target

GEMMA_1 = ModelConfig(
    family="gemma",
    vocab_size=13,
    hidden_size=10,
    intermediate_size=7,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    layer_types=("full", "full"),
    query_scale=0.5,
    attention="causal",
    max_positions=9,
    full_rope=Rope(1e4),
    sliding_rope=Rope(1e4),
)
GEMMA_3 = dataclasses.replace(GEMMA_1, post_norms=True, qk_norm=True)
LAYER = {
    "attention_input_norm": (10,),
    "qkv": (40, 10),
    "attention_output": (10, 24),
    "mlp_input_norm": (10,),
    "gate_up": (14, 10),
    "down": (10, 7),
}


def layers(layer):
    return {f"layers.{index}.{name}": shape for index in (0, 1) for name, shape in layer.items()}


def test_names_and_shapes():
    plain = {"embedding": (13, 10), **layers(LAYER), "final_norm": (10,)}
    assert expected_shapes(GEMMA_1, HeadConfig()) == plain
    norms = {"attention_output_norm": (10,), "mlp_output_norm": (10,), "query_norm": (4,), "key_norm": (4,)}
    assert expected_shapes(GEMMA_3, HeadConfig()) == {**plain, **layers(LAYER | norms)}
    assert count_parameters(plain) == 13 * 10 + 2 * (2 * 10 + 400 + 240 + 140 + 70) + 10


def test_shapes_of_a_head_are_added():
    head = HeadConfig(
        pooler=True,
        pooling="attention",
        dense=(DenseConfig(9, 10, bias=True), DenseConfig(8, 9)),
        task="tag",
        labels=("a", "b", "c"),
        classifier_bias=True,
    )
    extra = {
        "pooler.query": (10,),
        "dense.0.weight": (9, 10),
        "dense.0.bias": (9,),
        "dense.1.weight": (8, 9),
        "classifier.weight": (3, 10),
        "classifier.bias": (3,),
    }
    assert expected_shapes(GEMMA_1, head) == expected_shapes(GEMMA_1, HeadConfig()) | extra


def test_nest_moves_arrays_and_copies_none():
    flat = random_weights(GEMMA_3, HeadConfig(task="classify", labels=("a",)), "float32", seed=1)
    tree = nest(flat, GEMMA_3, FunnelConfig())
    assert set(tree) == {"embedding", "layers", "final_norm", "classifier.weight"}
    assert tree["embedding"] is flat["embedding"]
    for index, layer in enumerate(tree["layers"]):
        assert len(layer) == 10
        for name, array in layer.items():
            assert array is flat[f"layers.{index}.{name}"]
    assert len(flat) == 3 + 2 * 10  # the table is left as it was


def test_a_layer_whose_keys_stay_unpooled_gets_its_projections_apart():
    flat = random_weights(GEMMA_1, HeadConfig(), "float32", seed=1)
    first, second = nest(flat, GEMMA_1, FunnelConfig((1, 2), pool_query_only=True))["layers"]
    assert "qkv" in first
    assert "qkv" not in second
    qkv = flat["layers.1.qkv"]
    assert (second["q"].shape, second["kv"].shape) == ((24, 10), (16, 10))
    np.testing.assert_array_equal(np.concatenate([second["q"], second["kv"]]), qkv)
    assert np.shares_memory(second["q"], qkv)
    assert np.shares_memory(second["kv"], qkv)
    assert "qkv" in nest(flat, GEMMA_1, FunnelConfig((1, 2)))["layers"][1]


@pytest.mark.parametrize(("name", "dtype"), [("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)])
def test_random_weights_are_uniform_reproducible_and_all_different(name, dtype):
    config = dataclasses.replace(GEMMA_3, vocab_size=6001, hidden_size=1400)  # more than one part of 4 M numbers
    weights = random_weights(config, HeadConfig(), name, seed=5)
    assert {key: array.shape for key, array in weights.items()} == expected_shapes(config, HeadConfig())
    for key, array in weights.items():
        assert array.dtype == (np.float32 if key.endswith("_norm") else dtype)
    for array in weights.values():
        values = np.asarray(array, np.float64)
        assert np.abs(values).max() <= 0.01 * 12**0.5 * 1.004
        if values.size > 10_000:
            assert np.std(values) == pytest.approx(0.02, rel=0.02)
            assert abs(np.mean(values)) < 0.06 / values.size**0.5
    first_parts = {array.ravel()[:4].tobytes() for array in weights.values()}
    assert len(first_parts) == len(weights)
    embedding = np.asarray(weights["embedding"], np.float32)
    assert len(np.unique(embedding[:, 0])) > (5000 if name == "float32" else 300)

    small = [random_weights(GEMMA_1, HeadConfig(), name, seed=seed) for seed in (5, 5, 6)]
    for key in small[0]:
        np.testing.assert_array_equal(small[0][key], small[1][key])
        assert (small[0][key] != small[2][key]).any()


def test_only_the_matrices_of_products_are_prepared():
    flat = random_weights(GEMMA_3, HeadConfig(task="tag", labels=("a", "b")), "float32", seed=2)
    prepared = {
        name: prepare_weight(name, weight, "float32", "float32", target("cpu")) for name, weight in flat.items()
    }
    packed = {name.rpartition(".")[2]: weight for name, weight in prepared.items() if isinstance(weight, PackedWeight)}
    matrices = {
        "qkv": ((40, 10), 1),
        "attention_output": ((10, 24), 1),
        "gate_up": ((14, 10), 2),
        "down": ((10, 7), 1),
    }
    found = {name: (weight.shape, weight.parts) for name, weight in packed.items()}
    assert found == matrices
    for name, weight in prepared.items():
        assert isinstance(weight, PackedWeight) or weight is flat[name]
        assert prepare_weight(name, flat[name], "float32", "float32", target("xla")) is flat[name]
        assert prepare_weight(name, weight, "float32", "float32", target("cpu")) is weight


def test_a_weight_is_cast_before_it_is_packed():
    flat = random_weights(GEMMA_1, HeadConfig(), "float32", seed=2)
    prepared = prepare_weight("layers.0.qkv", flat["layers.0.qkv"], "bfloat16", "bfloat16", target("cpu"))
    assert prepared.dtype == ml_dtypes.bfloat16
    assert isinstance(prepared, PackedWeight)
    packed = packed_weight(flat["layers.0.qkv"].astype(ml_dtypes.bfloat16))
    norm = flat["final_norm"]
    assert prepare_weight("final_norm", norm, "bfloat16", "bfloat16", target("cpu")) is norm
    half = prepare_weight("classifier.weight", flat["embedding"], "float32", "bfloat16", target("cpu"))
    assert half.dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"layers\.0\.qkv is packed as bfloat16; cast it to float32 before"):
        prepare_weight("layers.0.qkv", packed, "float32", "float32", target("cpu"))


def test_engines_share_weights_that_are_prepared():
    """No engine packs them again, also one that takes its queries' weights apart."""
    config = dataclasses.replace(GEMMA_1, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=32, max_positions=64)
    flat = random_weights(config, HeadConfig(), "float32", seed=3)
    shared = {name: prepare_weight(name, weight, "float32", "float32", target("cpu")) for name, weight in flat.items()}
    for funnel in (FunnelConfig(), FunnelConfig((1, 2), pool_query_only=True)):
        engines = [
            Engine(config, HeadConfig(), weights, funnel=funnel, backend=backend, max_batch_tokens=16)
            for weights, backend in ((shared, "cpu"), (flat, "xla"))
        ]
        np.testing.assert_allclose(*(engine.embed([[1, 2, 3, 4, 5]]) for engine in engines), atol=1e-5)
        assert engines[0].params["layers"][0]["down"].packed is shared["layers.0.down"].packed
    with pytest.raises(ConfigError, match=r"layers.0.qkv is packed for one device and cannot be divided"):
        Engine(config, HeadConfig(), shared, mesh=jax.make_mesh((1,), ("model",)), max_batch_tokens=16)
    with pytest.raises(BackendUnavailable, match="xla: the weight is packed for backend 'cpu'"):
        Engine(config, HeadConfig(), shared, backend="xla", max_batch_tokens=16)


@pytest.mark.parametrize("matrices", ["float32", "bfloat16", "int8"])
def test_norms_of_bfloat16_are_widened(matrices):
    """As checkpoints of versions before 5 have them."""
    flat = random_weights(GEMMA_3, HeadConfig(), matrices, seed=6)
    halved = {n: w.astype(ml_dtypes.bfloat16) if n.endswith("_norm") else w for n, w in flat.items()}
    widened = {n: w.astype(np.float32) if n.endswith("_norm") else w for n, w in halved.items()}
    first, second, exact = (Engine(GEMMA_3, HeadConfig(), w, max_batch_tokens=16) for w in (halved, widened, flat))
    assert first.params["final_norm"].dtype == np.float32
    ids = [[1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(first.embed(ids), second.embed(ids))
    assert (first.embed(ids) != exact.embed(ids)).any()


@pytest.mark.parametrize("asked", [None, "float32"])
def test_weights_of_bfloat16_are_read_as_they_are_where_activations_are_float32(monkeypatch, asked):
    """By default where a processor does not multiply bfloat16, or on request: the numbers are those of float32."""
    monkeypatch.setattr(native_calls, "multiplies_bfloat16", lambda: asked == "float32")
    config = dataclasses.replace(GEMMA_1, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=64, max_positions=64)
    stored = random_weights(config, HeadConfig(), "bfloat16", seed=4)
    widened = {name: weight.astype(np.float32) for name, weight in stored.items()}
    engine = Engine(config, HeadConfig(), stored, dtype=asked, max_batch_tokens=16)
    assert engine.params["layers"][0]["qkv"].dtype == engine.params["embedding"].dtype == ml_dtypes.bfloat16
    assert "bfloat16 weights, float32 activations" in engine.describe()
    expected = Engine(config, HeadConfig(), widened, max_batch_tokens=16)
    np.testing.assert_array_equal(engine.embed([[1, 2, 3, 4, 5]]), expected.embed([[1, 2, 3, 4, 5]]))
    on_xla = Engine(config, HeadConfig(), stored, dtype=asked, backend="xla", max_batch_tokens=16)
    assert on_xla.params["layers"][0]["qkv"].dtype == np.dtype(asked or ml_dtypes.bfloat16)
    halved = Engine(config, HeadConfig(), stored, dtype="bfloat16", max_batch_tokens=16)
    assert halved.activations == "bfloat16"
    assert halved.params["final_norm"].dtype == np.float32
