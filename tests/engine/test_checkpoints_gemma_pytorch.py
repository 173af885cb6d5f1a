"""gemma_pytorch checkpoints become the weights that the same model has through Hugging Face; all else is refused.

The checkpoints are what gemma_pytorch's own classes save: PyTorch's parameters, fused and renamed by a table written
here.
"""

import json
import os
import random
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import hugging_face_models as models
from funnel_engine import CheckpointError, Engine, convert
from funnel_engine.checkpoints import tensors
from funnel_engine.checkpoints.formats import detect_format
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.presets import PRESETS
from sentence_models import train_sentencepiece

State = dict[str, torch.Tensor]
FAMILIES = {
    "gemma": ("GemmaModel", models.gemma),
    "gemma2": ("Gemma2Model", models.gemma2),
    "gemma3": ("Gemma3TextModel", models.gemma3),
}
VISION = {
    "siglip_vision_model.patch_embedding.weight": torch.ones(2, 3, 2, 2),
    "mm_soft_embedding_norm.weight": torch.ones(7),
    "mm_input_projection.weight": torch.ones(48, 7),
}
ROPE = torch.polar(torch.ones(3), torch.arange(3.0))


def make_model(family: str, **fields: Any) -> Any:
    class_name, config = FAMILIES[family]
    return models.build(getattr(transformers, class_name), config(**fields))


def state_of(model: Any, embedder: str = "embedder") -> State:
    """The state dict that gemma_pytorch's model of the same weights has."""
    theirs = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state = {f"{embedder}.weight": theirs["embed_tokens.weight"], "model.norm.weight": theirs["norm.weight"]}
    for layer in range(model.config.num_hidden_layers):
        inside, outside = f"layers.{layer}.", f"model.layers.{layer}."
        projections = [theirs.pop(f"{inside}self_attn.{name}_proj.weight") for name in "qkv"]
        state[f"{outside}self_attn.qkv_proj.weight"] = torch.cat(projections)
        for name in [name for name in theirs if name.startswith(inside)]:
            renamed = name.replace("q_norm", "query_norm").replace("k_norm", "key_norm")
            state[f"model.{renamed}"] = theirs[name]
    ropes = ("local_freqs_cis", "global_freqs_cis") if "gemma3" in model.config.model_type else ("freqs_cis",)
    return state | dict.fromkeys(ropes, ROPE)


def save(folder: Path, state: Any, config: Any = None, name: str = "model.ckpt") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"model_state_dict": state}, folder / name)
    if config is not None:
        config.save_pretrained(folder)
    return folder


def check_as_hugging_face(model: Any, source: Path, folder: Path, dtype: str = "float32") -> Path:
    """Every weight of the converted source is that of the model through Hugging Face; returns what was converted."""
    model.save_pretrained(folder / "hugging_face")
    convert(folder / "hugging_face", folder / "reference", dtype=dtype)
    convert(source, folder / "ours", dtype=dtype)
    expected, found = read_checkpoint(folder / "reference"), read_checkpoint(folder / "ours")
    assert found.manifest.source.format == "gemma_pytorch"
    assert (found.config, found.head) == (expected.config, expected.head)
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight, strict=True, err_msg=name)
    return folder / "ours"


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        convert(source, source.parent / "refused", **options)
    assert not (source.parent / "refused").exists()
    return str(error.value)


