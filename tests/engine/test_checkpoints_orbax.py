"""Flax checkpoints of every layout and storage become the weights that the same model has through Hugging Face.

The Flax parameters are made from PyTorch's by `flax_models`, whose einsums are checked against PyTorch's products here.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import torch
import transformers

import flax_models as flax
import hugging_face_models as models
import tiny_models
from funnel_engine import Engine, convert
from funnel_engine.checkpoints import orbax, tensors
from funnel_engine.checkpoints.formats import detect_format
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.presets import PRESETS
from funnel_kernels import CheckpointError

DATABASE = {"use_ocdbt": True, "use_zarr3": False}
FOLDERS = {"use_ocdbt": False, "use_zarr3": False}
STORAGES = [DATABASE, FOLDERS, {"use_ocdbt": True, "use_zarr3": True}, {"use_ocdbt": False, "use_zarr3": True}]
LAYOUTS = {
    "flat": flax.flat,
    "nested": flax.nested,
    "kauldron": flax.kauldron,
    "stacked": flax.stacked,
    "stacked by 3": lambda leaves: flax.stacked(leaves, 3),
    "post-trained": lambda leaves: flax.flat(leaves, "rlx_networks/policy_network/transformer/"),
}
MULTIMODAL = {
    "SigLiPFromPatches_0/siglip_encoder/embedding": {"kernel": np.ones((2, 2, 3, 5), np.float32)},
    "transformer/embedder/mm_input_projection": {"w": np.ones((5, 48), np.float32)},
    "transformer/embedder/mm_soft_embedding_norm": {"scale": np.ones(5, np.float32)},
}
DENSE = np.random.default_rng(5).standard_normal((48, 67), np.float32) / 7


def encoder_of(name: str, **fields: Any) -> tuple[Any, Any]:
    """A random Hugging Face model of a family, and its encoder."""
    make = {"gemma": models.gemma, "gemma2": models.gemma2, "gemma3": models.gemma3, "t5gemma": models.t5gemma}[name]
    class_name = {"gemma3": "Gemma3TextModel", "t5gemma": "T5GemmaEncoderModel"}.get(name, f"{name.capitalize()}Model")
    model = models.build(getattr(transformers, class_name), make(**fields))
    return model, model.encoder if name == "t5gemma" else model


def leaves_of(name: str, encoder: Any, **options: Any) -> flax.Leaves:
    leaves = flax.leaves_of(encoder, **options)
    if name == "t5gemma":
        decoder = {"decoder/layer_0/cross_attn/q_einsum/w": np.ones((2, 3, 4), np.float32)}
        return {f"encoder/{leaf}": value for leaf, value in leaves.items()} | decoder
    return leaves


def check_as_hugging_face(model: Any, source: Path, dtype: str = "float32") -> None:
    """Every weight of the converted source is that of the model through Hugging Face."""
    reference, ours = source.parent / "reference", source.parent / "ours"
    model.save_pretrained(source.parent / "hugging_face")
    convert(source.parent / "hugging_face", reference, dtype=dtype)
    convert(source, ours, dtype=dtype)
    expected, found = read_checkpoint(reference), read_checkpoint(ours)
    assert found.manifest.source.format == "orbax"
    assert (found.config, found.head) == (expected.config, expected.head)
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight, strict=True, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "fields", "transposed_gating"),
    [
        ("gemma", {}, False),
        ("gemma", {"num_key_value_heads": 6}, False),
        ("gemma", {"num_key_value_heads": 1}, False),
        ("gemma2", {"num_hidden_layers": 5}, False),
        ("gemma2", {}, True),
        ("gemma3", {"num_hidden_layers": 4}, True),
        ("t5gemma", {}, True),
        ("t5gemma", {"num_key_value_heads": 6}, False),
    ],
)
def test_every_layout_of_every_family(tmp_path, layout, name, fields, transposed_gating):
    model, encoder = encoder_of(name, **fields)
    leaves = leaves_of(name, encoder, transposed_gating=transposed_gating)
    source = flax.save(tmp_path / "source", LAYOUTS[layout](leaves))
    model.config.save_pretrained(source)
    check_as_hugging_face(model, source)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("layout", ["flat", "stacked", "kauldron"])
def test_every_storage(tmp_path, layout, storage, dtype):
    model, encoder = encoder_of("gemma3")
    source = flax.save(tmp_path / "source", LAYOUTS[layout](leaves_of("gemma3", encoder)), dtype, **storage)
    model.config.save_pretrained(source)
    check_as_hugging_face(model.to(getattr(torch, dtype)), source, dtype)


def test_einsums_are_the_products_of_pytorch():
    """The equations of gemma/gm/nn/_modules.py on our leaves, and PyTorch's linear layers on the same input."""
    for fields in ({}, {"num_key_value_heads": 6}):
        model, _ = encoder_of("gemma", **fields)
        layer, generator = model.layers[0], np.random.default_rng(0)
        x = generator.standard_normal((5, 48))
        heads = generator.standard_normal((5, 6, 14))
        inner = generator.standard_normal((5, 72))

        def linear(module: Any, values: np.ndarray) -> np.ndarray:
            return values @ module.weight.detach().numpy().astype(np.float64).T

        attention, mlp = layer.self_attn, layer.mlp
        for transposed, equation in ((False, "tf,nfh->tnh"), (True, "tf,nhf->tnh")):
            leaves = flax.leaves_of(model, transposed_gating=transposed)
            gate, up = np.einsum(equation, x, leaves["layer_0/mlp/gating_einsum/w"]).transpose(1, 0, 2)
            np.testing.assert_allclose(gate, linear(mlp.gate_proj, x))
            np.testing.assert_allclose(up, linear(mlp.up_proj, x))
        if fields:
            q, k, v = np.einsum("td,sndh->stnh", x, leaves["layer_0/attn/qkv_einsum/w"])
        else:
            q = np.einsum("td,ndh->tnh", x, leaves["layer_0/attn/q_einsum/w"])
            k, v = np.einsum("td,ckdh->ctkh", x, leaves["layer_0/attn/kv_einsum/w"])
        for values, module in ((q, attention.q_proj), (k, attention.k_proj), (v, attention.v_proj)):
            np.testing.assert_allclose(values.reshape(5, -1), linear(module, x))
        out = np.einsum("tnh,nhd->td", heads, leaves["layer_0/attn/attn_vec_einsum/w"])
        np.testing.assert_allclose(out, linear(attention.o_proj, heads.reshape(5, -1)))
        down = np.einsum("th,hf->tf", inner, leaves["layer_0/mlp/linear/w"])
        np.testing.assert_allclose(down, linear(mlp.down_proj, inner))


