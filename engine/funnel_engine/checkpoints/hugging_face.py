"""Reads a Hugging Face directory: config.json, safetensors, and further files in the same folder.

Nothing is guessed. A tensor is either needed, or one of a family's known tensors that an encoder does not need
(`Layout.dropped`); any other tensor is an error.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from funnel_engine.checkpoints.foreign import other_weights
from funnel_engine.checkpoints.lora import find_adapter, is_adapter
from funnel_engine.checkpoints.safetensors_file import StoredTensor, read_header
from funnel_engine.checkpoints.sentence_transformers import MODULES, SentenceModel, read_sentence_model
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.checkpoints.tensors import (
    Part,
    Parts,
    SourceTensor,
    assemble,
    drop_by_name,
    join_shards,
    unwrap,
    unwrapped,
)
from funnel_engine.checkpoints.tokenizer_files import find_tokenizer, has_tokenizer
from funnel_engine.checks import check_integer
from funnel_engine.config import ModelConfig
from funnel_engine.heads import DenseConfig, HeadConfig, head_shapes
from funnel_engine.hugging_face_config import read_model_config, read_projection_width
from funnel_engine.input_files import decode, file_in, is_file, optional_file, read_json, reading, unfinished_downloads
from funnel_engine.messages import quote
from funnel_engine.weights import expected_shapes, is_norm
from funnel_kernels.errors import CheckpointError

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Our names -> Hugging Face's, without ".weight". Our weight contains the rows of several tensors one after another.
OUTER: dict[str, tuple[str, ...]] = {"embedding": ("embed_tokens",), "final_norm": ("norm",)}
LAYER: dict[str, tuple[str, ...]] = {
    "q": ("self_attn.q_proj",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "query_norm": ("self_attn.q_norm",),
    "key_norm": ("self_attn.k_norm",),
    "attention_output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
SANDWICH_NORMS = {
    "attention_input_norm": ("input_layernorm",),
    "attention_output_norm": ("post_attention_layernorm",),
    "mlp_input_norm": ("pre_feedforward_layernorm",),
    "mlp_output_norm": ("post_feedforward_layernorm",),
}
# Two norms per layer: this "post_attention" norm is the "pre_feedforward" norm of the families that have four.
PRE_NORMS = {"attention_input_norm": ("input_layernorm",), "mlp_input_norm": ("post_attention_layernorm",)}
# What differs between families: the norms, and weights that only some of them have.
NORMS = {
    "gemma": PRE_NORMS,
    "gemma2": SANDWICH_NORMS,
    "gemma3_text": SANDWICH_NORMS,
    "t5gemma": SANDWICH_NORMS
    | {"attention_input_norm": ("pre_self_attn_layernorm",), "attention_output_norm": ("post_self_attn_layernorm",)},
    "llama": PRE_NORMS,
    "mistral": PRE_NORMS,
    "qwen3": PRE_NORMS,
    "eurobert": PRE_NORMS,
    "gemma4_text": SANDWICH_NORMS
    | {
        "layer_scalar": ("layer_scalar",),
        "per_layer_embedding": ("embed_tokens_per_layer",),
        "per_layer_input": ("per_layer_model_projection",),
        "per_layer_input_norm": ("per_layer_projection_norm",),
        "per_layer_gate": ("per_layer_input_gate",),
        "per_layer_output": ("per_layer_projection",),
        "per_layer_output_norm": ("post_per_layer_input_norm",),
    },
    "embedding_gemma2_text": SANDWICH_NORMS
    | {
        "layer_scalar": ("layer_scalar",),
        "per_layer_input": ("ple.per_layer_model_projection",),
        "per_layer_input_norm": ("ple.per_layer_projection_norm",),
        "per_layer_gate": ("ple_block.per_layer_input_gate",),
        "per_layer_output": ("ple_block.per_layer_projection",),
        "per_layer_output_norm": ("ple_block.post_per_layer_input_norm",),
    },
}
NORMS["t5gemma2_text"] = NORMS["t5gemma"]


# Families whose norms multiply by `1 + weight`. Those of the others multiply by `weight`.
ZERO_CENTRED = ("gemma", "gemma2", "gemma3_text", "t5gemma", "t5gemma2_text")


class Layout(NamedTuple):
    """The names of tensors in a checkpoint of one `model_type`.

    Attributes:
        prefixes: the possible prefixes of the encoder's tensors; the first are for task models, then the bare model.
        dropped: names of tensors that an encoder does not need, prefixes that end in a dot, and suffixes that begin
            with one.
    """

    prefixes: tuple[str, ...]
    dropped: tuple[str, ...]


MAX_LABELS = 1_000_000  # a damaged file must not fill the memory with names
END_OF_IMAGE = 256_000  # the default of T5Gemma 2's config
TEXT_MODEL = Layout(("model.", ""), ("lm_head.weight",))
LLAMA = Layout(("model.", ""), ("lm_head.weight", ".rotary_emb.inv_freq"))  # old versions saved RoPE's frequencies


def towers(*names: str, prefixes: tuple[str, ...] = ("",)) -> tuple[str, ...]:
    """The prefixes of the tensors of towers for images and sound."""
    return tuple(f"{prefix}{name}." for prefix in prefixes for name in names)


GEMMA_4_TOWERS = towers("vision_tower", "embed_vision", "audio_tower", "embed_audio", prefixes=("model.", ""))
SIGLIP = partial(towers, "vision_tower", "multi_modal_projector")
LAYOUTS = {
    "gemma": TEXT_MODEL,
    "gemma2": TEXT_MODEL,
    "gemma3_text": TEXT_MODEL,
    "gemma3": Layout(
        ("language_model.model.", "model.language_model.", "language_model."),
        (
            "lm_head.weight",
            "language_model.lm_head.weight",
            *SIGLIP(prefixes=("", "model.")),
        ),
    ),
    "embedding_gemma2_text": TEXT_MODEL,
    "embedding_gemma2": Layout(("model.language_model.", "language_model."), GEMMA_4_TOWERS),
    "gemma4_text": TEXT_MODEL,
    "gemma4": Layout(("model.language_model.", "language_model."), ("lm_head.weight", *GEMMA_4_TOWERS)),
    "t5gemma": Layout(("model.encoder.", "encoder."), ("model.decoder.", "decoder.", "lm_head.out_proj.weight")),
    "t5gemma2": Layout(
        ("model.encoder.", "encoder.", "model.encoder.text_model.", "encoder.text_model."),
        (
            "model.decoder.",
            "decoder.",
            "lm_head.out_proj.weight",
            *SIGLIP(prefixes=("model.encoder.", "encoder.")),
        ),
    ),
    "t5gemma2_encoder": Layout(("", "text_model."), SIGLIP()),
    "t5gemma2_text": Layout(("",), ()),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": TEXT_MODEL,
    "eurobert": TEXT_MODEL,
}
TASKS = {"ForSequenceClassification": "classify", "ForTokenClassification": "tag"}


def matches(path: Path) -> bool:
    """Whether a folder has a Hugging Face config, the module list of sentence-transformers, or an adapter."""
    return is_file(path / CONFIG) or is_file(path / MODULES) or is_adapter(path)


def read_hugging_face(root: Path, sliding_window: int | None = None, base: Path | None = None) -> SourceModel:
    """Reads a directory without the values of its tensors.

    Args:
        sliding_window: replaces the value in the config.
        base: the folder of the base model, if the directory contains a LoRA adapter. None finds it.

    Raises:
        CheckpointError: this is not a directory in this format, the model family is not supported, or files are
            missing, damaged or do not fit together. The message lists all tensors that are missing, unknown or of a
            wrong shape.
    """
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory; give the folder with the model's config.json")
    sentence_model = read_sentence_model(root)
    directory = sentence_model.transformer if sentence_model else root
    adapter = find_adapter(directory, root, base)
    if adapter is not None:
        base_model = read_sentence_model(adapter.base)
        directory = base_model.transformer if base_model else adapter.base
        adapter.check_base(directory)
        sentence_model = sentence_model or base_model
    config_file = optional_file(directory, CONFIG)
    if config_file is None:
        raise CheckpointError(
            f"{directory} is not in Hugging Face format: it has no {CONFIG}; give the folder that has it"
        )
    fields = read_json(config_file)
    if adapter is not None:
        fields = adapter.with_task(fields)
    with reading(config_file):
        config = read_model_config(fields, sliding_window)
        projection = read_projection_width(fields)
    width = projection or config.hidden_size
    if sentence_model and sentence_model.width not in (None, width):
        raise CheckpointError(
            f"the pooling in {root} expects rows of width {sentence_model.width}, but the encoder's rows are "
            f"{width} wide; these folders do not belong together, so fetch the model again"
        )
    layout = LAYOUTS[fields["model_type"]]
    drop_rule = drop_by_name((*layout.dropped, *unused_keys(config, layout)))
    tensors: dict[str, SourceTensor] = {**read_tensors(directory, drop_rule)}
    if adapter is not None:
        tensors = adapter.merge(tensors, layout.prefixes, drop_rule)
    folders = [layer.folder for layer in sentence_model.dense] if sentence_model else []
    for folder in folders:
        file = optional_file(folder, SINGLE_FILE)
        if file is None:
            raise CheckpointError(
                f"{folder / SINGLE_FILE} does not exist; load the model with sentence-transformers and save it "
                "again, which writes safetensors"
            )
        tensors |= {f"{folder.name}/{name}": tensor for name, tensor in unwrap(file, read_header(file)).items()}

    classifier = classifier_name(config, tensors)
    with reading(config_file):
        head = read_head(fields, config, sentence_model, tensors, classifier, projection)
    prefix = find_prefix(layout, config, tensors)
    with reading(root):
        dense = [f"{prefix}embedding_projection."] if projection else []
        dense += [f"{folder.name}/linear." for folder in folders]
        parts = {**encoder_parts(config, prefix), **head_parts(config, head, dense, classifier)}
        if config.family == "t5gemma2_text":
            parts["embedding"] = with_image_end(parts["embedding"], fields)
    weights, dropped = assemble(directory, parts, tensors, drop_rule)
    if adapter is not None and has_tokenizer(adapter.directory):
        directory = adapter.directory
    text, tokenizer_file = find_tokenizer(directory, config)
    if sentence_model:
        text = dataclasses.replace(
            text,
            max_tokens=sentence_model.max_tokens or text.max_tokens,
            prompts=sentence_model.prompts,
            default_prompt_name=sentence_model.default_prompt_name,
        )
    return SourceModel(
        format="hugging_face",
        config=config,
        head=head,
        weights=weights,
        dropped=dropped,
        text=text,
        tokenizer_file=tokenizer_file,
        directory=root,
        adapter_files=() if adapter is None else adapter.files,
    )


def read_tensors(directory: Path, drop_rule: Callable[[str], str | None]) -> dict[str, StoredTensor]:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json lists.

    Args:
        drop_rule: why a tensor is not needed, see `assemble`.
    """
    single_file, index_file = optional_file(directory, SINGLE_FILE), optional_file(directory, INDEX)
    if single_file:
        return unwrap(single_file, read_header(single_file))
    if not index_file:
        raise CheckpointError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX}{other_weights(directory)}"
            f"{unfinished_downloads(directory)}; save the model with transformers' save_pretrained, which writes "
            "safetensors"
        )
    weight_map = decode(dict[str, str], read_json(index_file).get("weight_map"), f"{index_file}: weight_map")
    files = [file_in(directory, name, str(index_file)) for name in sorted(set(weight_map.values()))]
    tensors = join_shards(
        index_file, files, read_header, weight_map.items(), drop_rule=lambda name: drop_rule(unwrapped(name))
    )
    return unwrap(index_file, tensors)


