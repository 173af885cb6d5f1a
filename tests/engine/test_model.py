"""`forward` as a compiled program: no copies of weights, compilable without allocating them, one result per backend.

That its numbers are right is the business of the parity and funnel tests.
"""

import dataclasses
import functools
import importlib
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from funnel_engine.config import RECOVERIES, FunnelConfig, Llama3Scaling, ModelConfig, Rope
from funnel_engine.devices import map_weights
from funnel_engine.heads import HeadConfig
from funnel_engine.model import forward, rotation
from funnel_engine.packing import make_plan, pack, spans
from funnel_engine.presets import preset
from funnel_engine.weights import (
    ACTIVATIONS,
    DTYPES,
    expected_shapes,
    nest,
    prepare_weight,
    random_weights,
    tensor_types,
)
from funnel_kernels import BACKENDS, ConfigError, Target
from option_grid import each_value_once, target

run = jax.jit(forward, static_argnames=("config", "funnel", "dtype", "target"))

# No matrix of a layer has as many elements as an activation, so that its copies are known by their size.
MODEL = ModelConfig(
    family="gemma3_text",
    vocab_size=200_011,
    hidden_size=192,
    intermediate_size=640,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    layer_types=("sliding", "full", "sliding"),
    query_scale=0.2,
    attention="bidirectional",
    max_positions=200,
    full_rope=Rope(1e6, 8.0),
    sliding_rope=Rope(1e4),
    causal_window=(20, 0),
    bidirectional_window=(5, 5),
    softcap=20.0,
    post_norms=True,
    qk_norm=True,
)
SMALL = dataclasses.replace(MODEL, vocab_size=101, hidden_size=24, intermediate_size=40, head_dim=8)
GEMMA_1 = dataclasses.replace(SMALL, layer_types=("full",) * 3, softcap=None, post_norms=False, qk_norm=False)
QWEN_3 = dataclasses.replace(
    SMALL,
    family="qwen3",
    head_dim=64,
    attention="causal",
    activation="silu",
    scale_embedding=False,
    softcap=None,
    post_norms=False,
)

FUNNELS = {
    "no funnel": FunnelConfig(),
    "funnel": FunnelConfig.after(1),
    "query only": FunnelConfig.after(1, pool_query_only=True),
    "query only, two funnels, recovery": FunnelConfig((1, 2, 2), pool_query_only=True, recovery="max_last"),
}


def shapes_only(tree):
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)


def compiled(config, funnel, dtype, rows):
    """The forward pass compiled from shapes alone, and the shapes of its weights."""
    flat = {
        name: np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)  # one element, whatever the shape
        for name, tensor in tensor_types(expected_shapes(config, HeadConfig()), dtype).items()
    }
    batch = pack(make_plan(config, funnel), np.array([1], np.int32), np.array([0, 1], np.int32), rows)
    params = shapes_only(nest(flat, config, funnel))
    options = {"config": config, "funnel": funnel, "dtype": dtype, "target": target()}
    return run.lower(params, shapes_only(batch), **options).compile(), params


def elements(shape: str) -> int:
    return int(np.prod([int(size) for size in shape.split(",")]))


def instructions(program: str) -> list[tuple[str, str, set[int]]]:
    """(computation, operation, numbers of elements of its results) of every instruction, those inside fusions too."""
    found, computation = [], ""
    for line in program.splitlines():
        if line.endswith("{") and " = " not in line:
            computation = line.split()[0 if line.startswith("%") else 1]
        match = re.match(r"\s+(?:ROOT )?%?\S+ = (.*?) ([a-z][a-z0-9\-]*)\(", line)
        if match:
            found.append((computation, match[2], {elements(shape) for shape in re.findall(r"\[([\d,]+)\]", match[1])}))
    return found


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize(
    ("funnel", "rows"),
    [*((funnel, 64) for funnel in FUNNELS.values()), (FUNNELS["query only"], 2144)],  # one block, and loops over blocks
)
def test_no_weight_is_copied_at_run_time(funnel, rows, dtype):
    program, params = compiled(MODEL, funnel, dtype, rows)
    embedding = params["embedding"].size
    matrices = {leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 2}
    assert len(matrices) == (5 if funnel.pool_query_only else 4)  # "kv" too; "q" is as large as "attention_output"

    listed = instructions(program.as_text())
    parameters = set().union(*(sizes for _, operation, sizes in listed if operation == "parameter"))
    assert matrices | {embedding} <= parameters  # the text is understood
    views = {"parameter", "bitcast", "tuple", "get-tuple-element", "while"}  # a loop hands on what it was given
    assert not [entry for entry in listed if entry[1] not in views and entry[2] & matrices]

    # The embedding may be named by an operation that is fused with the gather: only the gathered rows are computed.
    gathers = {computation for computation, operation, _ in listed if operation == "gather"}
    for computation, operation, sizes in listed:
        if operation not in views and embedding in sizes:
            assert computation in gathers
    # Temporary memory too is that of activations: a float32 copy would take 4 bytes an element.
    assert program.memory_analysis().temp_size_in_bytes < embedding


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "funnel"),
    [
        ("gemma-2b", FunnelConfig.after(2)),
        ("gemma3-27b", FunnelConfig.after(5, pool_query_only=True, recovery="sum_mean")),
    ],
)
def test_a_large_model_compiles_from_shapes_alone(name, funnel):
    config = dataclasses.replace(preset(name), attention="bidirectional")
    program, params = compiled(config, funnel, "bfloat16", 512)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    memory = program.memory_analysis()
    assert 0 < memory.argument_size_in_bytes - weights < 1e5
    assert memory.temp_size_in_bytes < 0.1 * weights
    stride = funnel.output_stride
    assert memory.output_size_in_bytes == 2 * 512 // stride * config.hidden_size


