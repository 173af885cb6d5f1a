"""What lies beside a model in sentence-transformers format: taken over exactly, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from sentence_transformers import CrossEncoder

import hugging_face_models as models
from funnel_engine import Engine
from funnel_engine.checkpoints.convert import convert
from funnel_engine.checkpoints.native import Checkpoint, read_checkpoint
from funnel_engine.heads import DenseConfig
from funnel_kernels import CheckpointError
from sentence_models import train_tokenizer

WIDTH = models.SIZES["hidden_size"]
MIDDLE, OUT = 68, 36
IDENTITY = "torch.nn.modules.linear.Identity"
LEGACY_POOLING = {
    "word_embedding_dimension": WIDTH,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": False,
    "include_prompt": True,
}
PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: ", "plain": ""}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def module(kind: str, folder: str, package: str = "sentence_transformers.models") -> dict[str, Any]:
    return {"idx": 0, "name": "0", "path": folder, "type": f"{package}.{kind}"}


MODULES = [
    module("Transformer", ""),
    module("Pooling", "1_Pooling"),
    module("Dense", "2_Dense"),
    module("Dense", "3_Dense", "sentence_transformers.base.modules.dense"),
    module("Normalize", "4_Normalize"),
]


def dense_weight(features: tuple[int, int]) -> torch.Tensor:
    return torch.randn(features, generator=torch.Generator().manual_seed(features[0]))


def dense_bias(features: tuple[int, int]) -> torch.Tensor:
    return dense_weight(features)[:, 0].clone()


def write_dense(folder: Path, features: tuple[int, int], *, bias: bool = False, **fields: Any) -> None:
    """A layer of (out, in) features; `fields` change its config, or delete from it with "absent"."""
    out_features, in_features = features
    config = {
        "in_features": in_features,
        "out_features": out_features,
        "bias": bias,
        "activation_function": IDENTITY,
    }
    write(folder / "config.json", {name: value for name, value in (config | fields).items() if value != "absent"})
    tensors = {"linear.weight": dense_weight(features)} | ({"linear.bias": dense_bias(features)} if bias else {})
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def source(tmp_path) -> Path:
    """As EmbeddingGemma is published: two dense layers, prompts."""
    config = models.gemma3(use_bidirectional_attention=True)
    directory = tmp_path / "source"
    models.build(transformers.Gemma3TextModel, config).save_pretrained(directory)
    write(directory / "modules.json", MODULES)
    write(directory / "1_Pooling" / "config.json", LEGACY_POOLING | {"pooling_mode_mean_tokens": True})
    write_dense(directory / "2_Dense", (MIDDLE, WIDTH))
    write_dense(directory / "3_Dense", (OUT, MIDDLE))
    write(directory / "config_sentence_transformers.json", {"prompts": PROMPTS, "default_prompt_name": None})
    return directory


def converted(source: Path) -> Checkpoint:
    convert(source, source.parent / "ours", dtype="float32")
    return read_checkpoint(source.parent / "ours")


def refusal(source: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        convert(source, source.parent / "ours")
    assert not (source.parent / "ours").exists()
    return str(error.value)


def test_embedding_gemma(source):
    checkpoint = converted(source)
    assert checkpoint.head.pooling == "mean"
    assert checkpoint.head.dense == (DenseConfig(MIDDLE, WIDTH), DenseConfig(OUT, MIDDLE))
    for name, features in (("dense.0.weight", (MIDDLE, WIDTH)), ("dense.1.weight", (OUT, MIDDLE))):
        np.testing.assert_array_equal(checkpoint.weights[name], dense_weight(features).numpy())
    text = checkpoint.manifest.text
    assert (text.prompts, text.default_prompt_name, text.max_tokens) == (PROMPTS, None, None)
    assert set(checkpoint.manifest.source.files) == {
        "model.safetensors",
        "2_Dense/model.safetensors",
        "3_Dense/model.safetensors",
    }


@pytest.mark.parametrize("modules", [MODULES[:2], [*MODULES[:2], MODULES[4]], MODULES[:3], MODULES[:4]])
def test_fewer_modules(source, modules):
    write(source / "modules.json", modules)
    layers = sum(entry["type"].endswith("Dense") for entry in modules)
    assert converted(source).head.dense == (DenseConfig(MIDDLE, WIDTH), DenseConfig(OUT, MIDDLE))[:layers]


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("torch.nn.modules.activation.Tanh", "tanh"),
        ("torch.nn.Tanh", "tanh"),
        ("absent", "tanh"),  # which is the default
        ("torch.nn.modules.activation.ReLU", "relu"),
        ("torch.nn.modules.activation.GELU", "gelu"),
        ("torch.nn.modules.activation.SiLU", "silu"),
        ("torch.nn.modules.activation.Sigmoid", "sigmoid"),
        (IDENTITY, "identity"),
    ],
)
def test_activation_of_a_dense_layer(source, name, activation):
    write_dense(source / "2_Dense", (MIDDLE, WIDTH), activation_function=name)
    assert converted(source).head.dense[0] == DenseConfig(MIDDLE, WIDTH, activation=activation)


@pytest.mark.parametrize("fields", [{}, {"bias": "absent"}])  # a bias is the default
def test_bias_of_a_dense_layer(source, fields):
    write_dense(source / "3_Dense", (OUT, MIDDLE), bias=True)
    if fields:
        config = json.loads((source / "3_Dense" / "config.json").read_text())
        del config["bias"]
        write(source / "3_Dense" / "config.json", config)
    checkpoint = converted(source)
    assert checkpoint.head.dense[1] == DenseConfig(OUT, MIDDLE, bias=True)
    np.testing.assert_array_equal(checkpoint.weights["dense.1.bias"], dense_bias((OUT, MIDDLE)).numpy())


@pytest.mark.parametrize(
    ("fields", "pooling"),
    [
        (LEGACY_POOLING | {"pooling_mode_cls_token": True}, "first"),
        (LEGACY_POOLING | {"pooling_mode_lasttoken": True}, "last"),
        (LEGACY_POOLING | {"pooling_mode_max_tokens": True}, "max"),
        (LEGACY_POOLING, "mean"),
        ({"embedding_dimension": WIDTH, "pooling_mode": "cls", "include_prompt": True}, "first"),
        ({"embedding_dimension": WIDTH, "pooling_mode": ["lasttoken"]}, "last"),
        ({"embedding_dimension": WIDTH, "pooling_mode": "max"}, "max"),
        ({"embedding_dimension": WIDTH}, "mean"),
    ],
)
def test_both_spellings_of_pooling(source, fields, pooling):
    write(source / "1_Pooling" / "config.json", fields)
    assert converted(source).head.pooling == pooling


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (LEGACY_POOLING | {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "'cls', 'max'"),
        (LEGACY_POOLING | {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, "mean_sqrt_len_tokens"),
        ({"pooling_mode": ["mean", "cls"]}, "'mean', 'cls'"),
        ({"pooling_mode": [{}]}, "pooling"),
        ({"pooling_mode": None}, "pooling"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
        ({"pooling_mode": "mean", "embedding_dimension": "48"}, "embedding_dimension"),
        ({"pooling_mode": "mean"}, "embedding_dimension"),
    ],
)
def test_pooling_that_the_engine_does_not_have(source, fields, reason):
    write(source / "1_Pooling" / "config.json", fields)
    message = refusal(source)
    assert reason in message
    assert "1_Pooling" in message


@pytest.mark.parametrize("name", ["embedding_dimension", "word_embedding_dimension"])
def test_pooling_of_another_width(source, name):
    write(source / "1_Pooling" / "config.json", {name: WIDTH + 1})
    assert f"2_Dense has in_features={WIDTH}, but its input has {WIDTH + 1} features" in refusal(source)
    write(source / "modules.json", MODULES[:2])
    assert f"expects rows of width {WIDTH + 1}, but the encoder's rows are {WIDTH} wide" in refusal(source)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"activation_function": "torch.nn.modules.activation.Softmax"}, "Softmax"),
        ({"activation_function": "my_package.Tanh"}, "my_package.Tanh"),
        ({"activation_function": None}, "activation_function is None"),
        ({"bias": "yes"}, "bias"),
        ({"bias": True}, "missing: 2_Dense/linear.bias (68,)"),
        ({"use_residual": True}, "use_residual"),
        ({"module_input_name": "token_embeddings"}, "module_input_name"),
        ({"module_output_name": "other"}, "module_output_name"),
        ({"in_features": WIDTH + 1}, "has in_features=49, but its input has 48 features"),
        ({"out_features": MIDDLE + 1}, "3_Dense has in_features=68, but its input has 69 features"),
        ({"out_features": "many"}, "out_features"),
        ({"out_features": "absent"}, "out_features"),
        ({"out_features": -3}, "-3"),
    ],
)
def test_dense_layer_that_the_engine_does_not_have(source, fields, reason):
    config = json.loads((source / "2_Dense" / "config.json").read_text()) | fields
    write(source / "2_Dense" / "config.json", {name: value for name, value in config.items() if value != "absent"})
    assert reason in refusal(source)


def test_dense_weights_are_checked_with_the_others(source):
    save_file(
        {"linear.weight": dense_weight((WIDTH, MIDDLE)), "linear.bias": torch.ones(MIDDLE)},
        source / "2_Dense" / "model.safetensors",
    )
    message = refusal(source)
    assert f"misshapen: 2_Dense/linear.weight is ({WIDTH}, {MIDDLE})" in message
    assert "unknown: '2_Dense/linear.bias'" in message


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ([], "nothing"),
        (MODULES[1:], "lists Pooling"),
        ([MODULES[0], MODULES[2], MODULES[1]], "Transformer, Dense, Pooling"),
        ([*MODULES[:2], MODULES[4], MODULES[2]], "Normalize, Dense"),
        ([*MODULES[:2], module("LayerNorm", "2_LayerNorm")], "LayerNorm"),
        ([*MODULES[:2], module("Dense", "../2_Dense")], "../2_Dense"),
        ([MODULES[0], module("Pooling", "..")], "'..'"),
        (
            [module("Transformer", "", "custom_st"), MODULES[1]],
            "'custom_st.Transformer', a module with its own code",
        ),
        ([MODULES[0], module("Pooling", "1_Pooling", "my.sentence_transformers")], "a module with its own code"),
        ([*MODULES[:2], module("Dense", "2_Dense", "sentence_transformers_too")], "a module with its own code"),
        ([MODULES[0], {"path": "1_Pooling"}], "must have a type"),
        ([5], "must have a type"),
        ({}, "JSON dict"),
    ],
)
def test_modules_that_the_engine_does_not_run(source, modules, reason):
    write(source / "modules.json", modules)
    message = refusal(source)
    assert reason in message
    assert "modules.json" in message


def test_folder_of_the_transformer_is_missing(source):
    write(source / "modules.json", [module("Transformer", "0_Transformer"), *MODULES[1:]])
    assert "0_Transformer is not in Hugging Face format: it has no config.json" in refusal(source)


@pytest.mark.parametrize("file", ["1_Pooling/config.json", "2_Dense/config.json", "3_Dense/model.safetensors"])
def test_missing_files(source, file):
    (source / file).unlink()
    assert file in refusal(source)


NORMALIZE = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}


@pytest.mark.parametrize("name", NORMALIZE)
def test_normalize_of_something_else(source, name):
    write(source / "4_Normalize" / "config.json", NORMALIZE)
    converted(source)
    write(source / "4_Normalize" / "config.json", NORMALIZE | {name: "token_embeddings"})
    with pytest.raises(CheckpointError, match=f"{name} is 'token_embeddings'"):
        convert(source, source.parent / "other")


# ------------------------------------------------------------------------------------------- texts

SENTENCE_CONFIG = "config_sentence_transformers.json"
TRANSFORMER_CONFIG = "sentence_bert_config.json"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompts": {"query": 3}}, "prompts.query"),
        ({"prompts": ["query"]}, "prompts"),
        ({"prompts": PROMPTS, "default_prompt_name": "other"}, "'other'"),
        ({"similarity_fn_name": "maxsim"}, "similarity_fn_name is 'maxsim'"),
        ({"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
        ({"truncate_dim": 8}, "truncate_dim is 8"),
    ],
)
def test_sentence_config_that_the_engine_does_not_run(source, fields, reason):
    write(source / SENTENCE_CONFIG, fields)
    message = refusal(source)
    assert reason in message
    assert SENTENCE_CONFIG in message


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan", None])
def test_similarity(source, similarity):
    write(source / SENTENCE_CONFIG, {"similarity_fn_name": similarity})
    assert converted(source).head.similarity == similarity


def test_default_prompt(source):
    write(source / SENTENCE_CONFIG, {"prompts": PROMPTS, "default_prompt_name": "document"})
    assert converted(source).manifest.text.default_prompt_name == "document"


def test_prompts_without_content(source):
    write(source / SENTENCE_CONFIG, {"prompts": {"query": None, "document": "text: "}})
    assert converted(source).manifest.text.prompts == {"query": "", "document": "text: "}


def test_no_prompts(source):
    (source / SENTENCE_CONFIG).unlink()
    checkpoint = converted(source)
    assert (checkpoint.manifest.text.prompts, checkpoint.head.similarity) == ({}, None)


@pytest.mark.parametrize(
    ("transformer", "tokenizer", "max_tokens"),
    [
        ({"max_seq_length": 77}, {"model_max_length": 55}, 77),
        ({"max_seq_length": None}, {"model_max_length": 55}, 55),
        ({}, {"max_len": 55}, 55),
        ({"max_seq_length": 77, "tokenizer_args": {"model_max_length": 33}}, {"model_max_length": 55}, 33),
        ({"processor_kwargs": {"model_max_length": 33, "padding_side": "left"}}, {}, 33),
        ({}, {"model_max_length": 1000000000000000019884624838656}, None),
        ({}, {"model_max_length": 1e30}, None),
        (None, {"model_max_length": 55}, 55),
        (None, None, None),
    ],
)
def test_most_tokens_of_a_text(source, transformer, tokenizer, max_tokens):
    for name, fields in ((TRANSFORMER_CONFIG, transformer), ("tokenizer_config.json", tokenizer)):
        if fields is not None:
            write(source / name, fields)
    assert converted(source).manifest.text.max_tokens == max_tokens


@pytest.mark.parametrize("value", [0, -1, "512", True, [512], float("nan")])
@pytest.mark.parametrize(
    ("file", "name"), [(TRANSFORMER_CONFIG, "max_seq_length"), ("tokenizer_config.json", "model_max_length")]
)
def test_most_tokens_that_cannot_be(source, file, name, value):
    write(source / file, {name: value})
    assert "it must be at least 1, or missing" in refusal(source)


FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"do_lower_case": True}, "do_lower_case is True"),
        ({"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
        ({"module_output_name": "sentence_embedding"}, "module_output_name"),
        ({"config_args": {"is_causal": False}}, "config_args has is_causal"),
        ({"config_kwargs": {"use_bidirectional_attention": True}}, "config_kwargs has use_bidirectional_attention"),
        ({"tokenizer_args": {"add_eos_token": True}}, "tokenizer_args has add_eos_token"),
        ({"processing_kwargs": {"text": {"max_length": 9}}}, "processing_kwargs has text"),
        ({"model_args": [1]}, "model_args"),
        ({"query_expansion": {"strategy": "mask", "length": 32}}, "query_expansion is {'strategy'"),
        ({"query_length": 32}, "query_length is 32"),
        ({"document_length": 300}, "document_length is 300"),
        ({"tokenizer_name_or_path": "another/model"}, "tokenizer_name_or_path is 'another/model'"),
        ({"modality_config": {"text": FORWARD | {"method_output_name": "logits"}}}, "'logits'"),
        ({"modality_config": {"text": FORWARD | {"method": "get_text_features"}}}, "'get_text_features'"),
        ({"modality_config": {"image": FORWARD}}, "text is None"),
        ({"modality_config": {"text": FORWARD, "message": FORWARD | {"format": "flat"}}}, "message is {'method'"),
        ({"modality_config": "text"}, "modality_config"),
    ],
)
def test_transformer_module_that_the_engine_does_not_run(source, fields, reason):
    write(source / TRANSFORMER_CONFIG, fields)
    message = refusal(source)
    assert reason in message
    assert TRANSFORMER_CONFIG in message


def test_transformer_module_with_what_changes_nothing(source):
    fields = {"do_lower_case": False, "model_args": {"torch_dtype": "float32"}, "config_args": {}}
    fields |= {"query_expansion": False, "query_length": None, "document_length": None, "tokenizer_name_or_path": None}
    fields |= {"modality_config": {"text": FORWARD, "image": FORWARD}}
    write(source / TRANSFORMER_CONFIG, fields | {"transformer_task": "feature-extraction"})
    converted(source)


# ------------------------------------------------------------------------------------------------ CrossEncoder


@pytest.fixture
def cross_encoder(tmp_path) -> Path:
    """A classifier as the library's CrossEncoder saves it."""
    model = models.build(transformers.Gemma2ForSequenceClassification, models.gemma2())
    model.save_pretrained(tmp_path / "classifier")
    train_tokenizer().save(str(tmp_path / "classifier" / "tokenizer.json"))
    CrossEncoder(str(tmp_path / "classifier"), device="cpu", max_length=33, prompts={"q": "query: "}).save_pretrained(
        str(tmp_path / "source")
    )
    return tmp_path / "source"