def encoder_parts(config: ModelConfig, prefix: str) -> Parts:
    """For each of our encoder weights, the tensors that contain its rows, in order."""
    names = OUTER | LAYER | NORMS[config.family]
    parts = {}
    for ours, shape in expected_shapes(config, HeadConfig()).items():
        block, _, leaf = ours.rpartition(".")  # "layers.3" and "qkv", or "" and "embedding"
        at = f"{prefix}{block}." if block else prefix
        product, is_bias = leaf.removesuffix("_bias"), leaf.endswith("_bias")
        ending = "" if leaf == "layer_scalar" else ".bias" if is_bias else ".weight"
        theirs = [f"{at}{name}{ending}" for name in names[product]]
        sizes = shape[:1]
        if product == "qkv":
            layer_type = config.layer_types[int(block.removeprefix("layers."))]
            heads = config.heads(layer_type)
            sizes = heads.query_width, heads.key_width, heads.key_width
            if config.keys_as_values and layer_type == "full":
                theirs[2] = theirs[1]
        elif product == "gate_up":
            sizes = (shape[0] // 2,) * 2
        elif leaf == "per_layer_embedding":  # a row for each token, with the rows of all layers side by side
            sizes, shape = (config.per_layer_vocab,), (config.per_layer_vocab, config.num_layers * shape[1])
        minus = float(is_norm(ours) and config.family not in ZERO_CENTRED)
        parts[ours] = tuple(
            Part(name, (size, *shape[1:]), minus=minus) for name, size in zip(theirs, sizes, strict=True)
        )
    return parts


def with_image_end(embedding: tuple[Part, ...], fields: dict[str, Any]) -> tuple[Part, ...]:
    """The embedding of T5Gemma 2, whose row of the end-of-image token is a tensor of its own, and is not scaled."""
    (table,) = embedding
    rows, width = table.shape
    encoder = fields.get("encoder", fields)
    token = check_integer("eoi_token_index", encoder.get("eoi_token_index", END_OF_IMAGE), least=0)
    own = Part(f"{table.name.removesuffix('weight')}eoi_embedding", (width,), times=width**-0.5)
    if token >= rows:  # a smaller vocabulary, without this token
        return table, own._replace(rows=0)
    return table._replace(rows=token), own, table._replace(first=token + 1)


def unused_keys(config: ModelConfig, layout: Layout) -> list[str]:
    """The tensors of layers that read the keys of other layers; published checkpoints have them all the same."""
    return [
        f"{prefix}layers.{index}.self_attn.{name}"
        for prefix in layout.prefixes
        for index in range(config.num_layers - config.kv_shared_layers, config.num_layers)
        for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "k_norm.weight")
    ]