@pytest.fixture
def gemma2(tmp_path) -> Path:
    """A folder with model.ckpt and config.json."""
    model = make_model("gemma2")
    return save(tmp_path / "gemma2", state_of(model), model.config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family, dtype):
    model = make_model(family).to(getattr(torch, dtype))
    source = save(tmp_path / "source", state_of(model), model.config)
    assert detect_format(source) == "gemma_pytorch"
    checkpoint = check_as_hugging_face(model, source, tmp_path, dtype)
    dropped = {"local_freqs_cis": 1, "global_freqs_cis": 1} if family == "gemma3" else {"freqs_cis": 1}
    assert read_checkpoint(checkpoint).manifest.source.dropped == dropped


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers(tmp_path, family):
    model = make_model(family)
    source = save(tmp_path / "source", state_of(model), model.config)
    convert(source / "model.ckpt", tmp_path / "ours", dtype="float32")
    sequences = models.random_ids(1, 3, 30)
    ids, mask = models.pad(sequences)
    with torch.no_grad():
        rows = model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
    truth = [row[: len(sequence)] for row, sequence in zip(rows, sequences, strict=True)]
    assert models.worst(Engine.load(tmp_path / "ours").hidden_states(sequences), truth) < 2e-5


def test_multimodal_gemma_3_is_read_without_its_eyes(tmp_path):
    """Hugging Face's table has 64 rows more than gemma_pytorch's, and its config counts them."""
    model = make_model("gemma3")
    source = save(tmp_path / "source", state_of(model, "text_token_embedder") | VISION)
    config = model.config.to_dict() | {"vocab_size": model.config.vocab_size + 64}
    (source / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    checkpoint = check_as_hugging_face(model, source, tmp_path)
    dropped = read_checkpoint(checkpoint).manifest.source.dropped
    eyes = {"siglip_vision_model.": 1, "mm_soft_embedding_norm.": 1, "mm_input_projection.": 1}
    assert dropped == eyes | {"local_freqs_cis": 1, "global_freqs_cis": 1}


@pytest.mark.parametrize("scaler_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_dequantized_by_row(tmp_path, monkeypatch, family, scaler_dtype):
    monkeypatch.setattr(tensors, "PIECE_BYTES", 1000)  # a few rows, so that not every piece starts at row 0
    model, numbers, factors = (make_model(family) for _ in range(3))  # the second and third hold its two halves
    with torch.no_grad():
        for product, number, factor in zip(*(each.parameters() for each in (model, numbers, factors)), strict=True):
            if product.ndim == 2:
                factor.copy_((product.abs().amax(1, keepdim=True) / 127).to(scaler_dtype).expand_as(product))
                number.copy_((product / factor).round().clamp(-127, 127))
                product.copy_(number * factor)
    state, scalers = state_of(numbers), state_of(factors)
    for name, tensor in state_of(model).items():
        if tensor.ndim == 2:
            state |= {
                name: state[name].to(torch.int8),
                f"{name}_scaler": scalers[name][:, 0].to(scaler_dtype).contiguous(),
            }
    check_as_hugging_face(model, save(tmp_path / "source", state, model.config), tmp_path)


def test_shards_with_an_index(tmp_path):
    model = make_model("gemma3")
    source = write_shards(tmp_path / "source", state_of(model), model.config)
    assert detect_format(source) == "gemma_pytorch"
    checkpoint = check_as_hugging_face(model, source, tmp_path)
    assert set(read_checkpoint(checkpoint).manifest.source.files) == {"first.bin", "second.bin"}


def write_shards(folder: Path, state: State, config: Any, **weight_map: str) -> Path:
    """Shards are bare state dicts, as in gemma_pytorch's `load_weights`; every second tensor goes into the second."""
    folder.mkdir()
    config.save_pretrained(folder)
    files = {name: ("first.bin", "second.bin")[index % 2] for index, name in enumerate(state)}
    for file in ("first.bin", "second.bin"):
        torch.save({name: tensor for name, tensor in state.items() if files[name] == file}, folder / file)
    index = {"weight_map": files | weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def test_without_a_config_the_shapes_say_which_published_model_it_is(tmp_path, monkeypatch):
    model = make_model("gemma2")
    fields = json.loads(model.config.to_json_string())
    table = model.config.vocab_size + 64  # with rows for images, which the file does not have
    monkeypatch.setitem(PRESETS, "tiny", fields | {"vocab_size": table})
    source = save(tmp_path / "source", state_of(model))
    check_as_hugging_face(model, source, tmp_path)
    message = refusal(source, sliding_window=512)
    assert f"--sliding-window 512 replaces the value in config.json, but {source} has no config.json" in message
    state = state_of(make_model("gemma2", intermediate_size=73))
    assert "no published model has" in refusal(save(tmp_path / "other", state))


def test_config_of_another_family(tmp_path):
    """A Llama has tensors of the same shapes, but its norms mean something else."""
    source = save(tmp_path / "source", state_of(make_model("gemma")), models.llama())
    message = refusal(source)
    assert f"{source / 'config.json'} is that of a llama, which is not read in this format" in message
    source = save(tmp_path / "biased", state_of(make_model("gemma")), models.gemma(attention_bias=True))
    assert "is that of a gemma whose attention has biases, which is not read in this format" in refusal(source)


def test_tokenizer_beside_the_checkpoint(tmp_path):
    model = make_model("gemma2", vocab_size=512)
    source = save(tmp_path / "source", state_of(model), model.config)
    (source / "tokenizer.model").write_bytes(train_sentencepiece())
    convert(source, tmp_path / "ours", dtype="float32")
    text = read_checkpoint(tmp_path / "ours").manifest.text
    assert (text.begin, text.end) == (2, None)
    engine = Engine.load(tmp_path / "ours")
    bare = engine.hidden_states(["a small funnel", "pools"])
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    ids = [[2, *processor.encode(words)] for words in ("a small funnel", "pools")]
    assert models.worst(bare, engine.hidden_states(ids)) == 0


def test_tensors_may_share_a_storage_and_start_inside_it(tmp_path):
    model = make_model("gemma")
    state = state_of(model)
    table = state["embedder.weight"]
    padded = torch.full((table.shape[0] + 5, table.shape[1]), 7.0)
    padded[3:-2] = table
    state["embedder.weight"] = padded[3:-2]
    norms = torch.stack([state["model.layers.0.input_layernorm.weight"], state["model.norm.weight"]])
    state |= {"model.layers.0.input_layernorm.weight": norms[0], "model.norm.weight": norms[1]}
    check_as_hugging_face(model, save(tmp_path / "source", state, model.config), tmp_path)


def test_a_pickle_that_wants_to_run_code_is_refused(gemma2):
    proof = gemma2 / "proof"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    for content in ({"model_state_dict": {"embedder.weight": Attack()}}, Attack(), {"harmless": 1, "x": Attack()}):
        torch.save(content, gemma2 / "model.ckpt")
        torch.load(gemma2 / "model.ckpt", weights_only=False)
        proof.rmdir()  # the attack is real: an unsafe load runs it
        assert "would run code" in refusal(gemma2)
        assert not proof.exists()


@pytest.mark.parametrize(
    ("first", "again", "words"),
    [
        (b"NN\x86", b"h\x00\x86", "nests more values"),  # t = (t, t)
        (b")", b"(" + b"h\x00" * 40 + b"t", "nests more values"),  # wide rather than deep
        (b")", b"\x85" * 15_000, "nests more values"),  # ((((...)))), on which a recursion would end in a crash
        (b"N0" * 600_000 + b")", b"", "but names of tensors need at most 1,000,000"),
    ],
)
def test_a_pickle_that_never_ends_is_refused(gemma2, first, again, words):
    """A few hundred bytes may hold a tuple of 2^60 values, which torch would hash as the key of a dict."""
    pickle = b"\x80\x02" + first + b"q\x00" + (again + b"q\x00") * 60 + b"}h\x00Ns."
    rewrite(gemma2 / "model.ckpt", **{"data.pkl": pickle})
    assert words in refusal(gemma2)


def test_torch_itself_does_not_run_code_either(gemma2, monkeypatch):
    """What the list of a pickle's functions does not show still meets `weights_only=True`."""
    monkeypatch.setattr(torch.serialization, "get_unsafe_globals_in_checkpoint", lambda file: [])
    proof = gemma2 / "proof"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    torch.save({"model_state_dict": {"embedder.weight": Attack()}}, gemma2 / "model.ckpt")
    assert "damaged, or not a checkpoint of tensors" in refusal(gemma2)
    assert not proof.exists()


def test_a_folder_needs_exactly_one_checkpoint(gemma2):
    shutil.copy(gemma2 / "model.ckpt", gemma2 / "other.ckpt")
    assert "'model.ckpt', 'other.ckpt'; give the path of one of them" in refusal(gemma2)
    (gemma2 / "model.ckpt").unlink()
    (gemma2 / "other.ckpt").unlink()
    assert "neither a .ckpt nor pytorch_model.bin.index.json" in refusal(gemma2, format="gemma_pytorch")
    assert "does not exist" in refusal(gemma2 / "model.ckpt", format="gemma_pytorch")
    os.mkfifo(gemma2 / "model.ckpt")  # whoever opens it waits for the one who writes
    assert "is not a regular file; fetch it again" in refusal(gemma2)


def test_a_folder_with_safetensors_is_not_taken_for_gemma_pytorch(tmp_path):
    model = make_model("gemma2")
    source = save(tmp_path / "source", state_of(model))
    model.save_pretrained(source)
    assert detect_format(source) == "hugging_face"


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_hugging_face_pytorch_model_is_named(tmp_path, prefix):
    model = make_model("gemma2")
    file = tmp_path / "pytorch_model.bin"
    torch.save({prefix + name: tensor for name, tensor in model.state_dict().items()}, file)
    message = refusal(file)
    assert "Hugging Face pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_torch_is_not_installed(gemma2, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'funnel-engine[torch]'" in refusal(gemma2)


def test_a_torch_that_does_not_say_where_values_lie(gemma2, monkeypatch):
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, map_location, weights_only: load(file, weights_only=weights_only))
    assert "needs torch 2.11 or newer" in refusal(gemma2)


def break_missing(state: State) -> None:
    del state["model.layers.1.self_attn.qkv_proj.weight"]


def break_unknown(state: State) -> None:
    state["model.layers.1.self_attn.qkv_proj.bias"] = torch.ones(3)


def break_shape(state: State) -> None:
    state["model.layers.1.mlp.gate_proj.weight"] = torch.ones(48, 72)


def break_dtype(state: State) -> None:
    state["model.norm.weight"] = torch.ones(48, dtype=torch.float64)


def break_lone_int8(state: State) -> None:
    state["model.layers.1.mlp.up_proj.weight"] = torch.ones(72, 48, dtype=torch.int8)


def break_lone_scaler(state: State) -> None:
    state["model.layers.1.mlp.up_proj.weight_scaler"] = torch.ones(72)


def break_short_scaler(state: State) -> None:
    break_lone_int8(state)
    state["model.layers.1.mlp.up_proj.weight_scaler"] = torch.ones(48)


def break_scaler_dtype(state: State) -> None:
    break_lone_int8(state)
    state["model.layers.1.mlp.up_proj.weight_scaler"] = torch.ones(72, dtype=torch.int32)


def break_view(state: State) -> None:
    state["model.layers.1.mlp.up_proj.weight"] = torch.ones(48, 72).t()


def break_table(state: State) -> None:
    state["embedder.weight"] = torch.ones(48)


def break_empty_table(state: State) -> None:
    state["embedder.weight"] = torch.ones(0, 48)


def break_names(state: State) -> None:
    state["wte.weight"] = state.pop("embedder.weight")


def break_screen(state: State) -> None:
    break_names(state)
    state |= {"\x1b[2J" * 9: ROPE}
    for name in list(state)[:-1]:
        state[name] = state.pop(name)


def break_nan(state: State) -> None:
    state["model.layers.2.mlp.down_proj.weight"][40, 7] = float("nan")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_missing, "missing: model.layers.1.self_attn.qkv_proj.weight (140, 48)"),
        (break_unknown, "unknown: 'model.layers.1.self_attn.qkv_proj.bias' (3,)"),
        (break_shape, "misshapen: model.layers.1.mlp.gate_proj.weight is (48, 72)"),
        (break_dtype, "model.norm.weight is 'float64'"),
        (break_lone_int8, "model.layers.1.mlp.up_proj.weight is 'int8'"),
        (break_lone_scaler, "unknown: 'model.layers.1.mlp.up_proj.weight_scaler'"),
        (break_short_scaler, "unknown: 'model.layers.1.mlp.up_proj.weight_scaler'"),
        (break_scaler_dtype, "unknown: 'model.layers.1.mlp.up_proj.weight_scaler'"),
        (break_view, "tensor 'model.layers.1.mlp.up_proj.weight' are not in order"),
        (break_table, "must have one matrix"),
        (break_empty_table, "must have one matrix"),
        (break_names, "must have one matrix"),
        (break_screen, r"tensors are '\x1b[2J\x1b[2J"),
        (break_nan, "model.layers.2.mlp.down_proj.weight"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, damage, words):
    model = make_model("gemma2")
    state = state_of(model)
    damage(state)
    assert words in refusal(save(tmp_path / "source", state, model.config))


@pytest.mark.parametrize(
    "content", [torch.ones(3), {"state_dict": {}}, {"model_state_dict": [torch.ones(3)]}, {"a": 1}]
)
def test_files_of_other_programs(tmp_path, content):
    torch.save(content, tmp_path / "model.ckpt")
    assert "it has no model_state_dict" in refusal(tmp_path / "model.ckpt")


def test_a_file_older_than_pytorch_1_6(gemma2):
    content = torch.load(gemma2 / "model.ckpt", weights_only=True)
    torch.save(content, gemma2 / "model.ckpt", _use_new_zipfile_serialization=False)
    assert "older than PyTorch 1.6" in refusal(gemma2)
    assert torch.load(gemma2 / "model.ckpt", weights_only=True)["model_state_dict"].keys()  # so the remedy works


def rewrite(file: Path, compression: int = zipfile.ZIP_STORED, **contents: Any) -> None:
    """Writes a zip anew; `contents` replace what ends in their names, or change it if they are functions."""
    with zipfile.ZipFile(file) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, content in records.items():
            if name.endswith("/.format_version"):
                continue  # files of torch before 2.7 do not have it; with it, torch relies on the original zip
            change = contents.get(name.rpartition("/")[2], content)
            new.writestr(name, change(content) if callable(change) else change)


def test_a_file_of_an_older_torch(gemma2, tmp_path):
    rewrite(gemma2 / "model.ckpt")
    check_as_hugging_face(make_model("gemma2"), gemma2, tmp_path)


def test_what_no_torch_save_writes(gemma2):
    whole = (gemma2 / "model.ckpt").read_bytes()
    rewrite(gemma2 / "model.ckpt", zipfile.ZIP_DEFLATED)
    assert "is compressed" in refusal(gemma2)
    (gemma2 / "model.ckpt").write_bytes(whole)
    rewrite(gemma2 / "model.ckpt", byteorder=b"big")  # torch itself would end with a segmentation fault
    assert "little-endian" in refusal(gemma2)
    (gemma2 / "model.ckpt").write_bytes(whole)
    rewrite(gemma2 / "model.ckpt", byteorder=b"little" * 1000)
    assert "little-endian" in refusal(gemma2)
    (gemma2 / "model.ckpt").write_bytes(whole)
    rewrite(gemma2 / "model.ckpt", **{"3": lambda content: content[:-4]})
    assert "are not where torch.save writes them" in refusal(gemma2)
    (gemma2 / "model.ckpt").write_bytes(whole)
    longer = b"KeK0", b"KfK0"  # in the pickle, a table of [101, 48] becomes one of [102, 48]
    rewrite(gemma2 / "model.ckpt", **{"data.pkl": lambda content: content.replace(*longer)})
    assert "tensor 'embedder.weight' are not where torch.save writes them" in refusal(gemma2)
    (gemma2 / "model.ckpt").write_bytes(whole[:-1000])
    assert "not a complete file" in refusal(gemma2)


def test_shards_that_do_not_fit_together(tmp_path):
    model = make_model("gemma2")
    state, config = state_of(model), model.config
    outside = write_shards(tmp_path / "outside", state, config, **{"model.norm.weight": "../first.bin"})
    assert "'../first.bin', which is not the name of a file in" in refusal(outside)
    gone = write_shards(tmp_path / "gone", state, config, **{"model.norm.weight": "third.bin"})
    assert "lists 'third.bin', which are not in the same folder" in refusal(gone)
    moved = write_shards(tmp_path / "moved", state, config, **{"embedder.weight": "second.bin"})
    assert "does not match the files: 'embedder.weight in first.bin', 'embedder.weight in second.bin'" in refusal(moved)
    absent = write_shards(tmp_path / "absent", state, config, extra="first.bin")
    assert "does not match the files: 'extra in first.bin'" in refusal(absent)
    twice = write_shards(tmp_path / "twice", state, config)
    shutil.copy(twice / "first.bin", twice / "second.bin")
    assert "which another file contains too" in refusal(twice)
    (twice / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": 1}}')
    assert "weight_map.a is 1" in refusal(twice)


def test_whatever_the_bytes_are_the_outcome_is_a_conversion_or_a_refusal(gemma2, tmp_path):
    whole = (gemma2 / "model.ckpt").read_bytes()
    with zipfile.ZipFile(gemma2 / "model.ckpt") as archive:
        pickle_end = archive.getinfo("model/data.pkl").file_size + 100
        directory = archive.start_dir
    generator = random.Random(0)
    outcomes = {"converted": 0, "refused": 0}
    for round_number in range(300):
        damaged = bytearray(whole)
        begin, end = [(0, pickle_end), (directory, len(whole)), (0, len(whole))][round_number % 3]
        for _ in range(generator.choice([1, 1, 2, 8])):
            damaged[generator.randrange(begin, end)] = generator.choice(
                [0, 1, 0x2E, 0x7F, 0xFF, generator.randrange(256)]
            )
        if round_number % 10 == 0:
            del damaged[generator.randrange(len(whole)) :]
        (gemma2 / "model.ckpt").write_bytes(damaged)
        outcomes[attempt(gemma2, tmp_path / "ours")] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_whatever_the_state_dict_is_the_outcome_is_a_conversion_or_a_refusal(tmp_path):
    model = make_model("gemma3")
    whole = state_of(model)
    generator = random.Random(1)
    changes = [
        lambda tensor: tensor.to(torch.float16),
        lambda tensor: tensor.to(torch.int8),
        lambda tensor: tensor[..., :0],
        lambda tensor: tensor.sum(),
        lambda tensor: tensor.unsqueeze(0),
        lambda tensor: tensor.t() if tensor.ndim == 2 else tensor[::2],
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor * float("inf"),
        lambda tensor: torch.nn.Parameter(tensor),
        lambda tensor: tensor.tolist(),
        lambda tensor: None,
    ]
    outcomes = {"converted": 0, "refused": 0}
    for _ in range(60):
        state: dict[Any, Any] = dict(whole)
        name = generator.choice([name for name in state if not name.endswith("cis")])
        state[generator.choice([name, name, name, f"{name}_scaler", 7])] = generator.choice(changes)(state[name])
        outcomes[attempt(save(tmp_path / "source", state, model.config), tmp_path / "ours")] += 1
    assert min(outcomes.values()) > 5, outcomes


def attempt(source: Path, destination: Path) -> str:
    try:
        convert(source, destination, dtype="float32", overwrite=True)
    except CheckpointError:
        return "refused"
    return "converted"