@pytest.mark.parametrize(
    ("name", "fields", "attention"),
    [
        ("gemma", {}, "causal"),
        ("gemma2", {}, "causal"),
        ("gemma3", {}, "causal"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
        ("t5gemma", {}, "bidirectional"),
    ],
)
def test_rows_of_the_engine_are_those_of_transformers(tmp_path, name, fields, attention):
    model, encoder = encoder_of(name, **fields)
    source = flax.save(tmp_path / "flax", flax.flat(leaves_of(name, encoder)))
    model.config.save_pretrained(source)
    convert(source, tmp_path / "ours", dtype="float32")
    specimen = models.Specimen.make(tmp_path, model, attention)
    sequences = models.random_ids(3, 17, 30)
    rows = Engine.load(tmp_path / "ours").hidden_states(sequences)
    truth = [specimen.truth(sequence) for sequence in sequences]
    models.assert_as_right_as_transformers(rows, specimen.transformers_rows(sequences), truth)


def embedding_gemma(**fields: Any) -> tuple[Any, dict[str, Any]]:
    """A model, and its FLAT tree with the two dense layers beside the transformer."""
    model, encoder = encoder_of("gemma3", use_bidirectional_attention=True, **fields)
    dense = {"Dense_0": {"kernel": DENSE}, "Dense_1": {"kernel": 0.5 - DENSE.T}}
    return model, flax.flat(leaves_of("gemma3", encoder, transposed_gating=True)) | dense


def test_dense_layers_of_embedding_gemma(tmp_path):
    model, tree = embedding_gemma()
    source = flax.save(tmp_path / "source", tree)
    model.config.save_pretrained(source)
    convert(source, tmp_path / "ours", dtype="float32")
    engine = Engine.load(tmp_path / "ours")
    sequence = models.random_ids(23)[0]
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([sequence])).last_hidden_state[0].numpy().astype(np.float64)
    expected = rows.mean(0) @ DENSE @ (0.5 - DENSE.T)
    np.testing.assert_allclose(engine.embed([sequence])[0], expected / np.linalg.norm(expected), atol=1e-5)


