"""What users give by mistake is named with its remedy, and what an encoder does not need does not matter."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hugging_face_models as models
from funnel_engine import CheckpointError, ConfigError, Engine, convert
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.inspection import inspect_checkpoint
from funnel_engine.messages import abbreviate, quote
from sentence_models import train_tokenizer, write_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path) -> Path:
    models.build(transformers.GemmaModel, models.gemma()).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def refusal(source: Path, **options) -> str:
    """The message of `convert`; `inspect` comes to the same verdict."""
    with pytest.raises(CheckpointError) as error:
        convert(source, source.parent / "ours", **options)
    problems = inspect_checkpoint(source, options.get("format"))["problems"]
    assert [line.strip() for line in str(error.value).splitlines()] == [line.strip() for line in problems]
    return str(error.value)


def weights(source: Path) -> dict[str, np.ndarray]:
    shutil.rmtree(source.parent / "ours", ignore_errors=True)
    convert(source, source.parent / "ours", dtype="float32")
    return {name: np.array(array) for name, array in read_checkpoint(source.parent / "ours").weights.items()}


def rename(source: Path, new_name) -> None:
    """Gives every tensor of the source another name."""
    tensors = load_file(source / WEIGHTS)
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, source / WEIGHTS)


STAND_INS = {
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 42\n", "Git LFS", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s42--4d7a.safetensors\n", "git-annex", "git annex get"),
    "annex link": (b"../.git/annex/objects/Zq/4K/SHA256E-s42--4d7a", "git-annex", "git annex get"),
    "page": (b"\n<!DOCTYPE html>\n<html><head>", "a web page", "download it again"),
    "page in capitals": (b"<HTML>", "a web page", "download it again"),
    "store": (b'<?xml version="1.0"?><Error>', "a web page", "download it again"),
    "gated": (b"Access to model google/gemma-2b is restricted.", "an error message of a server", "signed in"),
    "empty": (b"", "is empty", "fetch it again"),
}


@pytest.mark.parametrize(("content", "what", "remedy"), STAND_INS.values(), ids=STAND_INS)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json"])
def test_what_a_download_left_in_place_of_a_file(source, name, content, what, remedy):
    train_tokenizer().save(str(source / "tokenizer.json"))
    (source / name).write_bytes(content)
    message = refusal(source)
    assert str(source / name) in message
    assert what in message
    assert remedy in message


@pytest.mark.parametrize("name", ["gemma.ckpt", "model.weights.h5", "model.gguf", "no-ending"])
@pytest.mark.parametrize(("content", "what", "remedy"), STAND_INS.values(), ids=STAND_INS)
def test_a_file_of_any_format(tmp_path, name, content, what, remedy):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert what in message
    assert remedy in message


@pytest.mark.parametrize("name", ["weights.safetensors", "funnel.json"])
def test_a_pointer_in_a_checkpoint_of_ours(source, tmp_path, name):
    weights(source)
    (tmp_path / "ours" / name).write_bytes(STAND_INS["LFS"][0])
    with pytest.raises(CheckpointError, match=r"Git LFS.*git lfs pull"):
        Engine.load(tmp_path / "ours")


def test_a_link_whose_content_git_annex_has_not_fetched(source):
    (source / WEIGHTS).unlink()
    (source / WEIGHTS).symlink_to(".git/annex/objects/Zq/4K/SHA256E-s42--4d7a")
    assert "git annex get" in refusal(source)


def test_a_download_that_has_not_ended(source):
    (source / WEIGHTS).rename(source / "model.safetensors.incomplete")
    assert "has not finished: 'model.safetensors.incomplete'" in refusal(source)
    (source / CONFIG).unlink()
    assert "has not finished: 'model.safetensors.incomplete'" in refusal(source)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.fp16.safetensors", "tf_model.h5", "model.onnx"])
def test_weights_under_other_names_are_named(source, name):
    (source / WEIGHTS).rename(source / name)
    message = refusal(source)
    assert repr(name) in message
    assert "save_pretrained" in message


def test_an_adapter_that_is_not_lora(source):
    """LoRA is merged with its base."""
    write_json(source / "adapter_config.json", peft_type="IA3", base_model_name_or_path="google/gemma-2b")
    assert "peft_type is 'IA3'" in refusal(source)
    assert "merge_and_unload" in refusal(source)


def test_weights_that_are_merged_beside_what_is_left_of_an_adapter(source):
    write_json(source / "adapter_config.json", peft_type="LORA", r=8, lora_alpha=16)
    assert "already merged, delete adapter_config.json" in refusal(source)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantized, by 'bitsandbytes'",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized, by 'gptq'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized, by 'awq'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantized, by 'compressed-tensors'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized, by 'fp8'"),
        ({"compression_config": {"quant_method": "sparseml"}}, "quantized, by 'sparseml'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantized, by 'mlx'"),
    ],
)
def test_a_config_that_says_the_weights_are_quantized(source, fields, words):
    write_json(source / CONFIG, **fields)
    assert words in refusal(source)
    write_json(source / CONFIG, **dict.fromkeys(fields))
    weights(source)  # null is none


@pytest.mark.parametrize(
    ("suffix", "dtype", "writer"),
    [
        (".absmax", torch.float32, "bitsandbytes"),
        (".qweight", torch.int32, "GPTQ or AWQ"),
        ("_packed", torch.int32, "compressed-tensors"),
        ("_scale_inv", torch.float32, "fp8"),
        (".scales", torch.float32, "MLX"),
        (".lora_A.weight", torch.float32, "adapter"),
    ],
)
def test_tensors_show_who_has_quantized_them(source, suffix, dtype, writer):
    """Said before the list, which is cut; also without a word in the config."""
    tensors = load_file(source / WEIGHTS)
    more = {name + suffix: torch.ones(4, dtype=dtype) for name in tensors if "proj" in name}
    save_file(tensors | more, source / WEIGHTS)
    message = refusal(source)
    assert writer in message[:300]
    assert message.count("unknown: ") == 10
    assert f"and {len(more) - 10} more" in message


def test_weights_of_fp8(source):
    tensors = load_file(source / WEIGHTS)
    save_file(
        {name: tensor.to(torch.float8_e4m3fn) if "proj" in name else tensor for name, tensor in tensors.items()},
        source / WEIGHTS,
    )
    assert "fp8" in refusal(source)[:300]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
    ids=["compile", "parallel", "both", "other order", "a layer", "FSDP"],
)
def test_names_that_training_has_wrapped(source, wrap):
    expected = weights(source)
    rename(source, wrap)
    ours = weights(source)
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array)


def test_a_tensor_with_and_without_its_wrapper(source):
    tensors = load_file(source / WEIGHTS)
    save_file(tensors | {"_orig_mod.norm.weight": tensors["norm.weight"] + 1}, source / WEIGHTS)
    assert "'norm.weight' twice" in refusal(source)


# --------------------------------------------------------------------------- what an encoder does not need


def shard(source: Path, *more: str, file: str = "model-00001-of-00001.safetensors") -> None:
    tensors = {f"model.{name}": tensor for name, tensor in load_file(source / WEIGHTS).items()}
    (source / WEIGHTS).unlink()
    save_file(tensors, source / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors") | dict.fromkeys(more, file)
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("file", ["model-00001-of-00001.safetensors", "model-00002-of-00002.safetensors"])
def test_an_index_that_lists_what_an_encoder_does_not_need(source, file):
    """A tied output table that no shard has, or a shard that is not there and holds nothing else."""
    expected = weights(source)
    shard(source, "lm_head.weight", file=file)
    for name, array in weights(source).items():
        np.testing.assert_array_equal(array, expected[name])


def test_an_index_that_lists_what_is_not_there(source):
    shard(source, "model.more.weight")
    assert "does not match the files: 'model.more.weight" in refusal(source)


def test_one_file_counts_before_an_index(source):
    """As transformers has it."""
    expected = weights(source)
    (source / INDEX).write_text(json.dumps({"weight_map": {"norm.weight": "model-00001-of-00001.safetensors"}}))
    (source / "pytorch_model.bin").write_bytes(b"older")
    for name, array in weights(source).items():
        np.testing.assert_array_equal(array, expected[name])


def test_what_changes_no_result(source):
    """Fields and files that transformers or sentence-transformers read, but no result depends on."""
    train_tokenizer().save(str(source / "tokenizer.json"))

    def result() -> tuple:
        arrays = {name: array.tobytes() for name, array in weights(source).items()}
        manifest = read_checkpoint(source.parent / "ours").manifest
        return arrays, manifest.config, manifest.head, manifest.text

    expected = result()
    write_json(
        source / CONFIG,
        final_logit_softcapping=3.0,
        tie_word_embeddings=False,
        problem_type="regression",
        label2id={"A": 0},
        dtype="float16",
        torch_dtype="float16",
        use_cache=False,
        initializer_range=9.0,
        attention_dropout=0.5,
        attn_implementation="sdpa",
        _name_or_path="x",
        sentence_transformers={"activation_fn": "torch.nn.Tanh"},
        sbert_ce_default_activation_function="torch.nn.Tanh",
        auto_map={"AutoTokenizer": ["t.T", None]},
    )
    write_json(
        source / "tokenizer_config.json",
        padding_side="left",
        clean_up_tokenization_spaces=True,
        legacy=False,
        model_input_names=["input_ids"],
        chat_template="{{ bos_token }}{{ messages }}",
    )
    write_json(source / "generation_config.json", temperature=9.0)
    write_json(source / "config_sentence_transformers.json", prompts={"q": "query: "}, default_prompt_name="q")
    for name in ("chat_template.jinja", "README.md", "modeling_own.py", "model.fp16.safetensors", "model.gguf"):
        (source / name).write_bytes(b"anything")
    write_json(source / "adapter" / "adapter_config.json", peft_type="LORA")
    assert result() == expected


@pytest.mark.parametrize("field", ["transformers_weights", "configuration_files"])
def test_a_config_that_names_other_files(source, field):
    write_json(source / CONFIG, **{field: ["config.4.0.0.json"]})
    assert f"{field}=['config.4.0.0.json'] names files that this engine does not read" in refusal(source)


def test_number_of_labels(tmp_path):
    """transformers numbers as many labels as `num_labels` says where `id2label` names none."""
    model = models.build(transformers.GemmaForSequenceClassification, models.gemma())
    model.save_pretrained(tmp_path / "source")
    write_json(tmp_path / "source" / CONFIG, id2label=None, num_labels=models.LABELS)
    weights(tmp_path / "source")
    assert read_checkpoint(tmp_path / "ours").head.labels == tuple(f"LABEL_{number}" for number in range(models.LABELS))


# ------------------------------------------------------------------------------- paths, and types of options


def test_links_in_a_circle(source, tmp_path):
    (source / WEIGHTS).unlink()
    (source / WEIGHTS).symlink_to(WEIGHTS)
    assert "links form a circle" in refusal(source)
    (tmp_path / "loop").symlink_to("loop")
    for call in (lambda: Engine.load(tmp_path / "loop"), lambda: convert(tmp_path / "loop", tmp_path / "ours")):
        with pytest.raises(CheckpointError, match="circle"):
            call()


def test_a_folder_that_may_not_be_read(source, monkeypatch):
    """For root, whom nothing is forbidden, the system's answer is made up."""
    source.chmod(0)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    try:
        for call in (lambda: Engine.load(source), lambda: convert(source, source.parent / "ours")):
            with pytest.raises(CheckpointError, match=r"cannot read .*source: Permission denied; give this user"):
                call()
        assert "Permission denied" in inspect_checkpoint(source)["problems"][0]
    finally:
        source.chmod(0o700)


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("float32"), jnp.float32, jnp.bfloat16])
def test_dtypes_as_numpy_and_jax_have_them(source, tmp_path, dtype):
    convert(source, tmp_path / "ours", dtype=dtype)
    name = np.dtype(dtype).name
    assert read_checkpoint(tmp_path / "ours").dtype == name
    engine = Engine.load(tmp_path / "ours", dtype=dtype, max_batch_tokens=64)
    assert str(engine.params["embedding"].dtype) == name


@pytest.mark.parametrize("dtype", [None, 3, float, np.int16, "f4", ["float32"], object()])
def test_other_dtypes(source, tmp_path, dtype):
    with pytest.raises(ConfigError, match="dtype"):
        convert(source, tmp_path / "ours", dtype=dtype)


@pytest.mark.parametrize("options", [{"overwrite": "no"}, {"allow_nonfinite": 1}, {"format": 3}])
def test_options_of_another_type(source, tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        convert(source, tmp_path / "ours", **options)


def test_lists_in_messages_are_cut():
    names = [str(number) for number in range(1010)]
    assert quote(names) == ", ".join(map(repr, names[:10])) + " and 1,000 more"
    assert abbreviate(names) == [*names[:10], "and 1,000 more"]
    assert abbreviate(names[:10]) == names[:10]
