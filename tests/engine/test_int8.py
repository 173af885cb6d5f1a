"""int8 weights, from the conversion to the vectors: what is stored, what runs, what it costs, and what is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from transformers import Gemma2Model, Gemma3TextModel, GemmaModel, T5GemmaEncoderModel

import hugging_face_models as hf
from funnel_engine import CheckpointError, ConfigError, Engine, FunnelConfig, HeadConfig, convert
from funnel_engine.checkpoints.native import VERSION, plan_shards, read_checkpoint
from funnel_engine.devices import default_activations, local_target
from funnel_engine.inspection import inspect_checkpoint
from funnel_engine.served_by import served_by
from funnel_engine.weights import MATRICES, count_bytes, expected_shapes, leaf_of, random_weights, tensor_types
from funnel_kernels import QuantizedWeight, Target, native_calls, quantize
from option_grid import each_value_once
from tiny_models import CONFIG, make_engine, random_ids

FAMILIES = {
    "gemma": lambda: hf.build(GemmaModel, hf.gemma()),
    "gemma2": lambda: hf.build(Gemma2Model, hf.gemma2()),
    "gemma3": lambda: hf.build(Gemma3TextModel, hf.gemma3(use_bidirectional_attention=True)),
    "t5gemma": lambda: hf.build(T5GemmaEncoderModel, hf.t5gemma()),
}
FUNNELS = (FunnelConfig(), FunnelConfig.after(1, pool="mean"), FunnelConfig.after(1, pool_query_only=True))
BACKENDS = ("auto", "xla", "reference")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Path:
    """A folder with one random model as `source`, `float32`, `bfloat16` and `int8`."""
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param]().save_pretrained(folder / "source")
    for dtype in ("float32", "bfloat16", "int8"):
        convert(folder / "source", folder / dtype, dtype=dtype)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tagger as `source`, `float32` and `int8`: it has weights that stay float32 beside the norms."""
    folder = tmp_path_factory.mktemp("tagger")
    config = hf.gemma3(use_bidirectional_attention=True)
    config.id2label = {0: "no", 1: "yes"}
    model = hf.build(transformers.Gemma3TextForSequenceClassification, config)
    model.save_pretrained(folder / "source")
    for dtype in ("float32", "int8"):
        convert(folder / "source", folder / dtype, dtype=dtype)
    return folder


@pytest.fixture
def checkpoint(folder, tmp_path) -> Path:
    """A copy of the int8 checkpoint, to be damaged."""
    shutil.copytree(folder / "int8", tmp_path / "int8")
    return tmp_path / "int8"