def test_published_shapes_need_no_config(tmp_path, monkeypatch):
    """Also rows of padding below the vocabulary, and the vision tower of a multimodal checkpoint."""
    model, encoder = encoder_of("gemma2")
    leaves = flax.leaves_of(encoder)
    padding = np.full((27, 48), 9, np.float32)
    leaves["embedder/input_embedding"] = np.concatenate([leaves["embedder/input_embedding"], padding])
    source = flax.save(tmp_path / "source", flax.flat(leaves) | MULTIMODAL)
    monkeypatch.setitem(PRESETS, "tiny", model.config.to_dict())
    check_as_hugging_face(model, source)
    assert read_checkpoint(tmp_path / "ours").manifest.source.dropped == {
        "rows of embedder/input_embedding beyond the vocabulary": 27,
        "SigLiPFromPatches_0/": 1,
        "embedder/mm_input_projection": 1,
        "embedder/mm_soft_embedding_norm/": 1,
    }


def test_encoder_decoder_is_known_by_its_names(tmp_path, monkeypatch):
    """T5Gemma 2B has the shapes of Gemma 2 2B."""
    (model, encoder), (gemma2, _) = encoder_of("t5gemma"), encoder_of("gemma2")
    source = flax.save(tmp_path / "source", flax.nested(leaves_of("t5gemma", encoder)))
    monkeypatch.setitem(PRESETS, "tiny gemma2", gemma2.config.to_dict())
    monkeypatch.setitem(PRESETS, "tiny t5gemma", model.config.to_dict())
    check_as_hugging_face(model, source)
    assert read_checkpoint(tmp_path / "ours").manifest.source.dropped == {"decoder/": 1}


def test_embedding_gemma_without_config_must_have_its_dense_layers(tmp_path, monkeypatch):
    model, tree = embedding_gemma()
    monkeypatch.setitem(PRESETS, "tiny", model.config.to_dict())
    whole = flax.save(tmp_path / "whole", tree)
    convert(whole, tmp_path / "ours", dtype="float32")
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "ours").weights["dense.0.weight"], DENSE.T)
    shutil.rmtree(tmp_path / "ours")
    shutil.rmtree(whole)
    encoder = flax.save(tmp_path / "encoder", {name: node for name, node in tree.items() if "Dense" not in name})
    assert "not its two dense layers" in refusal(encoder)
    model.config.save_pretrained(encoder)
    convert(encoder, tmp_path / "ours")
    assert read_checkpoint(tmp_path / "ours").head.dense == ()


@pytest.fixture
def source(tmp_path) -> Path:
    """A tiny Gemma in folders of zarr arrays, with its config."""
    return write_gemma(tmp_path / "source", **FOLDERS)


def write_gemma(path: Path, **storage: Any) -> Path:
    model, encoder = encoder_of("gemma", num_hidden_layers=1)
    flax.save(path, flax.flat(flax.leaves_of(encoder)), **storage)
    model.config.save_pretrained(path)
    return path


