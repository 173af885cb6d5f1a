"""Our own format: what is written is what is read, and a damaged or foreign directory is refused."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import hugging_face_models as models
from funnel_engine import ConfigError, Engine, FunnelByLength, FunnelConfig
from funnel_engine.checkpoints import native
from funnel_engine.checkpoints.convert import convert, prepare_destination, save
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.checkpoints.source import Agreement, TrainingRecord
from funnel_engine.checkpoints.tensors import ArrayTensor
from funnel_engine.config import Funnel
from funnel_engine.inspection import inspect_checkpoint
from funnel_engine.weights import count_parameters, expected_shapes
from funnel_kernels import CheckpointError
from tiny_models import make_tokenizer


def make_source(directory: Path) -> Path:
    """A Gemma 2 with a classifier: softcap, windows of two kinds, labels, a tokenizer."""
    config = models.gemma2()
    config.id2label = {0: "no", 1: "sí", 2: "ja"}
    models.build(transformers.Gemma2ForTokenClassification, config).save_pretrained(directory)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


DENSE = {"out_features": 3, "in_features": 48, "bias": False, "activation": "identity"}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    convert(make_source(tmp_path / "source"), tmp_path / "ours", dtype="float32")
    return tmp_path / "ours"


def manifest(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "funnel.json").read_text())


def edit(checkpoint: Path, path: str, value: Any) -> None:
    """Sets, or with "absent" deletes, one field of funnel.json; `path` is like `config/head_dim`."""
    fields = manifest(checkpoint)
    *parents, name = path.split("/")
    target = fields
    for parent in parents:
        target = target[int(parent) if isinstance(target, list) else parent]
    if value == "absent":
        del target[name]
    else:
        target[name] = value
    (checkpoint / "funnel.json").write_text(json.dumps(fields))


def test_manifest_says_what_is_there(checkpoint):
    found, fields = read_checkpoint(checkpoint), manifest(checkpoint)
    shapes = expected_shapes(found.config, found.head)
    assert fields["version"] == 7
    assert fields["tensors"] == len(found.weights) == len(shapes)
    assert fields["parameters"] == sum(array.size for array in found.weights.values()) == count_parameters(shapes)
    assert fields["config"]["softcap"] == 1.7
    assert found.head.labels == ("no", "sí", "ja")
    assert {name: array.shape for name, array in found.weights.items()} == shapes
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "funnel.json",
        "tokenizer.json",
        "weights.safetensors",
    ]


def test_weights_are_the_file_itself(checkpoint):
    """No copy on the way to the device, and none of the arrays can be written."""
    weights = read_checkpoint(checkpoint).weights
    stored = load_file(checkpoint / "weights.safetensors")
    shared = 0
    for name, array in weights.items():
        np.testing.assert_array_equal(array, stored[name])
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        if array.nbytes % 64 == 0:
            shared += 1
            assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
    assert shared >= len(weights) // 2


def test_hugging_face_directory_says_what_to_run(tmp_path):
    source = make_source(tmp_path / "source")
    with pytest.raises(CheckpointError, match=f"funnel convert {source}"):
        read_checkpoint(source)


def test_what_is_no_checkpoint(tmp_path, checkpoint):
    for path in (tmp_path / "none", tmp_path, checkpoint / "funnel.json"):
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("version", 1, "version 1"),
        ("version", "absent", "version None"),
        ("version", "1", "version '1'"),
        ("version", 8, "version 8; this engine reads versions 2 to 7"),
        ("version", 4.0, "version 4.0"),
        ("version", True, "version True"),
        ("funnel", "absent", "lacks 'funnel'"),
        ("funnel", None, "funnel is None"),
        ("funnel", "1:2", "funnel is '1:2'"),
        ("funnel/strides", [1, 0], "strides[1]=0"),
        ("funnel/strides", [1, 1, 1, 1, 2], "the funnel has 5 strides but the model has only 3 layers"),
        ("funnel/pool", "median", "pool='median'"),
        ("funnel/keep_first", 1, "keep_first is 1"),
        ("funnel/keep_last", "absent", "funnel lacks 'keep_last'"),
        ("training", {}, "training lacks"),
        ("training", "distill", "training is 'distill'"),
        ("config", "absent", "lacks 'config'"),
        ("config", [], "config is"),
        ("config/head_dim", "absent", "lacks 'head_dim'"),
        ("config/head_dim", "14", "head_dim is '14'"),
        ("config/head_dim", 14.0, "head_dim is 14.0"),
        ("config/head_dim", True, "head_dim is True"),
        ("config/head_dim", 13, "must be even"),
        ("config/head_dim", 16, "misshapen: layers.0.qkv"),
        ("config/vocab_size", 0, "vocab_size=0"),
        ("config/layer_types", "full", "layer_types is 'full'"),
        ("config/layer_types", ["full", 5, "full"], "layer_types"),
        ("config/layer_types", ["full", "ring", "full"], "'ring'"),
        ("config/layer_types", ["full", "full"], "unknown: 'layers.2.qkv'"),
        ("config/query_scale", float("nan"), "query_scale is nan"),
        ("config/query_scale", 10**400, "query_scale is 1000"),
        ("config/softcap", "1.7", "softcap is '1.7'"),
        ("config/post_norms", 1, "post_norms is 1"),
        ("config/full_rope", [], "full_rope has 0 entries"),
        ("config/full_rope", [10000.0, "1"], "full_rope"),
        ("config/causal_window", [8], "causal_window has 1 entries"),
        ("config/causal_window", [8, None], "causal_window"),
        ("config/extra", 1, "unknown 'extra'"),
        ("head/labels", ["no", "ja"], "misshapen: classifier.weight"),
        ("head/pooling", "attention", "pooler.query"),
        ("head/classifier_input", "absent", "lacks 'classifier_input'"),
        ("head/classifier_input", "first_token", "classifier_input='first_token' is unknown"),
        ("head/dense", [DENSE], "missing: dense.0.weight (3, 48)"),
        ("head/dense", [DENSE | {"in_features": 47}], "has in_features=47, but its input has 48"),
        ("head/dense", [DENSE, DENSE], "has in_features=48, but its input has 3"),
        ("head/dense", [DENSE | {"activation": "softmax"}], "'softmax'"),
        ("head/dense", [[3, 48]], "dense[0] is [3, 48]"),
        ("dtype", "bfloat16", "is float32, but it must be bfloat16 in a checkpoint whose dtype is bfloat16"),
        ("dtype", "float16", "'float16'"),
        ("text/prompts", {"query": 1}, "prompts.query"),
        ("text/default_prompt_name", "query", "'query'"),
        ("text/begin", "2", "begin is '2'"),
        ("text/begin", -1, "begin=-1"),
        ("text/end", 101, "end=101"),
        ("text/max_tokens", 0, "max_tokens=0"),
        ("tokenizer", "other.json", "not one of its files"),
        ("files", {}, "not one of its files"),
        ("files", {"../source/tokenizer.json": {"bytes": 1, "sha256": ""}}, "tokenizer"),
        ("source/files", None, "source.files is None"),
        ("source", None, "source is None"),
        ("surprise", 1, "unknown 'surprise'"),
    ],
)
def test_manifest_that_cannot_be(checkpoint, path, value, reason):
    edit(checkpoint, path, value)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(checkpoint)
    assert reason in str(error.value)
    assert str(checkpoint) in str(error.value)


RECORD = TrainingRecord(
    method="distill",
    source="0" * 64,
    data="f" * 64,
    loss="cosine",
    steps=300,
    agreement=Agreement(0.85, 0.82, 0.88),
    held_out={"overlap": 0.85},
    versions={"jax": "0.10.2"},
)


FUNNEL = FunnelConfig.after(1)


def train(checkpoint: Path, changes: dict[str, np.ndarray], new: Path, funnel: Funnel = FUNNEL) -> None:
    """Writes the checkpoint with other weights, as training does."""
    model = native.read_source(checkpoint)
    weights = {name: ArrayTensor.of(name, array, checkpoint) for name, array in changes.items()}
    model = dataclasses.replace(model, weights=model.weights | weights, funnel=funnel, training=RECORD)
    save(model, prepare_destination(new, checkpoint, False), "float32")


def test_a_trained_checkpoint_is_read_and_converted_with_its_funnel_and_record(checkpoint, tmp_path):
    old = read_checkpoint(checkpoint)
    changed = {"final_norm": np.asarray(old.weights["final_norm"]) + 1, "layers.1.down": -old.weights["layers.1.down"]}
    train(checkpoint, changed, tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "again", dtype="float32")
    for path in (tmp_path / "trained", tmp_path / "again"):
        found = read_checkpoint(path, verify=True)
        assert found.manifest.funnel == FunnelConfig.after(1)
        assert found.manifest.training == RECORD
        for name, array in old.weights.items():
            np.testing.assert_array_equal(found.weights[name], changed.get(name, array))
    assert inspect_checkpoint(tmp_path / "again")["training"]["agreement"] == RECORD.agreement
    with pytest.raises(
        ConfigError, match="was trained for the funnel 1:2; another one, none, cannot be stored with it"
    ):
        convert(tmp_path / "again", tmp_path / "other", funnel=FunnelConfig())
    with pytest.raises(CheckpointError, match=r"tensor final_norm in .* contains NaN"):
        train(checkpoint, {"final_norm": np.full(48, np.nan, np.float32)}, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_a_funnel_can_be_stored_with_weights_that_were_trained_without_one(checkpoint, tmp_path):
    train(checkpoint, {}, tmp_path / "trained", FunnelConfig())
    convert(tmp_path / "trained", tmp_path / "same", funnel=FunnelConfig())
    assert read_checkpoint(tmp_path / "same").manifest.training == RECORD
    convert(tmp_path / "trained", tmp_path / "funneled", funnel=FunnelConfig.after(1))
    manifest = read_checkpoint(tmp_path / "funneled").manifest
    assert (manifest.funnel, manifest.training) == (FunnelConfig.after(1), None)  # it was not trained for this funnel


def test_version_2_is_read_and_has_no_funnel(checkpoint):
    changes = {"version": 2, "funnel": "absent", "training": "absent", "head/classifier_input": "absent"}
    for path, value in changes.items():
        edit(checkpoint, path, value)
    assert read_checkpoint(checkpoint).manifest.funnel == FunnelConfig()
    assert read_checkpoint(checkpoint).head.classifier_input == "last_token"
    assert Engine.load(checkpoint, max_batch_tokens=64).funnel == FunnelConfig()


def test_version_3_is_read(checkpoint, tmp_path):
    """Its classifier reads the last token, and it does not say how its weights were quantized."""
    train(checkpoint, {}, tmp_path / "trained")
    absent = ("head/classifier_input", "training/held_out", "quantized")
    for path, value in {"version": 3, **dict.fromkeys(absent, "absent")}.items():
        edit(tmp_path / "trained", path, value)
    found = read_checkpoint(tmp_path / "trained")
    assert found.head.classifier_input == "last_token"
    assert found.manifest.funnel == FunnelConfig.after(1)
    assert found.manifest.training == dataclasses.replace(RECORD, held_out={})
    assert found.manifest.quantized == {}


def test_version_5_has_no_dense_layer_below_a_classifier_of_tokens(checkpoint):
    for path, value in {"version": 5, "head/classifier_dense": "absent"}.items():
        edit(checkpoint, path, value)
    assert read_checkpoint(checkpoint).head.classifier_dense is None


def test_version_6_has_no_biases(checkpoint):
    edit(checkpoint, "version", 6)
    for name in ("attention_bias", "mlp_bias"):
        edit(checkpoint, f"config/{name}", "absent")
    config = read_checkpoint(checkpoint).config
    assert (config.attention_bias, config.mlp_bias) == (False, False)


@pytest.mark.parametrize("version", [3, 4])
def test_funnels_of_older_versions_do_not_keep_the_last_token(checkpoint, tmp_path, version):
    """Also those of a funnel by length, which version 4 has."""
    single, by_length = FunnelConfig.after(1, keep_first=True), FunnelByLength([(0, None), (9, "1:2/mean/keep_first")])
    for number, funnel in enumerate([single, by_length][: version - 2]):
        path = tmp_path / f"{number}"
        train(checkpoint, {}, path, funnel)
        edit(path, "version", version)
        classes = manifest(path)["funnel"].get("classes", [])
        for where in [f"classes/{index}/1/" for index in range(len(classes))] or [""]:
            edit(path, f"funnel/{where}keep_last", "absent")
        assert "keep_last" not in (path / "funnel.json").read_text()
        assert read_checkpoint(path).manifest.funnel == funnel
        edit(path, "version", 6)
        with pytest.raises(CheckpointError, match="lacks 'keep_last'"):
            read_checkpoint(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"version": 1, "version": 1}'])
def test_manifest_that_is_not_json(checkpoint, content):
    (checkpoint / "funnel.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"funnel\.json"):
        read_checkpoint(checkpoint)


def test_missing_files(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        read_checkpoint(checkpoint)
    (checkpoint / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is missing"):
        read_checkpoint(checkpoint)


def test_truncated_weights(checkpoint):
    file = checkpoint / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(checkpoint)


def test_every_file_has_its_size_and_hash(checkpoint):
    files = manifest(checkpoint)["files"]
    assert sorted(files) == ["tokenizer.json", "weights.safetensors"]
    for name, facts in files.items():
        content = (checkpoint / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    source = manifest(checkpoint)["source"]
    content = (checkpoint.parent / "source" / "model.safetensors").read_bytes()
    assert source["files"] == {
        "model.safetensors": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    }


@pytest.mark.parametrize("name", ["weights.safetensors", "tokenizer.json"])
def test_a_changed_byte_is_found_by_its_hash(checkpoint, name):
    """Sizes are compared always, hashes when asked: a flipped bit in the middle of a file is found only then."""
    content = bytearray((checkpoint / name).read_bytes())
    content[-9] ^= 1
    read_checkpoint(checkpoint, verify=True)
    (checkpoint / name).write_bytes(content)
    read_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=f"SHA-256 of {checkpoint / name} differs from the manifest"):
        read_checkpoint(checkpoint, verify=True)
    with pytest.raises(CheckpointError, match="SHA-256"):
        Engine.load(checkpoint, verify=True)


@pytest.fixture
def sharded(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(native, "SHARD_BYTES", 40_000)
    convert(make_source(tmp_path / "source"), tmp_path / "sharded", dtype="float32")
    return tmp_path / "sharded"


def test_large_models_are_written_in_several_files(sharded, tmp_path):
    """No file holds more than the limit, unless one tensor alone does; the weights are the same."""
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    count = len(names)
    assert count > 3
    assert names == [f"weights-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name in names:
        tensors = load_file(sharded / name)
        assert sum(array.nbytes for array in tensors.values()) <= 40_000 or len(tensors) == 1
    convert(tmp_path / "source", tmp_path / "one", dtype="float32")
    one, several = (read_checkpoint(path, verify=True).weights for path in (tmp_path / "one", sharded))
    assert list(one) == list(several)
    for name, array in one.items():
        np.testing.assert_array_equal(array, several[name])


def test_a_tensor_in_two_files(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(first)
    save_file(load_file(second) | tensors, second)
    edit(sharded, f"files/{second.name}/bytes", second.stat().st_size)
    with pytest.raises(
        CheckpointError, match=f"{second.name} contains '{min(tensors)}'.*which another file contains too"
    ):
        read_checkpoint(sharded)


def test_a_missing_file_of_several(sharded):
    _, second, *_ = sorted(sharded.glob("*.safetensors"))
    second.unlink()
    with pytest.raises(CheckpointError, match=f"{second.name} is missing"):
        read_checkpoint(sharded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_written_again_in_another_dtype(checkpoint, tmp_path, dtype):
    """Ours is a source too; float32 to bfloat16 is the same as converting the original so."""
    convert(checkpoint, tmp_path / "again", dtype=dtype)
    convert(checkpoint.parent / "source", tmp_path / "direct", dtype=dtype)
    again, direct = read_checkpoint(tmp_path / "again", verify=True), read_checkpoint(tmp_path / "direct")
    for name, array in direct.weights.items():
        np.testing.assert_array_equal(again.weights[name], array, strict=True)
    assert again.manifest.source.format == "funnel"
    assert again.tokenizer_file.read_bytes() == direct.tokenizer_file.read_bytes()
    for field in ("config", "head", "text", "dtype", "tensors", "parameters", "tokenizer"):
        assert getattr(again.manifest, field) == getattr(direct.manifest, field)


def test_a_converted_checkpoint_takes_no_other_window(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="already converted; give the sliding window when converting its source"):
        convert(checkpoint, tmp_path / "again", sliding_window=512)


def test_weights_that_do_not_fit_are_all_listed(checkpoint):
    file = checkpoint / "weights.safetensors"
    weights = load_file(file)
    weights["surprise"] = weights.pop("final_norm")
    weights["layers.1.down"] = weights["layers.1.down"][:5].copy()
    weights["layers.2.down"] = weights["layers.2.down"].astype(np.float16)
    save_file(weights, file)
    edit(checkpoint, "files/weights.safetensors/bytes", file.stat().st_size)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(checkpoint)
    assert {line.strip() for line in str(error.value).splitlines()[1:]} == {
        "missing: final_norm (48,)",
        "unknown: 'surprise' (48,)",
        "misshapen: layers.1.down is (5, 72), but the config says (48, 72)",
        "dtype: layers.2.down is 'float16', not float32",
    }


def paths(value: Any, prefix: tuple = ()) -> list[tuple]:
    """Where every value of a JSON document stands."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix] + [path for key, item in items for path in paths(item, (*prefix, key))]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("fuzz")
    convert(make_source(directory / "source"), directory / "ours", dtype="float32")
    return directory / "ours", (directory / "ours" / "funnel.json").read_text()


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(data=st.data(), value=values)
def test_any_manifest_is_read_or_refused(fuzzed, data, value):
    """One value of the manifest becomes another: either it is refused, or the checkpoint still holds its weights."""
    directory, text = fuzzed
    fields = json.loads(text)
    *parents, last = data.draw(st.sampled_from(paths(fields)[1:]))
    target = fields
    for key in parents:
        target = target[key]
    target[last] = value
    (directory / "funnel.json").write_text(json.dumps(fields))
    try:
        found = read_checkpoint(directory)
    except CheckpointError:
        return
    assert found.weights["embedding"].shape == (101, 48)
