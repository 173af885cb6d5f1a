"""Hugging Face directories of every family become our weights, and whatever does not fit is refused by name.

The oracle is PyTorch: `state_dict` of the encoder, fused by a table written here, rounded by `Tensor.to`.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hugging_face_models as models
from funnel_engine.checkpoints.convert import convert
from funnel_engine.checkpoints.native import Checkpoint, read_checkpoint
from funnel_engine.hugging_face_config import read_model_config
from funnel_kernels import CheckpointError, ConfigError
from tiny_models import make_tokenizer

GEMMA_1_NORMS = {"attention_input_norm": "input_layernorm", "mlp_input_norm": "post_attention_layernorm"}
GEMMA_2_NORMS = {
    "attention_input_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_input_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
GEMMA_3_NORMS = GEMMA_2_NORMS | {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
T5GEMMA_NORMS = GEMMA_2_NORMS | {
    "attention_input_norm": "pre_self_attn_layernorm",
    "attention_output_norm": "post_self_attn_layernorm",
}
NORMS = {
    "gemma": GEMMA_1_NORMS,
    "gemma2": GEMMA_2_NORMS,
    "gemma3_text": GEMMA_3_NORMS,
    "t5gemma": T5GEMMA_NORMS,
    "llama": GEMMA_1_NORMS,
    "mistral": GEMMA_1_NORMS,
    "qwen3": GEMMA_1_NORMS | {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"},
    "eurobert": GEMMA_1_NORMS,
}


def multimodal() -> transformers.Gemma3Config:
    vision = {
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return transformers.Gemma3Config(text_config=models.gemma3().to_dict(), vision_config=vision, mm_tokens_per_image=4)


def whole_t5gemma() -> transformers.T5GemmaConfig:
    config = models.t5gemma()
    config.is_encoder_decoder = True
    return config


def untied_gemma() -> transformers.GemmaConfig:
    return models.gemma(tie_word_embeddings=False)


def tied_qwen3() -> transformers.Qwen3Config:
    return models.qwen3(tie_word_embeddings=True)


def untied_t5gemma() -> transformers.T5GemmaConfig:
    config = whole_t5gemma()
    config.tie_word_embeddings = False
    return config


# model class, its config, what is dropped of it
ENCODERS: list[tuple[str, Callable[[], transformers.PreTrainedConfig], set[str]]] = [
    ("GemmaModel", models.gemma, set()),
    ("GemmaForCausalLM", models.gemma, set()),
    ("GemmaForCausalLM", untied_gemma, {"lm_head.weight"}),
    ("Gemma2Model", models.gemma2, set()),
    ("Gemma2ForCausalLM", models.gemma2, set()),
    ("Gemma3TextModel", models.gemma3, set()),
    ("Gemma3ForCausalLM", models.gemma3, set()),
    ("Gemma3Model", multimodal, {"vision_tower.", "multi_modal_projector."}),
    ("Gemma3ForConditionalGeneration", multimodal, {"vision_tower.", "multi_modal_projector."}),
    ("T5GemmaEncoderModel", models.t5gemma, set()),
    ("T5GemmaModel", whole_t5gemma, {"decoder."}),
    ("T5GemmaForConditionalGeneration", whole_t5gemma, {"model.decoder."}),
    ("T5GemmaForConditionalGeneration", untied_t5gemma, {"model.decoder.", "lm_head.out_proj.weight"}),
    ("LlamaModel", models.llama, set()),
    ("LlamaForCausalLM", models.llama, {"lm_head.weight"}),
    ("MistralModel", models.mistral, set()),
    ("MistralForCausalLM", models.mistral, {"lm_head.weight"}),
    ("Qwen3Model", models.qwen3, set()),
    ("Qwen3ForCausalLM", models.qwen3, {"lm_head.weight"}),
    ("Qwen3ForCausalLM", tied_qwen3, set()),
    ("EuroBertModel", models.eurobert, set()),
    ("EuroBertForMaskedLM", models.eurobert, {"lm_head.weight"}),
]
CLASSIFIERS: list[tuple[str, Callable[[], transformers.PreTrainedConfig], str, bool]] = [
    ("GemmaForSequenceClassification", models.gemma, "classify", False),
    ("GemmaForTokenClassification", models.gemma, "tag", True),
    ("Gemma2ForSequenceClassification", models.gemma2, "classify", False),
    ("Gemma2ForTokenClassification", models.gemma2, "tag", True),
    ("Gemma3TextForSequenceClassification", models.gemma3, "classify", False),
    ("Gemma3ForSequenceClassification", multimodal, "classify", False),
    ("T5GemmaForSequenceClassification", models.t5gemma, "classify", True),
    ("T5GemmaForTokenClassification", models.t5gemma, "tag", True),
    ("LlamaForSequenceClassification", models.llama, "classify", False),
    ("LlamaForTokenClassification", models.llama, "tag", True),
    ("MistralForSequenceClassification", models.mistral, "classify", False),
    ("MistralForTokenClassification", models.mistral, "tag", True),
    ("Qwen3ForSequenceClassification", models.qwen3, "classify", False),
    ("Qwen3ForTokenClassification", models.qwen3, "tag", True),
    ("EuroBertForTokenClassification", models.eurobert, "tag", True),
]


def encoder_of(model: torch.nn.Module) -> torch.nn.Module:
    """The module whose parameters are the encoder's, however deep it lies."""
    for name in ("model", "language_model", "encoder"):
        model = getattr(model, name, model)
    return model


