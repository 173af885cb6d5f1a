"""Whatever stands in the files of a source, the outcome is a clean conversion or a `CheckpointError`.

The source is a sentence-transformers folder with everything a reader looks at, and a LoRA adapter in it. One value of
one JSON file becomes another, or one of the safetensors headers does.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import transformers
from safetensors.torch import save_file

import hugging_face_models as models
from funnel_engine import CheckpointError, convert
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.inspection import inspect_checkpoint
from tiny_models import make_tokenizer

WIDTH = models.SIZES["hidden_size"]
JSON_FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"embedding_dimension": WIDTH, "pooling_mode": "mean", "include_prompt": True},
    "2_Dense/config.json": {
        "in_features": WIDTH,
        "out_features": 5,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    },
    "sentence_bert_config.json": {"max_seq_length": 100, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    "adapter_config.json": {
        "peft_type": "LORA",
        "base_model_name_or_path": "google/source",
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"o_proj": 5},
        "task_type": None,
        "init_lora_weights": True,
    },
    "tokenizer_config.json": {"add_bos_token": True, "add_eos_token": False, "bos_token": {"content": "<bos>"}},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz") / "source"
    config = models.gemma3(use_bidirectional_attention=True)
    models.build(transformers.Gemma3TextModel, config).save_pretrained(directory, max_shard_size="60KB")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in JSON_FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((5, WIDTH), generator=generator)
    save_file({"linear.weight": weight}, directory / "2_Dense" / "model.safetensors")
    module = "base_model.model.layers.0.self_attn.q_proj"
    matrices = {"A": torch.randn((3, WIDTH), generator=generator), "B": torch.randn((84, 3), generator=generator)}
    adapter = {f"{module}.lora_{name}.weight": matrix for name, matrix in matrices.items()}
    save_file(adapter, directory / "adapter_model.safetensors")
    return directory


def places(value: Any, prefix: tuple = ()) -> list[tuple]:
    """Where every value of a JSON document stands."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix] + [place for key, item in items for place in places(item, (*prefix, key))]


def replaced(document: Any, place: tuple, value: Any) -> Any:
    *parents, last = place
    target = document
    for key in parents:
        target = target[key]
    target[last] = value
    return document


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 600)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(
        ["..", "/", "../source", "1_Pooling", "mean", "gemma2", "t5gemma", "cls", "<unk>", "\ud800", "x" * 300]
    )
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


def outcome(source: Path) -> None:
    """Converts, and looks at the result; inspecting comes to the same verdict, except on the values of weights."""
    destination = source.parent / "ours"
    facts = inspect_checkpoint(source)
    try:
        convert(source, destination, dtype="float32")
    except CheckpointError:
        assert not destination.exists()
        return
    assert facts["problems"] == []
    read_checkpoint(destination, verify=True)
    shutil.rmtree(destination)


def test_the_source_itself_is_converted(source):
    convert(source, source.parent / "ours")
    assert read_checkpoint(source.parent / "ours").head.dense[0].out_features == 5
    shutil.rmtree(source.parent / "ours")


@hypothesis.settings(max_examples=250, deadline=None)
@hypothesis.given(data=st.data(), value=values)
def test_any_json(source, data, value):
    files = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.json"))
    files.remove("tokenizer.json")  # the tokenizers library's own
    file = source / data.draw(st.sampled_from(files))
    before = file.read_text()
    place = data.draw(st.sampled_from(places(json.loads(before))[1:]))
    try:
        file.write_text(json.dumps(replaced(json.loads(before), place, value)))
        outcome(source)
    finally:
        file.write_text(before)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(data=st.data(), value=values)
def test_any_safetensors_header(source, data, value):
    file = data.draw(st.sampled_from(sorted(source.rglob("*.safetensors"))))
    before = file.read_bytes()
    length = struct.unpack("<Q", before[:8])[0]
    header = json.loads(before[8 : 8 + length])
    place = data.draw(st.sampled_from(places(header)[1:]))
    text = json.dumps(replaced(header, place, value)).encode()
    try:
        file.write_bytes(struct.pack("<Q", len(text)) + text + before[8 + length :])
        outcome(source)
    finally:
        file.write_bytes(before)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(data=st.data())
def test_any_truncation_and_any_byte(source, data):
    file = data.draw(st.sampled_from(sorted(path for path in source.rglob("*") if path.is_file())))
    before = file.read_bytes()
    at = data.draw(st.integers(0, min(len(before) - 1, 4000)))
    byte = data.draw(st.none() | st.binary(min_size=1, max_size=1))
    try:
        file.write_bytes(before[:at] if byte is None else before[:at] + byte + before[at + 1 :])
        outcome(source)
    finally:
        file.write_bytes(before)
