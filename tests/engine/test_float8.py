"""Weights of float8_e4m3fn, from the conversion to the vectors. What 8 bits have in common is in test_int8.py."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import Gemma2Model, Gemma3TextModel

import hugging_face_models as hf
from funnel_engine import CheckpointError, ConfigError, Engine, FunnelConfig, HeadConfig, convert
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.inspection import inspect_checkpoint
from funnel_engine.model import forward
from funnel_engine.packing import make_plan, pack
from funnel_engine.weights import DTYPES, MATRICES, count_bytes, expected_shapes, leaf_of, nest, random_weights
from funnel_kernels import BackendUnavailable, QuantizedWeight, Target, quantize
from option_grid import each_value_once
from tiny_models import CONFIG, random_ids

FLOAT8 = "float8_e4m3fn"
FAMILIES = {
    "gemma2": lambda: hf.build(Gemma2Model, hf.gemma2()),
    "gemma3": lambda: hf.build(Gemma3TextModel, hf.gemma3(use_bidirectional_attention=True)),
}
FUNNELS = (FunnelConfig(), FunnelConfig.after(1, pool="mean", pool_query_only=True))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A folder with one random model as `source`, `float32` and `float8`."""
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param]().save_pretrained(folder / "source")
    convert(folder / "source", folder / "float32", dtype="float32")
    convert(folder / "source", folder / "float8", dtype=FLOAT8)
    return folder


def ids():
    return random_ids([1, 5, 33, 17], vocab_size=60)


@each_value_once(["family"], family=FAMILIES, funnel=FUNNELS)
def test_vectors_are_near_those_of_float32(family, funnel):
    expected = Engine.load(family / "float32", funnel=funnel, max_batch_tokens=64).embed(ids())
    vectors = [
        Engine.load(family / "float8", funnel=funnel, backend=backend, max_batch_tokens=64).embed(ids())
        for backend in ("auto", "xla", "reference")
    ]
    for each in vectors:
        cosines = (each * expected).sum(axis=1)
        assert cosines.mean() > 0.97
        assert 0.9 < cosines.min() < 0.99999
    # They round the same numbers, but one that differs in its last bit may be rounded to another one by the next layer.
    assert (vectors[1] * vectors[2]).sum(axis=1).min() > 0.998


def test_what_is_stored_and_loaded(family, tmp_path):
    checkpoint = read_checkpoint(family / "float8", verify=True)
    shapes = expected_shapes(checkpoint.config, checkpoint.head)
    matrices = {name for name in shapes if leaf_of(name) in MATRICES}
    exact = load_file(family / "float32" / "weights.safetensors")
    for name, weight in checkpoint.weights.items():
        assert isinstance(weight, QuantizedWeight) == (name in matrices)
        if name in matrices:
            expected = quantize(exact[name], FLOAT8)
            assert weight.dtype == np.dtype(ml_dtypes.float8_e4m3fn)
            np.testing.assert_array_equal(weight.values.view(np.uint8), expected.values.view(np.uint8))
            np.testing.assert_array_equal(weight.scale, expected.scale, strict=True)
    manifest = json.loads((family / "float8" / "funnel.json").read_text())
    assert manifest["dtype"] == FLOAT8
    assert count_bytes(shapes, FLOAT8) == count_bytes(shapes, "int8")
    assert inspect_checkpoint(family / "float8")["quantized"] == {FLOAT8: len(matrices)}
    # Quantized while it is loaded it is the same, and it can be converted on.
    engine = Engine.load(family / "float8", max_batch_tokens=64)
    loaded = Engine.load(family / "float32", dtype=FLOAT8, max_batch_tokens=64)
    assert f"{FLOAT8} weights" in engine.describe()
    np.testing.assert_array_equal(loaded.embed(ids()), engine.embed(ids()))
    convert(family / "float8", tmp_path / "widened", dtype="float32")
    widened = load_file(tmp_path / "widened" / "weights.safetensors")
    np.testing.assert_array_equal(widened["layers.0.qkv"], checkpoint.weights["layers.0.qkv"].astype(np.float32))
    integers = Engine.load(family / "float8", dtype="int8", max_batch_tokens=64)
    assert (integers.embed(ids()) * engine.embed(ids())).sum(axis=1).min() > 0.97


def test_what_is_refused(family, tmp_path):
    with pytest.raises(BackendUnavailable, match="cpu: no processor multiplies float8; use int8 weights on a CPU"):
        Engine.load(family / "float8", backend="cpu")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    with pytest.raises(ConfigError, match=f"{FLOAT8} weights do not run on a mesh"):
        Engine.load(family / "float8", mesh=mesh)
    with pytest.raises(ConfigError, match=f"{FLOAT8} cannot represent NaN or infinity"):
        convert(family / "source", tmp_path / "never", dtype=FLOAT8, allow_nonfinite=True)
    with pytest.raises(ConfigError, match=r"dtype=.float8_e5m2. is not supported here; choose one of .*float8_e4m3fn"):
        convert(family / "source", tmp_path / "never", dtype="float8_e5m2")
    weights = random_weights(CONFIG, HeadConfig(), FLOAT8, seed=1)
    weights["layers.0.down"] = weights["layers.0.down"].values
    with pytest.raises(CheckpointError, match=f"layers.0.down is {FLOAT8} without scales; give what funnel_kernels"):
        Engine(CONFIG, HeadConfig(), weights)
    damaged = tmp_path / "damaged"
    shutil.copytree(family / "float8", damaged)
    (damaged / "funnel.json").write_text((damaged / "funnel.json").read_text().replace(FLOAT8, "float8_e5m2"))
    with pytest.raises(CheckpointError, match="dtype is 'float8_e5m2'"):
        Engine.load(damaged)


def test_a_hopper_gpu_multiplies_float8_in_every_product():
    weights = {
        name: QuantizedWeight(jax.ShapeDtypeStruct(shape, DTYPES[FLOAT8]), jax.ShapeDtypeStruct(shape[:1], np.float32))
        if leaf_of(name) in MATRICES
        else jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in expected_shapes(CONFIG, HeadConfig()).items()
    }
    params = jax.eval_shape(lambda flat: nest(flat, CONFIG, FunnelConfig()), weights)
    batch = pack(make_plan(CONFIG, FunnelConfig()), np.arange(50, dtype=np.int32), np.array([0, 50], np.int32), 64)
    options = {"config": CONFIG, "funnel": FunnelConfig(), "dtype": jnp.bfloat16}
    target = Target("xla", "gpu", "NVIDIA H100", "9.0")
    text = (
        jax.jit(lambda params, batch: forward(params, batch, **options, target=target)).lower(params, batch).as_text()
    )
    products = [line for line in text.splitlines() if "dot_general" in line and line.count("f8E4M3FN") == 2]
    assert len(products) == 4 * CONFIG.num_layers