def head_parts(config: ModelConfig, head: HeadConfig, dense: list[str], classifier: str) -> Parts:
    """The same for the weights of the head; `dense` are the prefixes of the linear layers."""
    names = {
        "pooler.query": "pooler.query",
        "classifier.weight": f"{classifier}.weight",
        "classifier.bias": f"{classifier}.bias",
    }
    for index, prefix in enumerate(dense):
        for leaf in ("weight", "bias"):
            names[f"dense.{index}.{leaf}"] = f"{prefix}{leaf}"
    return {ours: (Part(names[ours], shape),) for ours, shape in head_shapes(config.hidden_size, head).items()}


def find_prefix(layout: Layout, config: ModelConfig, tensors: Mapping[str, SourceTensor]) -> str:
    """The prefix with which most of the encoder's tensors are found."""

    def count_found(prefix: str) -> int:
        return sum(part.name in tensors for parts in encoder_parts(config, prefix).values() for part in parts)

    return max(layout.prefixes, key=count_found)


def classifier_name(config: ModelConfig, tensors: Mapping[str, SourceTensor]) -> str:
    """The name of the classifier: "score", or "classifier" for EuroBERT and in hand-written heads on Gemma 3."""
    if config.family == "t5gemma":
        return "score.out_proj"
    return "classifier" if "classifier.weight" in tensors else "score"