def test_cross_encoder(cross_encoder):
    """Logits as transformers', limits and prompts as the library's; the activation is left to the caller."""
    checkpoint = converted(cross_encoder)
    assert (checkpoint.head.task, len(checkpoint.head.labels)) == ("classify", models.LABELS)
    text = checkpoint.manifest.text
    assert (text.max_tokens, text.prompts, text.default_prompt_name) == (33, {"q": "query: "}, None)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(cross_encoder).eval()
    ids = models.random_ids(5, 9)
    with torch.no_grad():
        theirs = [model(input_ids=torch.tensor([sequence])).logits[0].numpy() for sequence in ids]
    ours = Engine.load(cross_encoder.parent / "ours", max_batch_tokens=64).classify(ids)
    np.testing.assert_allclose(ours, np.stack(theirs), atol=1e-4)


@pytest.mark.parametrize(
    ("file", "fields", "reason"),
    [
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
        (TRANSFORMER_CONFIG, {"transformer_task": "text-generation"}, "transformer_task is 'text-generation'"),
        (TRANSFORMER_CONFIG, {"transformer_task": "feature-extraction"}, "transformer_task is 'feature-extraction'"),
        (TRANSFORMER_CONFIG, {"module_output_name": "causal_logits"}, "module_output_name is 'causal_logits'"),
        ("config.json", {"architectures": ["Gemma2Model"]}, "describes a CrossEncoder"),
    ],
)
def test_cross_encoder_that_the_engine_does_not_run(cross_encoder, file, fields, reason):
    path = cross_encoder / file
    write(path, json.loads(path.read_text()) | fields)
    assert reason in refusal(cross_encoder)


@pytest.mark.parametrize("kind", ["LogitScore", "Router"])
def test_modules_of_other_kinds_of_models(cross_encoder, kind):
    write(cross_encoder / "modules.json", [MODULES[0], module(kind, "1_Other")])
    assert f"lists Transformer, {kind}" in refusal(cross_encoder)


def test_transformer_file_of_an_old_version(source):
    """The library reads the first of these names that it finds."""
    write(source / "sentence_roberta_config.json", {"max_seq_length": 77})
    write(source / "sentence_xlnet_config.json", {"max_seq_length": 78})
    assert converted(source).manifest.text.max_tokens == 77
    write(source / "sentence_roberta_config.json", {"do_lower_case": True})
    assert "sentence_roberta_config.json: do_lower_case is True" in refusal_again(source)


def refusal_again(source: Path) -> str:
    shutil.rmtree(source.parent / "ours")
    return refusal(source)


def test_limits_of_other_arguments_do_not_count(source):
    """Only what goes to the tokenizer is a limit of its texts."""
    write(source / TRANSFORMER_CONFIG, {"model_args": {"model_max_length": 33}, "max_seq_length": 77})
    assert converted(source).manifest.text.max_tokens == 77