def example(config, funnel, dtype, lengths=(9, 1, 20, 6), seed=3):
    """Weights, a packed batch of 64 rows with padding between and after the sequences, and its plan and lengths."""
    params = nest(random_weights(config, HeadConfig(), dtype, seed), config, funnel)
    plan, lengths = make_plan(config, funnel), np.array(lengths, np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.random.default_rng(seed).integers(1, config.vocab_size, offsets[-1]).astype(np.int32)
    return params, pack(plan, ids, offsets, 64), plan, lengths


def token_rows(plan, lengths):
    """The rows of the output that hold tokens."""
    first, held = spans(plan, lengths, plan.output_stride)
    return np.concatenate([np.arange(f, f + n) for f, n in zip(first, held, strict=True)])


ALL_OPS = "query only, two funnels, recovery"
# Interpreted backends run a whole model in one dtype by default; their ops are tested in both.
MORE_COMBINATIONS = {("triton", "float32"), ("tpu", "bfloat16")}
COMPARED = [
    pytest.param(backend, name, config, dtype, marks=pytest.mark.grid if (backend, dtype) in MORE_COMBINATIONS else ())
    for name, config, dtype in (
        *((name, SMALL, "float32") for name in FUNNELS),
        *((name, SMALL, "bfloat16") for name in ("no funnel", ALL_OPS)),
        *((name, GEMMA_1, "float32") for name in ("funnel", ALL_OPS)),
        *((name, QWEN_3, dtype) for name in ("no funnel", ALL_OPS) for dtype in ACTIVATIONS),
    )
    for backend in BACKENDS
    # Kernels that are interpreted take seconds.
    if backend in ("cpu", "xla") or (backend in ("triton", "tpu") and (name, config) == (ALL_OPS, SMALL))
]


@pytest.mark.parametrize(("backend", "name", "config", "dtype"), COMPARED)
def test_every_backend_gives_what_the_reference_gives(backend, name, config, dtype):
    config = dataclasses.replace(config, hidden_size=128)  # rows of whole registers, as the kernels for TPUs need
    funnel = FUNNELS[name]
    params, batch, plan, lengths = example(config, funnel, dtype)
    rows, results = token_rows(plan, lengths), []
    for served_by in ("reference", backend):
        prepared = map_weights(
            functools.partial(prepare_weight, dtype=dtype, activations=dtype, target=target(served_by)), params
        )
        result = run(prepared, batch, config=config, funnel=funnel, dtype=dtype, target=target(served_by))
        assert result.dtype == DTYPES[dtype]
        assert result.shape == (len(batch.ids) // funnel.output_stride, config.hidden_size)
        results.append(np.asarray(result, np.float32)[rows])
    reference, other = results
    assert np.std(reference) > 0.5
    np.testing.assert_allclose(other, reference, rtol=0, atol={"float32": 1e-5, "bfloat16": 0.06}[dtype])


@pytest.mark.parametrize(
    ("recovery", "dtype"), [*((name, "float32") for name in (None, *RECOVERIES)), (None, "bfloat16")]
)
def test_rows_that_hold_no_token_are_finite(recovery, dtype):
    config = dataclasses.replace(SMALL, layer_types=("sliding", "full"))
    funnel = FunnelConfig((1, 4), keep_first=True, recovery=recovery)
    for lengths in ((5, 1, 11), ()):
        params, batch, plan, _ = example(config, funnel, dtype, lengths)
        out = run(params, batch, config=config, funnel=funnel, dtype=dtype, target=target()).astype(np.float32)
        assert np.isfinite(out).all()
        assert len(lengths) == 0 or 0 < len(token_rows(plan, np.array(lengths))) < len(out)


def test_rows_that_hold_no_token_do_not_reach_the_others():
    """Other ids in the padding change nothing where a token is."""
    funnel = FunnelConfig((1, 2, 2), pool_query_only=True, keep_first=True, pool="mean", recovery="sum_max")
    params, batch, plan, lengths = example(SMALL, funnel, "float32")
    padding = ~batch.levels[1].real
    assert padding.sum() > 10
    other = dataclasses.replace(batch, ids=np.where(padding, np.arange(len(padding)) % 97, batch.ids))
    rows = token_rows(plan, lengths)
    options = {"config": SMALL, "funnel": funnel, "dtype": "float32", "target": target()}
    before, after = (np.asarray(run(params, held, **options)) for held in (batch, other))
    np.testing.assert_array_equal(after[rows], before[rows])
    assert (after != before).any()


def test_what_does_not_fit_is_refused():
    params, batch, _, _ = example(SMALL, FunnelConfig(), "float32")
    with pytest.raises(ConfigError, match="4 strides but the model has only 3 layers"):
        forward(params, batch, config=SMALL, funnel=FunnelConfig.after(3), dtype="float32", target=target())


# What differs between platforms.


@functools.cache
def result_on(platform, config, dtype, rows=40):
    """The forward pass as it is for a platform, computed on the CPU."""
    funnel = FunnelConfig.after(1, recovery="mean_last")
    config = dataclasses.replace(config, layer_types=config.layer_types[:2])  # a layer on each side of the funnel
    ids = np.random.default_rng(3).integers(0, config.vocab_size, rows, np.int32)
    batch = pack(make_plan(config, funnel), ids, np.array([0, rows // 3, rows], np.int32), rows + 2)
    params = nest(random_weights(config, HeadConfig(), dtype, seed=4), config, funnel)
    options = {"config": config, "funnel": funnel, "dtype": dtype, "target": Target("xla", platform)}
    program = jax.jit(functools.partial(forward, **options))
    return np.asarray(program(params, batch), np.float64)[:rows]


@each_value_once(platform=("gpu", "tpu"), config=(SMALL, GEMMA_1))
def test_every_platform_computes_the_same(platform, config):
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 2**-6)):
        ours = result_on("cpu", config, dtype)
        theirs = result_on(platform, config, dtype)
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(ours)
        assert dtype == "float32" or (ours != theirs).any()  # gate and up are rounded there


def test_a_tpu_gets_its_heads_cut_out_and_the_mlp_in_one_block(monkeypatch):
    module = importlib.import_module("funnel_kernels.mlp")
    monkeypatch.setattr(module, "HIDDEN_PER_BLOCK", 1000 * MODEL.intermediate_size)
    halves_of_heads = "tensor<3000x6x16xf32>"
    on_tpu, on_gpu, on_cpu = (export_for(platform, 3000) for platform in ("tpu", "gpu", "cpu"))
    assert halves_of_heads in on_gpu
    assert halves_of_heads not in on_tpu
    assert "tensor<3000x1280xf32>" in on_tpu  # gate and up of all rows
    assert "tensor<3000x1280xf32>" in on_gpu
    assert "tensor<3000x1280xf32>" not in on_cpu


def export_for(platform, rows):
    funnel = FunnelConfig()
    batch = pack(make_plan(MODEL, funnel), np.array([1], np.int32), np.array([0, 1], np.int32), rows)
    flat = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in expected_shapes(MODEL, HeadConfig()).items()
    }
    params = jax.eval_shape(lambda flat: nest(flat, MODEL, funnel), flat)
    options = {"config": MODEL, "funnel": funnel, "dtype": "float32", "target": Target("xla", platform)}
    encoder = jax.jit(functools.partial(forward, **options))
    names = {"gpu": "cuda"}
    return jax.export.export(encoder, platforms=[names.get(platform, platform)])(params, batch).mlir_module()


# RoPE: the tables have to follow the single-precision arithmetic of transformers.


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(("theta", "factor"), [(10_000.0, 1.0), (1_000_000.0, 8.0)])
def test_rope_tables_are_those_of_transformers(theta, factor, jit):
    positions = np.array([0, 0.5, 1, 2, 511, 4095, 8191], np.float32)
    tables = functools.partial(rotation, Rope(theta, factor), 256)
    cos, sin = (jax.jit(tables) if jit else tables)(jnp.asarray(positions))
    exponents = torch.arange(0, 256, 2, dtype=torch.int64).float() / 256
    frequencies = 1.0 / theta**exponents / factor
    angles = torch.from_numpy(positions)[:, None] * frequencies
    np.testing.assert_allclose(cos, torch.cos(angles).numpy(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(sin, torch.sin(angles).numpy(), rtol=0, atol=2e-6)


def test_frequencies_of_llama_3_are_those_of_transformers():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = Rope(5e5, llama3=Llama3Scaling(*scaling.values()))
    config = transformers.LlamaConfig(
        head_dim=128, rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 5e5}
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    positions = np.array([0, 0.5, 1, 511, 4095, 8191], np.float32)
    cos, sin = rotation(rope, 128, jnp.asarray(positions))
    plain, _ = rotation(Rope(5e5), 128, jnp.asarray(positions))
    angles = torch.from_numpy(positions)[:, None] * frequencies
    np.testing.assert_allclose(cos, torch.cos(angles).numpy(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(sin, torch.sin(angles).numpy(), rtol=0, atol=2e-6)
    same = (np.abs(cos - plain) < 2e-6).all(0)
    assert same[:29].all()  # short waves
    assert not same[32:].any()