def edit(checkpoint: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Changes the tensors of a checkpoint in one file."""
    file = checkpoint / "weights.safetensors"
    tensors = {name: array.copy() for name, array in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    manifest = json.loads((checkpoint / "funnel.json").read_text())
    manifest["files"][file.name]["bytes"] = file.stat().st_size
    (checkpoint / "funnel.json").write_text(json.dumps(manifest))


def ids() -> list[np.ndarray]:
    return random_ids([1, 5, 33, 17], vocab_size=60)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(axis=1)


@each_value_once(["family"], family=FAMILIES, funnel=FUNNELS)
def test_vectors_are_near_those_of_float32(family, funnel):
    expected = Engine.load(family / "float32", funnel=funnel, max_batch_tokens=64).embed(ids())
    for backend in BACKENDS:
        vectors = Engine.load(family / "int8", funnel=funnel, backend=backend, max_batch_tokens=64).embed(ids())
        assert cosines(vectors, expected).min() >= 0.995


def test_quantized_while_loading_is_quantized_while_converting(family):
    """From float32 the same bits, which a conversion from bfloat16 has only nearly."""
    stored = Engine.load(family / "int8", max_batch_tokens=64)
    for source in ("float32", "bfloat16"):
        loaded = Engine.load(family / source, dtype="int8", max_batch_tokens=64)
        assert loaded.describe() == stored.describe()
        if source == "float32":
            for ours, theirs in zip(*map(jax.tree.leaves, (loaded.params, stored.params)), strict=True):
                np.testing.assert_array_equal(ours, theirs, strict=True)
            np.testing.assert_array_equal(loaded.embed(ids()), stored.embed(ids()))
        assert cosines(loaded.embed(ids()), stored.embed(ids())).min() > 0.998


def test_what_is_stored(folder):
    shapes = expected_shapes(read_checkpoint(folder / "int8").config, read_checkpoint(folder / "int8").head)
    stored = load_file(folder / "int8" / "weights.safetensors")
    exact = load_file(folder / "float32" / "weights.safetensors")
    matrices = {name for name in shapes if leaf_of(name) in MATRICES}
    assert len(matrices) == 1 + 4 * 3
    assert stored.keys() == shapes.keys() | {f"{name}.scale" for name in matrices}
    for name, array in exact.items():
        if name in matrices:
            expected = quantize(array)
            np.testing.assert_array_equal(stored[name], expected.values, strict=True)
            np.testing.assert_array_equal(stored[f"{name}.scale"], expected.scale, strict=True)
        else:
            np.testing.assert_array_equal(stored[name], array, strict=True)
    manifest = json.loads((folder / "int8" / "funnel.json").read_text())
    assert (manifest["dtype"], manifest["version"], manifest["tensors"]) == ("int8", VERSION, len(stored))
    assert sum(array.nbytes for array in stored.values()) == count_bytes(shapes, "int8")
    opened = read_checkpoint(folder / "int8", verify=True).weights
    assert {name for name, weight in opened.items() if isinstance(weight, QuantizedWeight)} == matrices


def test_values_are_used_in_place(folder):
    """Where nothing packs them they are not copied on their way to a CPU."""
    weights = read_checkpoint(folder / "int8").weights
    in_place = 0
    for weight in weights.values():
        if isinstance(weight, QuantizedWeight) and weight.values.nbytes % 64 == 0:
            in_place += 1
            assert jax.device_put(weight.values).unsafe_buffer_pointer() == weight.values.ctypes.data
    assert in_place


def test_shards_keep_a_matrix_before_its_scales(monkeypatch, folder, tmp_path):
    monkeypatch.setattr("funnel_engine.checkpoints.native.SHARD_BYTES", 4000)
    types = tensor_types(expected_shapes(CONFIG, HeadConfig()), "int8")
    names = [name for part in plan_shards(types).values() for name in part]
    assert len(plan_shards(types)) > 3
    assert all(names.index(name.removesuffix(".scale")) <= names.index(name) for name in names)
    convert(folder / "source", tmp_path / "shards", dtype="int8")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    one, many = (read_checkpoint(path).weights for path in (folder / "int8", tmp_path / "shards"))
    for first, second in zip(*map(jax.tree.leaves, (one, many)), strict=True):
        np.testing.assert_array_equal(first, second)


def test_people_are_told(folder):
    facts = inspect_checkpoint(folder / "int8")
    assert facts["dtype"] == "float32, int8 with scales"
    assert facts["quantized"] == {"int8": 13}
    assert facts["gigabytes_converted"]["int8"] < 0.5 * facts["gigabytes_converted"]["float32"]
    engine = Engine.load(folder / "int8", max_batch_tokens=64)
    activations = default_activations("int8", local_target())
    assert f"bidirectional attention, int8 weights, {activations} activations" in engine.describe()
    assert engine.activations == str(engine.params["classifier.weight"].dtype) == activations
    assert str(engine.params["final_norm"].dtype) == "float32"
    assert str(engine.params["embedding"].dtype) == "int8"
    assert engine.classify(ids()).shape == (4, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_integers_become_floats_again(folder, tmp_path, dtype):
    """Loaded or converted; the new checkpoint says what its weights were."""
    convert(folder / "int8", tmp_path / "floats", dtype=dtype)
    converted = read_checkpoint(tmp_path / "floats")
    assert converted.manifest.quantized == {"int8": 13}
    for name, weight in read_checkpoint(folder / "int8").weights.items():
        expected = weight.values * weight.scale[:, None] if isinstance(weight, QuantizedWeight) else weight
        np.testing.assert_array_equal(converted.weights[name], expected.astype(converted.weights[name].dtype))
    first = Engine.load(folder / "int8", dtype=dtype, max_batch_tokens=64)
    second = Engine.load(tmp_path / "floats", dtype=dtype, max_batch_tokens=64)
    assert first.describe() == second.describe()
    assert "int8" not in first.describe()
    np.testing.assert_array_equal(first.embed(ids()), second.embed(ids()))


def test_converting_again_keeps_the_integers(folder, tmp_path):
    convert(folder / "int8", tmp_path / "again", dtype="int8")
    first, second = (read_checkpoint(path) for path in (folder / "int8", tmp_path / "again"))
    assert second.manifest.quantized == {"int8": 13}
    for name, weight in first.weights.items():
        other = second.weights[name]
        if isinstance(weight, QuantizedWeight):
            np.testing.assert_array_equal(other.values, weight.values)
            np.testing.assert_allclose(other.scale, weight.scale, rtol=2e-7)
        else:
            np.testing.assert_array_equal(other, weight)


@pytest.mark.parametrize("name", ["embedding", "layers.1.gate_up"])
def test_a_value_that_int8_cannot_represent_is_named(folder, tmp_path, name):
    def break_it(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][7, 3] = np.nan

    shutil.copytree(folder / "float32", tmp_path / "broken")
    edit(tmp_path / "broken", break_it)
    with pytest.raises(CheckpointError, match=f"tensor {name} .* contains NaN, infinity.* but not for 8 bits"):
        convert(tmp_path / "broken", tmp_path / "new", dtype="int8")
    with pytest.raises(ConfigError, match="int8 cannot represent NaN or infinity; leave allow_nonfinite out"):
        convert(tmp_path / "broken", tmp_path / "new", dtype="int8", allow_nonfinite=True)
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match=f"{leaf_of(name)}: row 7 of the weight contains NaN or infinity"):
        Engine.load(tmp_path / "broken", dtype="int8", max_batch_tokens=64)


def damage(name: str, change: Any) -> Any:
    def run(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = change(tensors[name])

    return run


def with_value(value: float) -> Any:
    def run(array: np.ndarray) -> np.ndarray:
        array[3] = value
        return array

    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("embedding.scale", with_value(np.nan)), "embedding.scale contains NaN, infinity or a negative number"),
        (damage("layers.0.qkv.scale", with_value(np.inf)), "layers.0.qkv.scale contains NaN, infinity or a neg"),
        (damage("layers.0.qkv.scale", with_value(-1e-3)), "layers.0.qkv.scale contains NaN, infinity or a neg"),
        (damage("layers.1.down.scale", lambda array: array[:-1]), "misshapen: layers.1.down.scale is"),
        (damage("layers.1.down.scale", lambda array: array[:, None]), "misshapen: layers.1.down.scale is"),
        (damage("layers.1.down.scale", lambda array: array.astype(np.int8)), "1.down.scale is int8, but it mu"),
        (damage("layers.1.down", lambda array: array.astype(np.float32)), "1.down is float32, but it must be int8"),
        (damage("final_norm", lambda array: array.astype(np.int8)), "final_norm is int8, but it must be float32"),
        (damage("final_norm", lambda array: array.astype(np.float16)), "dtype: final_norm is 'float16'"),
        (lambda tensors: tensors.pop("layers.0.gate_up.scale"), "missing: layers.0.gate_up.scale"),
        (lambda tensors: tensors.update({"final_norm.scale": np.ones(48, np.float32)}), "unknown: 'final_norm.scale'"),
    ],
)  # fmt: skip
def test_damage_is_named(checkpoint, change, message):
    edit(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        convert(checkpoint, checkpoint.parent / "new")
    assert message.split(" ")[-1] in " ".join(inspect_checkpoint(checkpoint)["problems"])


def test_rows_of_zeros_stay_zeros(folder, tmp_path):
    def prune(tensors: dict[str, np.ndarray]) -> None:
        for name in ("embedding", "layers.1.down", "layers.0.qkv"):
            tensors[name][3:9] = 0

    shutil.copytree(folder / "float32", tmp_path / "pruned")
    edit(tmp_path / "pruned", prune)
    convert(tmp_path / "pruned", tmp_path / "int8", dtype="int8")
    expected = Engine.load(tmp_path / "pruned", max_batch_tokens=64).embed(ids())
    for backend in BACKENDS:
        vectors = Engine.load(tmp_path / "int8", backend=backend, max_batch_tokens=64).embed(ids())
        assert cosines(vectors, expected).min() >= 0.995


def test_a_table_that_does_not_fit_is_refused():
    head = HeadConfig()
    weights = random_weights(CONFIG, head, "int8", seed=7)
    Engine(CONFIG, head, weights, max_batch_tokens=64)
    floats = random_weights(CONFIG, head, "float32", seed=7)
    for change, message in (
        (
            {"layers.0.qkv": floats["layers.0.qkv"]},
            "matrices are float32, int8 and other weights float32; all matrices must be one of",
        ),
        ({"embedding": floats["embedding"]}, "matrices are float32, int8"),
        ({"final_norm": floats["final_norm"].astype(np.int8)}, "other weights float32, int8; .* float32 or bfloat16"),
        ({"layers.0.down": weights["layers.0.down"].values}, "layers.0.down is int8 without scales; give what funnel"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Engine(CONFIG, head, weights | change, max_batch_tokens=64)


def test_a_mesh_is_refused(folder):
    mesh = jax.make_mesh((1,), ("data",))
    for name, dtype in (("int8", None), ("float32", "int8")):
        with pytest.raises(ConfigError, match="int8 weights do not run on a mesh; load with dtype='bfloat16'"):
            Engine.load(folder / name, dtype=dtype, mesh=mesh, max_batch_tokens=64)
    expected = Engine.load(folder / "int8", dtype="float32", backend="xla", max_batch_tokens=64)
    engine = Engine.load(folder / "int8", dtype="float32", backend="xla", mesh=mesh, max_batch_tokens=64)
    np.testing.assert_allclose(engine.embed(ids()), expected.embed(ids()), atol=1e-5)


@pytest.mark.parametrize("multiplies", [False, True])
def test_activations_follow_the_device(monkeypatch, folder, multiplies):
    monkeypatch.setattr(native_calls, "multiplies_bfloat16", lambda: multiplies)
    expected = "bfloat16" if multiplies else "float32"
    assert default_activations("int8", Target()) == expected
    for platform in ("gpu", "tpu"):
        assert default_activations("int8", Target("auto", platform)) == "bfloat16"
    assert default_activations("float32", Target()) == "float32"
    assert default_activations("bfloat16", Target()) == expected
    assert default_activations("bfloat16", Target("xla")) == "bfloat16"
    engine = Engine.load(folder / "int8", backend="xla", max_batch_tokens=64)
    assert f"int8 weights, {expected} activations" in engine.describe()
    exact = Engine.load(folder / "float32", max_batch_tokens=64).embed(ids())
    assert cosines(engine.embed(ids()), exact).min() >= 0.995
    assert served_by(CONFIG, FunnelConfig.after(1), "int8", Target("xla")).backends() == ["xla"]


def test_random_weights_are_quantized_ones():
    weights = random_weights(CONFIG, HeadConfig(), "int8", seed=7)
    floats = random_weights(CONFIG, HeadConfig(), "float32", seed=7)
    for name, weight in weights.items():
        if leaf_of(name) in MATRICES:
            np.testing.assert_array_equal(weight.values, quantize(floats[name]).values)
        else:
            np.testing.assert_array_equal(weight, floats[name])
    expected = make_engine().embed(ids())
    assert cosines(make_engine(dtype="int8").embed(ids()), expected).min() >= 0.995
    config = dataclasses.replace(CONFIG, attention="causal")
    assert Engine(config, HeadConfig(), weights, max_batch_tokens=64).embed(ids()).shape == (4, CONFIG.hidden_size)