def refusal(source: Path) -> str:
    """The message with which a source is refused; nothing may stand where the result would have been."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(CheckpointError) as error:
        convert(source, source.parent / "refused", format="orbax")
    assert sorted(source.parent.iterdir()) == before
    return str(error.value)


def test_tokenizer_beside_the_folder_and_the_folder_above(tmp_path):
    """As Kaggle lays it out: 2b/ next to the tokenizer; either may be given."""
    home = tmp_path / "kaggle"
    home.mkdir()
    source = write_gemma(home / "2b", **DATABASE)
    tiny_models.make_tokenizer().save(str(home / "tokenizer.json"))
    for number, path in enumerate((source, home)):
        assert detect_format(path) == "orbax"
        convert(path, tmp_path / f"ours{number}")
        checkpoint = read_checkpoint(tmp_path / f"ours{number}")
        assert checkpoint.tokenizer_file is not None
        assert checkpoint.manifest.text.begin == 2
        prefix = "" if path == source else "2b/"
        assert f"{prefix}manifest.ocdbt" in checkpoint.manifest.source.files
    tiny_models.make_tokenizer().save(str(source / "tokenizer.json"))
    assert orbax.read_orbax(source).tokenizer_file == source / "tokenizer.json"
    write_gemma(home / "2b-it", **DATABASE)
    assert "several checkpoints" in refusal(home)
    assert detect_format(home) == "orbax"


def test_tokenizer_above_a_folder_with_steps_is_not_its_own(tmp_path):
    """Only where the given folder is that of the arrays is the one above looked at."""
    home = tmp_path / "home"
    write_gemma(home / "run" / "7", **DATABASE)
    tiny_models.make_tokenizer().save(str(home / "tokenizer.json"))
    assert orbax.read_orbax(home / "run").tokenizer_file is None
    assert orbax.read_orbax(home / "run" / "7").tokenizer_file is None
    shutil.move(home / "tokenizer.json", home / "run")
    for path in (home / "run", home / "run" / "7"):
        assert orbax.read_orbax(path).tokenizer_file == home / "run" / "tokenizer.json"


def test_steps_and_items_of_a_checkpoint_manager(tmp_path):
    model, encoder = encoder_of("gemma")
    tree = flax.nested(flax.leaves_of(encoder))
    with ocp.CheckpointManager(tmp_path / "one") as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
    with ocp.CheckpointManager(tmp_path / "two") as manager:
        other = ocp.args.StandardSave({"mu": np.ones(3)})
        manager.save(7, args=ocp.args.Composite(params=ocp.args.StandardSave(tree), optimizer=other))
    for run, item in (("one", "default"), ("two", "params")):
        model.config.save_pretrained(tmp_path / run / "7")
        for path in (tmp_path / run, tmp_path / run / "7"):
            assert detect_format(path) == "orbax"
            found = orbax.read_orbax(path)
            assert (found.config.num_layers, found.directory) == (3, path)
            assert path / "config.json" not in found.files
            assert {file.name for file in found.files} >= {"manifest.ocdbt", "_METADATA"}
            assert all(run_item in file.parts for file in found.files for run_item in (run, item))
    shutil.copytree(tmp_path / "one" / "7", tmp_path / "one" / "8")
    assert "several checkpoints" in refusal(tmp_path / "one")


def test_checkpoints_of_old_orbax(source):
    """Before 2024 the tree was in a file named "checkpoint"."""
    (source / "_METADATA").rename(source / "checkpoint")
    assert detect_format(source) == "orbax"
    shutil.rmtree(source / "transformer")
    assert not orbax.matches(source)


def test_formats_are_told_apart(tmp_path, source):
    """A Hugging Face model stays one, whatever lies in its folder."""
    model, _ = encoder_of("gemma")
    model.save_pretrained(tmp_path / "hugging_face")
    assert not orbax.matches(tmp_path / "hugging_face")
    source.rename(tmp_path / "hugging_face" / "training")
    assert detect_format(tmp_path / "hugging_face") == "hugging_face"
    assert not orbax.matches(tmp_path / "hugging_face" / "config.json")
    assert "not a folder with an Orbax checkpoint" in refusal(tmp_path / "hugging_face" / "config.json")


def test_rows_do_not_cost_a_whole_array_each(tmp_path, monkeypatch):
    """Every array is one chunk, which is decoded as a whole: it must be read once, however many pieces it gives."""
    source = write_gemma(tmp_path / "source", **FOLDERS)
    monkeypatch.setattr(tensors, "PIECE_BYTES", 256)  # one row and more

    def bytes_read() -> int:
        metric = "/tensorstore/kvstore/file/bytes_read"
        (found,) = tensorstore.experimental_collect_matching_metrics(metric)
        return sum(value["value"] for value in found["values"])

    before = bytes_read()
    convert(source, tmp_path / "ours")
    stored = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    assert bytes_read() - before < 2 * stored


def test_missing_library_is_named(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    assert "pip install 'funnel-engine[orbax]'" in refusal(source)


def test_missing_unknown_and_misshapen_parameters_are_listed(tmp_path):
    model, encoder = encoder_of("gemma2")
    leaves = flax.leaves_of(encoder)
    leaves["layer_0/attn/lora/a"] = leaves.pop("layer_1/mlp/linear/w")
    leaves["layer_2/pre_ffw_norm/scale"] = np.ones(47, np.float32)
    leaves["final_norm/scale"] = leaves["final_norm/scale"].astype(np.int32)
    source = flax.save(tmp_path / "source", flax.flat(leaves))
    model.config.save_pretrained(source)
    message = refusal(source)
    assert "missing: layer_1/mlp/linear (72, 48)" in message
    assert "unknown: 'layer_0/attn/lora/a' (72, 48)" in message
    assert "misshapen: layer_2/pre_ffw_norm/scale is (47,)" in message
    assert "dtype: final_norm/scale is 'int32'" in message


@pytest.mark.parametrize(
    ("bidirectional", "first", "second", "values"),
    [
        (False, "Dense_0", "Dense_1", [DENSE, DENSE.T]),
        (True, "Dense_1", "Dense_0", [DENSE, DENSE.T]),  # in order of name these are [67, 48] and [48, 67]
        (True, "Dense_0", "Dense_1", [DENSE, DENSE]),
        (True, "Dense_0", "Dense_1", [DENSE[:3], DENSE[:3].T]),
        (True, "transformer/layer_0/lora_a", "transformer/layer_0/lora_b", [DENSE, DENSE.T]),
    ],
)
def test_two_more_matrices_are_not_always_dense_layers(tmp_path, bidirectional, first, second, values):
    model, encoder = encoder_of("gemma3", use_bidirectional_attention=bidirectional)
    dense = {name: {"kernel": value} for name, value in zip((first, second), values, strict=True)}
    source = flax.save(tmp_path / "source", flax.flat(flax.leaves_of(encoder)) | dense)
    model.config.save_pretrained(source)
    message = refusal(source)
    assert message.count("unknown") == 2


def test_vocabulary_larger_than_the_table(source):
    edit_json(source / "config.json", vocab_size=102)
    assert "misshapen: embedder/input_embedding is (101, 48), but the config says (102, 48)" in refusal(source)


def test_gating_of_a_square_mlp_is_ambiguous(source):
    edit_json(source / "config.json", intermediate_size=48)
    assert "cannot be told apart" in refusal(source)


def test_unknown_architecture(source):
    (source / "config.json").unlink()
    assert "no published model" in refusal(source)


def test_other_models_and_empty_folders(tmp_path):
    tree = {"dense": {"kernel": np.ones((3, 4), np.float32)}, "embedder": {"input_embedding": np.ones(5, np.float32)}}
    assert "not a checkpoint of Gemma" in refusal(flax.save(tmp_path / "other", tree))
    (tmp_path / "empty").mkdir()
    assert "not a folder with an Orbax checkpoint" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "_METADATA").write_text("{}")
    assert "not a checkpoint of Gemma" in refusal(tmp_path / "empty")


def test_a_parameter_that_is_there_twice(tmp_path):
    _, encoder = encoder_of("gemma")
    leaves = flax.leaves_of(encoder)
    source = flax.save(tmp_path / "source", flax.nested(leaves) | flax.flat(leaves))
    assert "2 times" in refusal(source)
    source = flax.save(tmp_path / "stacked", flax.stacked(leaves, 1) | flax.flat(leaves))
    assert "2 times" in refusal(source)


@pytest.mark.parametrize("shape", [(), (1001, 1)])
def test_stacks_that_are_none(tmp_path, shape):
    _, encoder = encoder_of("gemma")
    tree = flax.stacked(flax.leaves_of(encoder))
    tree["transformer/stacked_layers/attention_type_1/pre_ffw_norm"] = {"scale": np.ones(shape, np.float32)}
    assert "not a stack of at most 1000 layers" in refusal(flax.save(tmp_path / "source", tree))


NORM = "transformer/layer_0/pre_ffw_norm.scale"


def test_missing_chunk_is_not_read_as_zeros(source):
    (source / NORM / "0").unlink()
    assert "missing" in refusal(source)


def test_truncated_chunk(source):
    chunk = source / "transformer/embedder.input_embedding/0.0"
    chunk.write_bytes(chunk.read_bytes()[:-40])
    message = refusal(source)
    assert "transformer/embedder.input_embedding" in message
    assert "damaged" in message


def test_damaged_description(source):
    (source / NORM / ".zarray").write_text("{")
    assert NORM in refusal(source)


def test_chunks_larger_than_their_array(source):
    """Reading one would fill the memory."""
    edit_json(source / NORM / ".zarray", chunks=[10**12])
    assert "larger than its shape" in refusal(source)


def test_damaged_database(tmp_path):
    source = write_gemma(tmp_path / "source", **DATABASE)
    manifest = (source / "manifest.ocdbt").read_bytes()
    (source / "manifest.ocdbt").write_bytes(manifest[:-3])
    assert "list of arrays" in refusal(source)
    (source / "manifest.ocdbt").write_bytes(manifest)
    convert(source, tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours")
    shutil.rmtree(source / "ocdbt.process_0")
    assert "damaged" in refusal(source)


def test_nothing_outside_the_folder_is_read(tmp_path, source):
    outside = tmp_path / "outside"
    chunk = source / NORM / "0"
    chunk.rename(outside)
    chunk.symlink_to(outside)
    assert "outside" in refusal(source)
    chunk.unlink()
    (source / NORM).rename(source / "elsewhere")
    (source / NORM).symlink_to(source / "elsewhere")
    assert str(source / NORM) in refusal(source)
    (source / NORM).unlink()
    (source / "link").symlink_to(source / "transformer")
    assert "neither a file nor a folder" in refusal(source)
    (source / "link").unlink()
    os.mkfifo(source / "pipe")
    assert "neither a file nor a folder" in refusal(source)


def test_links_of_a_hugging_face_cache(tmp_path):
    """Its snapshots are links to blobs."""
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "1"
    source = write_gemma(snapshot / "2b", **DATABASE)
    blobs.mkdir()
    for number, file in enumerate(sorted(file for file in source.rglob("*") if file.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    convert(snapshot, tmp_path / "ours")
    assert read_checkpoint(tmp_path / "ours").manifest.source.format == "orbax"


def test_keys_that_climb_out_of_the_folder(tmp_path, source):
    """What the reader relies on: tensorstore takes none, from whatever file it comes."""
    (tmp_path / "secret").write_text("secret")
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{source}/"}).result()
    for key in ("../secret", "transformer/../../secret", str(tmp_path / "secret")):
        with pytest.raises(ValueError, match="Invalid key"):
            store.read(key).result()


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_damage_anywhere_is_a_checkpoint_error_or_harmless(tmp_path, storage):
    source = write_gemma(tmp_path / "source", **storage)
    files = sorted(file for file in source.rglob("*") if file.is_file())
    generator = random.Random(0)
    messages = []
    for _ in range(80):
        file = generator.choice(files)
        content = file.read_bytes()
        file.write_bytes(damaged(content, generator))
        try:
            convert(source, tmp_path / "ours", overwrite=True, allow_nonfinite=True, format="orbax")
        except CheckpointError as error:
            messages.append(str(error))
        file.write_bytes(content)
    assert messages  # file names and places differ from run to run, so that how many is chance
    assert all("source" in message for message in messages)
    convert(source, tmp_path / "ours", overwrite=True)


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The bytes of a file with one value of its JSON replaced, some bytes changed, or the end cut off."""
    try:
        fields = json.loads(content)
    except ValueError:
        fields = None
    if isinstance(fields, dict) and fields and generator.random() < 0.7:
        node = fields
        key = generator.choice(sorted(node))
        while isinstance(node[key], dict) and node[key] and generator.random() < 0.7:
            node = node[key]
            key = generator.choice(sorted(node))
        values = (None, -1, 0, 10**15, 1e300, "", "<f8", [], [0], [10**9, 10**9], {}, {"id": "gzip"}, True)
        node[key] = generator.choice(values)
        return json.dumps(fields).encode()
    if content and generator.random() < 0.7:
        altered = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            altered[generator.randrange(len(altered))] = generator.randrange(256)
        return bytes(altered)
    return content[: generator.randrange(len(content) + 1)]