def fused(model: torch.nn.Module, family: str) -> dict[str, torch.Tensor]:
    """The encoder's weights by our names, float32."""
    encoder = encoder_of(model)
    state = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    zero = 1.0 if family in models.FACTOR_NORMS else 0.0  # what a factor of 1 is stored as
    weights = {"embedding": state["embed_tokens.weight"], "final_norm": state["norm.weight"] - zero}
    for layer in range(models.SIZES["num_hidden_layers"]):

        def get(*names: str, layer: int = layer) -> torch.Tensor:
            return torch.cat([state[f"layers.{layer}.{name}.weight"] for name in names])

        parts = {
            "qkv": get("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attention_output": get("self_attn.o_proj"),
            "gate_up": get("mlp.gate_proj", "mlp.up_proj"),
            "down": get("mlp.down_proj"),
        } | {ours: get(theirs) - zero for ours, theirs in NORMS[family].items()}
        weights |= {f"layers.{layer}.{name}": tensor for name, tensor in parts.items()}
    return weights


def save(model: transformers.PreTrainedModel, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def check_weights(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert checkpoint.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        ours = checkpoint.weights[name]
        dtype = "float32" if name.endswith("_norm") else checkpoint.dtype
        assert str(ours.dtype) == dtype
        theirs = tensor.detach().to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(ours.astype(np.float32), theirs, strict=True, err_msg=name)


def build(class_name: str, config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    return models.build(getattr(transformers, class_name), config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("class_name", "make_config", "dropped"), ENCODERS)
def test_encoder_of_every_family(tmp_path, class_name, make_config, dropped, dtype):
    model = build(class_name, make_config())
    source = save(model, tmp_path / "source")
    convert(source, tmp_path / "ours", dtype=dtype)
    checkpoint = read_checkpoint(tmp_path / "ours")
    assert checkpoint.config == read_model_config(json.loads((source / "config.json").read_text()))
    assert (checkpoint.head.pooling, checkpoint.head.task, checkpoint.dtype) == ("mean", None, dtype)
    assert checkpoint.manifest.source.format == "hugging_face"
    assert set(checkpoint.manifest.source.files) == {"model.safetensors"}
    assert set(checkpoint.manifest.source.dropped) == dropped
    check_weights(checkpoint, fused(model, checkpoint.config.family))


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize(("class_name", "make_config", "task", "bias"), CLASSIFIERS)
def test_classifier_of_every_family(tmp_path, class_name, make_config, task, bias, labels):
    config = make_config()
    config.num_labels = 2  # the default, which a saved config leaves out
    if labels == 3:
        config.id2label = {0: "neither", 1: "nor", 2: "both"}
    model = build(class_name, config)
    save(model, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", dtype="float32")
    checkpoint = read_checkpoint(tmp_path / "ours")
    assert (checkpoint.head.task, checkpoint.head.classifier_bias) == (task, bias)
    assert checkpoint.head.labels == (("neither", "nor", "both") if labels == 3 else ("LABEL_0", "LABEL_1"))
    score = model.classifier if class_name.startswith("EuroBert") else model.score
    linear = getattr(score, "out_proj", score)
    head = {"classifier.weight": linear.weight} | ({"classifier.bias": linear.bias} if bias else {})
    check_weights(checkpoint, fused(model, checkpoint.config.family) | head)


def test_frequencies_that_old_versions_of_transformers_saved(tmp_path):
    """Of a Llama before version 4.32: a buffer in each layer, which newer versions leave out and make anew."""
    model = build("LlamaForCausalLM", models.llama())
    source = save(model, tmp_path / "source")
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(7) for layer in range(3)}
    edit_tensors(source, lambda tensors: tensors | buffers)
    convert(source, tmp_path / "ours", dtype="float32")
    checkpoint = read_checkpoint(tmp_path / "ours")
    check_weights(checkpoint, fused(model, "llama"))
    assert checkpoint.manifest.source.dropped == {"lm_head.weight": 1, ".rotary_emb.inv_freq": 3}


def test_prefix_of_qwen3_embedding(tmp_path):
    """It is published without "model.", although its architecture is `Qwen3ForCausalLM`."""
    model = build("Qwen3Model", models.qwen3())
    source = save(model, tmp_path / "source")
    edit_json(source / "config.json", architectures=["Qwen3ForCausalLM"])
    convert(source, tmp_path / "ours", dtype="float32")
    check_weights(read_checkpoint(tmp_path / "ours"), fused(model, "qwen3"))


def test_classifier_of_eurobert(tmp_path):
    source = save(build("EuroBertForSequenceClassification", models.eurobert()), tmp_path / "source")
    message = refusal(source)
    assert "EuroBertForSequenceClassification has a dense layer and GELU before its classifier" in message
    assert "save the encoder alone (model.model.save_pretrained)" in message
    build("EuroBertForSequenceClassification", models.eurobert()).model.save_pretrained(tmp_path / "encoder")
    convert(tmp_path / "encoder", tmp_path / "ours")  # the remedy
    assert read_checkpoint(tmp_path / "ours").head.task is None


def test_answers_in_a_text_are_no_task_here(tmp_path):
    source = save(build("Qwen3ForQuestionAnswering", models.qwen3()), tmp_path / "source")
    message = refusal(source)
    assert "unknown: 'qa_outputs.weight'" in message


def test_biases_that_the_config_does_not_mention(tmp_path):
    source = save(build("Qwen3Model", models.qwen3(attention_bias=True)), tmp_path / "source")
    edit_json(source / "config.json", attention_bias=False)
    assert "unknown: 'layers.0.self_attn.q_proj.bias' (84,)" in refusal(source)
    source = save(build("Qwen3Model", models.qwen3()), tmp_path / "without")
    edit_json(source / "config.json", attention_bias=True)
    assert "missing: layers.0.self_attn.q_proj.bias (84,)" in refusal(source)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_biases(tmp_path, dtype):
    """Each of ours has the rows of its weight, in the same order."""
    model = build("LlamaModel", models.llama(attention_bias=True, mlp_bias=True))
    convert(save(model, tmp_path / "source"), tmp_path / "ours", dtype=dtype)
    state = model.state_dict()
    biases = {
        f"layers.{layer}.{ours}_bias": torch.cat([state[f"layers.{layer}.{name}_proj.bias"] for name in names])
        for layer in range(models.SIZES["num_hidden_layers"])
        for ours, names in {
            "qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
            "attention_output": ("self_attn.o",),
            "gate_up": ("mlp.gate", "mlp.up"),
            "down": ("mlp.down",),
        }.items()
    }
    check_weights(read_checkpoint(tmp_path / "ours"), fused(model, "llama") | biases)


@pytest.mark.parametrize(
    ("fields", "tensor"),
    [
        ({"num_hidden_layers": 2}, "unknown: 'layers.2.self_attn.q_norm.weight'"),
        ({"num_hidden_layers": 4, "layer_types": None}, "missing: layers.3.self_attn.q_norm.weight (14,)"),
        ({"head_dim": 16}, "layers.0.self_attn.q_proj.weight is (84, 48), but the config says (96, 48)"),
        ({"num_key_value_heads": 3}, "layers.0.self_attn.k_proj.weight is (28, 48), but the config says (42, 48)"),
        ({"model_type": "llama"}, "unknown: 'layers.0.self_attn.q_norm.weight'"),
    ],
)
def test_config_whose_layers_disagree_with_the_tensors(tmp_path, fields, tensor):
    source = save(build("Qwen3Model", models.qwen3()), tmp_path / "source")
    layer_types = {"layer_types": ["full_attention"] * fields.get("num_hidden_layers", 3)}
    edit_json(source / "config.json", **layer_types | fields)
    assert tensor in refusal(source)


@pytest.mark.parametrize(
    ("prefix", "vision_prefix", "lm_head"),
    [
        ("model.language_model.", "model.", "lm_head.weight"),
        ("language_model.model.", "", "language_model.lm_head.weight"),
        ("language_model.", "", "lm_head.weight"),
    ],
)
def test_prefixes_of_multimodal_gemma_3(tmp_path, prefix, vision_prefix, lm_head):
    model = build("Gemma3ForConditionalGeneration", multimodal())
    source = save(model, tmp_path / "source")
    saved = "language_model.model."

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {
            name: prefix + name.removeprefix(saved) if name.startswith(saved) else vision_prefix + name
            for name in tensors
        }
        head = tensors[f"{saved}embed_tokens.weight"].clone()
        return {names[name]: tensor for name, tensor in tensors.items()} | {lm_head: head}

    edit_tensors(source, rename)
    convert(source, tmp_path / "ours", dtype="float32")
    checkpoint = read_checkpoint(tmp_path / "ours")
    check_weights(checkpoint, fused(model, "gemma3_text"))
    dropped = {lm_head, f"{vision_prefix}vision_tower.", f"{vision_prefix}multi_modal_projector."}
    assert set(checkpoint.manifest.source.dropped) == dropped


def test_sharded(tmp_path):
    model = build("Gemma2ForCausalLM", models.gemma2())
    source = save(model, tmp_path / "source", max_shard_size="50KB")
    shards = list(source.glob("model-*.safetensors"))
    assert len(shards) > 2
    convert(source, tmp_path / "ours")
    checkpoint = read_checkpoint(tmp_path / "ours")
    check_weights(checkpoint, fused(model, "gemma2"))
    assert set(checkpoint.manifest.source.files) == {shard.name for shard in shards}


@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sources_of_half_precision(tmp_path, source_dtype, dtype):
    model = build("GemmaModel", models.gemma()).to(source_dtype)
    save(model, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", dtype=dtype)
    check_weights(read_checkpoint(tmp_path / "ours"), fused(model, "gemma"))


@pytest.fixture
def source(tmp_path) -> Path:
    return save(build("GemmaModel", models.gemma()), tmp_path / "source")


def edit_tensors(
    source: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], file: str = "model.safetensors"
) -> None:
    save_file(edit(load_file(source / file)), source / file)


def edit_json(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def refusal(source: Path) -> str:
    """The message with which a source is refused; nothing may stand where the result would have been."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(CheckpointError) as error:
        convert(source, source.parent / "refused")
    assert sorted(source.parent.iterdir()) == before
    return str(error.value)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["score", "classifier"])
def test_hand_written_tagger_on_gemma_3(tmp_path, name, bias):
    """transformers has no token classifier for Gemma 3; people name and shape their own."""
    model = build("Gemma3TextModel", models.gemma3())
    source = save(model, tmp_path / "source")
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, models.SIZES["hidden_size"], generator=generator)
    head = {"weight": weight, "bias": weight[:, 0].clone()} if bias else {"weight": weight}

    def add_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"model.{key}": value for key, value in tensors.items()} | {
            f"{name}.{key}": value for key, value in head.items()
        }

    edit_tensors(source, add_head)
    labels = {str(number): f"tag {number}" for number in range(5)}
    edit_json(source / "config.json", architectures=["Gemma3TextForTokenClassification"], id2label=labels)
    convert(source, tmp_path / "ours", dtype="float32")
    checkpoint = read_checkpoint(tmp_path / "ours")
    assert checkpoint.head.task == "tag"
    expected = {f"classifier.{key}": value for key, value in head.items()}
    check_weights(checkpoint, fused(model, "gemma3_text") | expected)


def test_attention_pooler(source, tmp_path):
    query = torch.randn(models.SIZES["hidden_size"], generator=torch.Generator().manual_seed(2))
    edit_tensors(source, lambda tensors: tensors | {"pooler.query": query})
    convert(source, tmp_path / "ours", dtype="float32")
    checkpoint = read_checkpoint(tmp_path / "ours")
    assert (checkpoint.head.pooling, checkpoint.head.pooler) == ("attention", True)
    np.testing.assert_array_equal(checkpoint.weights["pooler.query"], query.numpy())


def test_tokenizer_is_copied_along(source, tmp_path):
    make_tokenizer().save(str(source / "tokenizer.json"))
    content = (source / "tokenizer.json").read_text()
    convert(source, tmp_path / "ours")
    (source / "tokenizer.json").unlink()
    convert(source, tmp_path / "without")
    tokenizer_file = read_checkpoint(tmp_path / "ours").tokenizer_file
    assert tokenizer_file == tmp_path / "ours" / "tokenizer.json"
    assert tokenizer_file.read_text() == content
    assert read_checkpoint(tmp_path / "without").tokenizer_file is None


def test_everything_wrong_is_listed_at_once(source):
    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["norm.weight"], tensors["layers.1.self_attn.k_proj.weight"]
        query = tensors["layers.0.self_attn.q_proj.weight"]
        tensors["layers.0.self_attn.q_proj.weight"] = query.T.contiguous()
        tensors["layers.2.mlp.up_proj.weight"] = tensors["layers.2.mlp.up_proj.weight"].to(torch.int8)
        more = ("layers.0.adapter.weight", "vision_tower.probe", "lm_head.weight_scale")
        return tensors | {name: query.clone() for name in more}

    edit_tensors(source, damage)
    lines = refusal(source).splitlines()
    assert str(source) in lines[0]
    assert {line.strip() for line in lines[1:]} == {
        "missing: norm.weight (48,)",
        "missing: layers.1.self_attn.k_proj.weight (28, 48)",
        "misshapen: layers.0.self_attn.q_proj.weight is (48, 84), but the config says (84, 48)",
        "dtype: layers.2.mlp.up_proj.weight is 'int8', not float32 or bfloat16 or float16",
        "unknown: 'layers.0.adapter.weight' (84, 48)",
        "unknown: 'vision_tower.probe' (84, 48)",  # Gemma 1 has no vision tower
        "unknown: 'lm_head.weight_scale' (84, 48)",  # only lm_head.weight itself is known
    }


@pytest.mark.parametrize("name", ["norm.weight", "layers.2.input_layernorm.weight", "layers.0.self_attn.v_proj.weight"])
def test_one_missing_tensor(source, name):
    edit_tensors(source, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    assert f"missing: {name}" in refusal(source)


@pytest.mark.parametrize(("class_name", "make_config"), [(c, m) for c, m, _, bias in CLASSIFIERS if bias])
def test_missing_bias_of_a_classifier(tmp_path, class_name, make_config):
    source = save(build(class_name, make_config()), tmp_path / "source")
    edit_tensors(source, lambda tensors: {key: value for key, value in tensors.items() if not key.endswith("bias")})
    assert "missing: " + ("classifier.bias" if class_name.startswith("EuroBert") else "score") in refusal(source)


def test_classifier_without_an_architecture_that_says_what_it_is_for(tmp_path):
    source = save(build("GemmaForTokenClassification", models.gemma()), tmp_path / "source")
    edit_json(source / "config.json", architectures=None)
    message = refusal(source)
    assert "unknown: 'score.weight'" in message
    assert "unknown: 'score.bias'" in message


def test_more_labels_than_the_classifier_has(tmp_path):
    source = save(build("GemmaForTokenClassification", models.gemma()), tmp_path / "source")
    edit_json(source / "config.json", id2label={"0": "a", "1": "b", "2": "c"})
    message = refusal(source)
    assert "misshapen: score.weight is (5, 48), but the config says (3, 48)" in message
    assert "misshapen: score.bias" in message


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "without gaps"),
        ({"id2label": {"0": "a", "1": 7}}, "id2label"),
        ({"id2label": ["a", "b"]}, "id2label"),
        ({"id2label": None, "num_labels": 10**12}, "num_labels in config.json=1000000000000 must be an integer from 1"),
        ({"id2label": None, "num_labels": 0}, "num_labels in config.json=0 must be an integer from 1 to 1000000"),
        ({"architectures": "GemmaForTokenClassification"}, "architectures"),
        ({"architectures": [5]}, "architectures"),
        ({"model_type": "bert"}, "'bert'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_config_that_cannot_be(tmp_path, fields, reason):
    source = save(build("GemmaForTokenClassification", models.gemma()), tmp_path / "source")
    edit_json(source / "config.json", **fields)
    message = refusal(source)
    assert reason in message
    assert "config.json" in message


def test_labels_are_in_the_order_of_their_numbers(tmp_path):
    source = save(build("GemmaForTokenClassification", models.gemma()), tmp_path / "source")
    edit_json(source / "config.json", id2label={"3": "d", "0": "a", "4": "e", "2": "c", "1": "b"})
    convert(source, tmp_path / "ours")
    assert read_checkpoint(tmp_path / "ours").head.labels == ("a", "b", "c", "d", "e")


def test_head_on_the_decoder_of_t5gemma(tmp_path):
    source = save(build("T5GemmaForSequenceClassification", whole_t5gemma()), tmp_path / "source")
    assert "is_encoder_decoder=true" in refusal(source)
    edit_json(source / "config.json", is_encoder_decoder=None)
    config = json.loads((source / "config.json").read_text())
    del config["is_encoder_decoder"]  # true is the default of the class
    (source / "config.json").write_text(json.dumps(config))
    assert "is_encoder_decoder=true" in refusal(source)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '{"model_type": "gemma", "model_type": "gemma2"}'])
def test_config_that_is_not_json(source, content):
    (source / "config.json").write_text(content)
    assert str(source / "config.json") in refusal(source)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38], ids=["nan", "infinity", "too large for bfloat16"])
def test_values_that_are_not_finite(source, bad):
    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["layers.1.self_attn.v_proj.weight"][3, 5] = bad
        return tensors

    edit_tensors(source, damage)
    assert "layers.1.self_attn.v_proj.weight" in refusal(source)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "google" / "gemma-2b", tmp_path / "ours")


def test_directories_that_are_something_else(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"the format of .* is not known .*no config\.json"):
        convert(tmp_path, tmp_path.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="not a directory"):
        convert(source / "model.safetensors", tmp_path / "ours", format="hugging_face")
    with pytest.raises(CheckpointError, match=r"not in Hugging Face format: it has no config\.json"):
        convert(tmp_path, tmp_path.parent / "elsewhere", format="hugging_face")
    with pytest.raises(ConfigError, match="format='onnx' is unknown"):
        convert(source, tmp_path / "ours", format="onnx")


def link_to_shared_file(source: Path, tmp_path: Path, name: str) -> Path:
    target = tmp_path / "elsewhere" / name
    target.parent.mkdir(exist_ok=True)
    (source / name).rename(target)
    (source / name).symlink_to(target)
    return target


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_links_that_leave_the_folder(source, tmp_path, name):
    """A folder from a stranger must not be able to name files of the machine that converts it."""
    make_tokenizer().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text("{}")
    target = link_to_shared_file(source, tmp_path, name)
    message = refusal(source)
    assert f"{source / name} is a link to {target}, outside {source}" in message


def test_links_within_the_folder_and_to_the_folder(source, tmp_path):
    (source / "model.safetensors").rename(source / "weights")
    (source / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(source)
    convert(tmp_path / "link", tmp_path / "ours", dtype="float32")
    assert read_checkpoint(tmp_path / "ours").weights["final_norm"].shape == (48,)


def test_cache_of_the_hugging_face_hub(source, tmp_path):
    """There a model's folder holds links to files of other names, in a folder beside."""
    snapshot, blobs = tmp_path / "models--us--gemma" / "snapshots" / "1a2b", tmp_path / "models--us--gemma" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(["config.json", "model.safetensors"]):
        shutil.copy(source / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "ours")
    assert sorted(read_checkpoint(tmp_path / "ours").manifest.source.files) == ["model.safetensors"]


def test_nonfinite_values_are_kept_when_asked(source, tmp_path):
    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["norm.weight"][3] = float("nan")
        tensors["norm.weight"][5] = float("-inf")
        return tensors

    edit_tensors(source, damage)
    convert(source, tmp_path / "ours", allow_nonfinite=True)
    norm = read_checkpoint(tmp_path / "ours").weights["final_norm"].astype(np.float32)
    assert np.isnan(norm[3])
    assert norm[5] == -np.inf
    assert np.isfinite(norm).sum() == 46


@pytest.mark.parametrize("spoiled", [257, 129, 65])
def test_a_window_that_an_old_save_has_halved(tmp_path, spoiled):
    """Refused, with the option that helps; which also halves as transformers does."""
    config = models.gemma3(use_bidirectional_attention=True, sliding_window=512)
    source = save(build("Gemma3TextModel", config), tmp_path / "source")
    convert(source, tmp_path / "right")
    edit_json(source / "config.json", sliding_window=spoiled)
    message = refusal(source)
    assert f"sliding_window={spoiled} is odd" in message
    assert "--sliding-window 512" in message
    convert(source, tmp_path / "ours", sliding_window=512)
    ours, right = (read_checkpoint(tmp_path / name).config for name in ("ours", "right"))
    assert ours == right
    assert ours.window("sliding") == (256, 256)
    with pytest.raises(CheckpointError, match="sliding_window=-4"):
        convert(source, tmp_path / "again", sliding_window=-4)


def test_a_window_for_a_model_without_one(source, tmp_path):
    with pytest.raises(CheckpointError, match="sliding_window=512 is given, but this model has no sliding layers"):
        convert(source, tmp_path / "ours", sliding_window=512)


def test_no_weights(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "has neither model.safetensors nor" in refusal(source)


@pytest.fixture
def sharded(tmp_path) -> Path:
    return save(build("GemmaModel", models.gemma()), tmp_path / "source", max_shard_size="50KB")


INDEX = "model.safetensors.index.json"


def test_missing_shards_are_all_listed(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    for shard in shards[1:3]:
        shard.unlink()
    message = refusal(sharded)
    assert shards[1].name in message
    assert shards[2].name in message
    assert shards[0].name not in message


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    message = refusal(sharded)
    assert str(shard) in message
    assert "truncated" in message


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..", ".", "", "folder/model.safetensors", "nul\x00", "x" * 300]
)
def test_index_that_points_elsewhere(sharded, name, tmp_path):
    index = json.loads((sharded / INDEX).read_text())
    shutil.copy(next(sharded.glob("model-*.safetensors")), tmp_path.parent / "outside.safetensors")
    index["weight_map"]["norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    message = refusal(sharded)
    assert INDEX in message
    assert name[:70].replace("\x00", r"\x00") in message


def test_index_that_names_another_shard(sharded):
    index = json.loads((sharded / INDEX).read_text())
    names = sorted(index["weight_map"], key=lambda name: index["weight_map"][name])
    right = index["weight_map"][names[0]]
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    (sharded / INDEX).write_text(json.dumps(index))
    message = refusal(sharded)
    assert f"'{names[0]} in {right}'" in message


@pytest.mark.parametrize("weight_map", [None, [], {"norm.weight": 3}, {"norm.weight": None}])
def test_index_that_is_none(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in refusal(sharded)


def test_tensor_in_two_shards(sharded):
    first, second, *_ = sorted(path.name for path in sharded.glob("model-*.safetensors"))
    extra = load_file(sharded / first)
    edit_tensors(sharded, lambda tensors: tensors | extra, second)
    message = refusal(sharded)
    assert f"{second} contains {min(extra)!r}" in message
    assert "which another file contains too" in message


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo], ids=["absent", "a pipe"])
def test_dense_layer_without_safetensors(source, make):
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for path, kind in kinds.items()]
    (source / "modules.json").write_text(json.dumps(modules))
    contents = {
        "1_Pooling": {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True},
        "2_Dense": {"in_features": 48, "out_features": 5, "activation_function": "torch.nn.modules.linear.Identity"},
    }
    for folder, config in contents.items():
        (source / folder).mkdir()
        (source / folder / "config.json").write_text(json.dumps(config))
    make(source / "2_Dense" / ("pytorch_model.bin" if make is Path.touch else "model.safetensors"))
    message = refusal(source)
    assert (
        f"{source / '2_Dense' / 'model.safetensors'} does not exist; load the model with sentence-transformers"
        in message
    )


T5GEMMA_2 = {  # class -> the tensors that are left out
    "T5Gemma2Model": {"decoder.", "encoder.vision_tower.", "encoder.multi_modal_projector."},
    "T5Gemma2ForConditionalGeneration": {
        "model.decoder.",
        "model.encoder.vision_tower.",
        "model.encoder.multi_modal_projector.",
    },
}


@pytest.mark.parametrize("class_name", T5GEMMA_2)
def test_the_encoder_of_t5gemma_2(tmp_path, class_name):
    """The row of its end-of-image token has a tensor of its own, which is not scaled."""
    model = build(class_name, models.t5gemma2())
    encoder = (model if class_name == "T5Gemma2Model" else model.model).encoder.text_model
    convert(save(model, tmp_path / "source"), tmp_path / "ours", dtype="float32")
    checkpoint = read_checkpoint(tmp_path / "ours")
    assert set(checkpoint.manifest.source.dropped) == T5GEMMA_2[class_name]
    assert checkpoint.config.bidirectional_window == (4, 4)
    expected = encoder.embed_tokens.weight.detach().clone()
    expected[77] = encoder.embed_tokens.eoi_embedding.detach() * 48**-0.5
    np.testing.assert_allclose(checkpoint.weights["embedding"], expected.numpy(), rtol=1e-7)
    query = encoder.layers[1].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_array_equal(checkpoint.weights["layers.1.qkv"][:84], query)


def test_t5gemma_2_without_images_in_its_vocabulary(tmp_path):
    config = models.t5gemma2()
    config.encoder.eoi_token_index = 256_000
    model = build("T5Gemma2Model", config)
    convert(save(model, tmp_path / "source"), tmp_path / "ours", dtype="float32")
    expected = model.encoder.text_model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "ours").weights["embedding"], expected)


@pytest.mark.parametrize("class_name", ["T5Gemma2ForSequenceClassification", "T5Gemma2ForTokenClassification"])
def test_the_classifiers_of_t5gemma_2_read_its_decoder(tmp_path, class_name):
    source = save(build(class_name, models.t5gemma2()), tmp_path / "source")
    with pytest.raises(CheckpointError, match=f"{class_name} reads the decoder, .* save the model as a T5Gemma2Model"):
        convert(source, tmp_path / "ours")