def read_head(
    fields: dict[str, Any],
    config: ModelConfig,
    sentence_model: SentenceModel | None,
    tensors: Mapping[str, SourceTensor],
    classifier: str,
    projection: int | None,
) -> HeadConfig:
    """The head on the encoder. Without modules.json, sentence vectors come from the pooler, or else are the mean.

    A projection of the rows before the pooling becomes the first layer after it. The result is the same, because it is
    linear, unless the pooling is not.
    """
    pooler = "pooler.query" in tensors
    pooling = sentence_model.pooling if sentence_model else "attention" if pooler else "mean"
    if projection and pooling not in ("mean", "first", "last"):
        raise CheckpointError(
            f"pooling {pooling!r} of projected rows is not supported; this engine projects the pooled row, which is "
            "the same for mean, first and last"
        )
    dense = tuple(layer.config for layer in sentence_model.dense) if sentence_model else ()
    if projection:
        dense = (DenseConfig(projection, config.hidden_size), *dense)
    similarity = sentence_model.similarity if sentence_model else None
    architectures = decode(tuple[str, ...], fields.get("architectures") or [], "architectures in config.json")
    tasks = [task for name in architectures for suffix, task in TASKS.items() if name.endswith(suffix)]
    if sentence_model and sentence_model.cross_encoder and tasks[:1] != ["classify"]:
        raise CheckpointError(
            f"modules.json describes a CrossEncoder, so config.json must be for a ForSequenceClassification model; its "
            f"architectures are {quote(architectures) or 'none'}"
        )
    if not tasks:
        return HeadConfig(pooling, pooler, dense, similarity)
    if config.family == "t5gemma2_text":
        raise CheckpointError(
            f"{architectures[0]} reads the decoder, which this engine does not run; save the model as a T5Gemma2Model, "
            "whose encoder it runs"
        )
    if config.family == "t5gemma" and fields.get("is_encoder_decoder", True):
        raise CheckpointError(
            f"{architectures[0]} with is_encoder_decoder=true reads the decoder, which this engine does not run; "
            "train the head on the encoder (is_encoder_decoder=false)"
        )
    if config.family == "eurobert" and tasks[0] == "classify":
        raise CheckpointError(
            f"{architectures[0]} has a dense layer and GELU before its classifier, which this engine does not run; "
            "save the encoder alone (model.model.save_pretrained) to use its vectors, or train another classifier on it"
        )
    # Token classifiers of transformers and all T5Gemma heads have a bias; hand-written heads may have one.
    must_have_bias = config.family == "t5gemma" or (tasks[0] == "tag" and config.family != "gemma3_text")
    bias = must_have_bias or f"{classifier}.bias" in tensors
    return HeadConfig(pooling, pooler, dense, similarity, tasks[0], read_labels(fields), bias)


def read_labels(fields: dict[str, Any]) -> tuple[str, ...]:
    """The names of the classes. A config without names has `num_labels` classes, or transformers' default of two."""
    count = fields.get("num_labels")
    count = check_integer(
        "num_labels in config.json", 2 if count is None else count, least=1, most=MAX_LABELS, error=CheckpointError
    )
    default = {str(number): f"LABEL_{number}" for number in range(count)}
    labels = decode(dict[str, str], fields.get("id2label") or default, "id2label in config.json")
    if set(labels) != {str(number) for number in range(len(labels))}:
        raise CheckpointError(
            f"id2label in config.json must number its labels from 0 without gaps; it has {quote(labels)}"
        )
    return tuple(labels[str(number)] for number in range(len(labels)))
