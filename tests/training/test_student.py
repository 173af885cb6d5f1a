"""The model in training: what it computes again for its derivative."""

import dataclasses

import jax
import numpy as np
import pytest

from funnel_engine import FunnelConfig, HeadConfig
from funnel_engine.heads import SentenceVectors
from funnel_engine.inputs import join
from funnel_engine.weights import random_weights
from funnel_training.student import Student
from funnel_training.trainer import data_mesh
from topic_checkpoint import CONFIG, WORDS

FOUR_LAYERS = dataclasses.replace(CONFIG, layer_types=("full",) * 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packs", "funnel"), [(1, "2:2/sum_max"), pytest.param(2, "1:2/pool_query_only", marks=pytest.mark.grid)]
)
def test_layers_computed_again_give_the_same_gradients_in_less_memory(packs, funnel):
    weights = random_weights(FOUR_LAYERS, HeadConfig(), "float32", seed=3)
    weights = {name: array * (8 if array.ndim == 2 else 1) for name, array in weights.items()}
    words = np.random.default_rng(4).permutation(np.arange(1, WORDS, dtype=np.int32))  # no two neighbours are equal
    texts = join(np.split(words[:320], (90, 160, 260)))
    found = []
    for recompute in (False, True):
        head, mesh = SentenceVectors(HeadConfig()), data_mesh(packs)
        student = Student(
            FOUR_LAYERS, head, FunnelConfig.parse(funnel), "all", 512 // packs, 4, "float32", mesh, recompute
        )
        trained, frozen = student.divide(weights, 0)
        batch = student.pack(texts, student.fill(texts, np.arange(4, dtype=np.int32)), packs)
        direction = np.random.default_rng(5).standard_normal((packs, 4, FOUR_LAYERS.hidden_size)).astype(np.float32)

        def loss(trained, student=student, frozen=frozen, batch=batch, direction=direction):
            return (student.outputs(trained, frozen, batch) * direction).sum()

        program = jax.jit(jax.grad(loss)).lower(trained).compile(compiler_options=student.compiler_options)
        found.append((program(trained), program.memory_analysis().temp_size_in_bytes))
    (expected, memory), (gradients, memory_again) = found
    for name, array in expected.items():
        assert np.abs(array).max() > 0
        np.testing.assert_allclose(gradients[name], array, rtol=1e-4, atol=1e-5 * np.abs(array).max(), err_msg=name)
    assert memory_again < 0.8 * memory


def test_what_is_before_the_funnel_does_not_move_and_scalars_never_do():
    """The per-layer inputs are read on both sides of it."""
    config = dataclasses.replace(FOUR_LAYERS, per_layer_width=8, per_layer_vocab=CONFIG.vocab_size, layer_scalar=True)
    weights = random_weights(config, HeadConfig(pooler=True), "float32", seed=3)
    names = {}
    for train in ("all", "after", "lora:2"):
        head, funnel = SentenceVectors(HeadConfig(pooler=True)), FunnelConfig.parse("2:2")
        names[train] = Student(config, head, funnel, train, 64, 4, "float32", data_mesh(1)).trained_names(weights)
    scalars = {f"layers.{layer}.layer_scalar" for layer in range(4)}
    assert set(names["all"]) == weights.keys() - scalars
    assert {name for name in names["after"] if not name.startswith("layers.")} == {"final_norm", "pooler.query"}
    assert {name.split(".")[1] for name in names["after"] if name.startswith("layers.")} == {"2", "3"}
    assert {"layers.2.per_layer_gate", "layers.2.per_layer_output", "pooler.query"} <= set(names["lora:2"])
    assert not {"per_layer_input", "per_layer_embedding", "final_norm"} & set(names["lora:2"])
