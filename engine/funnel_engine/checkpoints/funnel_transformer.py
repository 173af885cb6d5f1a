"""Reads a Funnel-Transformer of Hugging Face: config.json, and model.safetensors or pytorch_model.bin.

The published models are those of pre-training: their head, a discriminator, becomes a classifier of tokens with one
label. The head of masked language modelling is left out. So is the bias of keys: it adds the same number to all scores
of a query, which softmax removes.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funnel_engine.checkpoints.gemma_pytorch import read_file
from funnel_engine.checkpoints.hugging_face import CONFIG, INDEX, SINGLE_FILE, read_labels, read_tensors
from funnel_engine.checkpoints.sentence_transformers import MODULES
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.checkpoints.tensors import Part, Parts, SourceTensor, assemble, drop_by_name, unwrap
from funnel_engine.checkpoints.tokenizer_files import find_tokenizer
from funnel_engine.checkpoints.word_piece import FIRST, LAST, make_tokenizer
from funnel_engine.config import FunnelConfig
from funnel_engine.funnel_transformer_config import FunnelTransformerConfig
from funnel_engine.heads import DenseConfig, HeadConfig, head_shapes
from funnel_engine.hugging_face_config.funnel_transformer import read_funnel_transformer_config
from funnel_engine.input_files import decode, file_in, is_file, optional_file, read_json, reading
from funnel_engine.models.funnel_transformer import weight_shapes
from funnel_kernels.errors import CheckpointError, FunnelError

PICKLE = "pytorch_model.bin"
DISCRIMINATOR = "discriminator_predictions."
DROPPED = drop_by_name((".attention.k_head.bias", DISCRIMINATOR, "lm_head."))
REPLACED = ("replaced",)  # the label of the discriminator: a token that is not that of the original text
# Our names -> theirs. Where there are several, our weight contains them one after another.
NORMS = {"attention_norm": "attention.layer_norm", "mlp_norm": "ffn.layer_norm"}
LAYER: dict[str, tuple[str, ...]] = {
    "qkv": ("attention.q_head.weight", "attention.k_head.weight", "attention.v_head.weight"),
    "value_bias": ("attention.v_head.bias",),
    "relative_biases": ("attention.r_w_bias", "attention.r_r_bias", "attention.r_s_bias"),
    "relative_types": ("attention.seg_embed",),
    "attention_output": ("attention.post_proj.weight",),
    "attention_output_bias": ("attention.post_proj.bias",),
    "up": ("ffn.linear_1.weight",),
    "up_bias": ("ffn.linear_1.bias",),
    "down": ("ffn.linear_2.weight",),
    "down_bias": ("ffn.linear_2.bias",),
}
# The end of the name of a class -> the task of its head.
TASKS = {
    "ForSequenceClassification": "classify",
    "ForMultipleChoice": "classify",
    "ForTokenClassification": "tag",
    "ForQuestionAnswering": "answer",
    "ForPreTraining": "tag",
}


def matches(path: Path) -> bool:
    """Whether a folder has the config.json of a Funnel-Transformer."""
    if not is_file(path / CONFIG):
        return False
    try:
        return read_json(path / CONFIG).get("model_type") == "funnel"
    except FunnelError:  # not JSON: the reader of the usual format says so
        return False


def read_funnel_transformer(root: Path, sliding_window: int | None = None) -> SourceModel:
    """Reads a directory without the values of its tensors.

    Raises:
        CheckpointError: files are missing, damaged or do not fit together, or the head is not supported.
    """
    if sliding_window is not None:
        raise CheckpointError(f"{root} is a Funnel-Transformer, which has no sliding window; leave it out")
    if is_file(root / MODULES):
        raise CheckpointError(
            f"{root} is a model of sentence-transformers, which is not supported for a Funnel-Transformer; give a "
            f"folder without {MODULES}, and the pooling to Engine.load"
        )
    config_file = file_in(root, CONFIG, str(root))
    fields = read_json(config_file)
    tensors = read_weights(root)
    has_decoder = any(".decoder.layers." in f".{name}" for name in tensors)
    with reading(config_file):
        config, funnel = read_funnel_transformer_config(fields, has_decoder)
        architectures = decode(tuple[str, ...], fields.get("architectures") or [], "architectures in config.json")
        head = read_head(architectures, fields, config)
    check_output(root, head, funnel)
    prefix = "funnel." if any(name.startswith("funnel.") for name in tensors) else ""
    parts = {**encoder_parts(config, prefix), **head_parts(config, head)}
    weights, dropped = assemble(root, parts, tensors, DROPPED)
    return SourceModel(
        format="funnel_transformer",
        config=config,
        head=head,
        weights=weights,
        dropped=dropped,
        directory=root,
        funnel=funnel,
        **find_texts(root, config),
    )


def find_texts(root: Path, config: FunnelTransformerConfig) -> dict[str, Any]:
    """How texts are prepared, by the fields of `SourceModel`: with tokenizer.json, or else with a vocabulary."""
    text, tokenizer_file = find_tokenizer(root, config)
    made = None if tokenizer_file else make_tokenizer(root)
    if made is None:
        return {"text": text, "tokenizer_file": tokenizer_file}
    text = dataclasses.replace(text, begin=made.token_to_id(FIRST), end=made.token_to_id(LAST))
    return {"text": text, "tokenizer_file": None, "tokenizer_json": made.to_str()}


def read_weights(root: Path) -> Mapping[str, SourceTensor]:
    """The tensors of safetensors files or, where there are none, of pytorch_model.bin."""
    pickle = optional_file(root, PICKLE)
    if pickle is not None and not any(is_file(root / name) for name in (SINGLE_FILE, INDEX)):
        return unwrap(pickle, read_file(pickle))
    return read_tensors(root, DROPPED)


def pooling_of(config: FunnelTransformerConfig) -> str:
    """What a sentence vector is: the row of [CLS], as classifiers of sequences read it, where it is not pooled."""
    return "first" if config.separate_cls else "mean"


def read_head(architectures: tuple[str, ...], fields: dict[str, Any], config: FunnelTransformerConfig) -> HeadConfig:
    """The head of a class."""
    pooling = pooling_of(config)
    found = [(suffix, task) for name in architectures for suffix, task in TASKS.items() if name.endswith(suffix)]
    if not found:
        return HeadConfig(pooling)
    suffix, task = found[0]
    width = config.hidden_size
    if task == "answer":
        return HeadConfig(pooling, task=task, labels=("start", "end"), classifier_bias=True)
    if suffix == "ForPreTraining":
        dense = DenseConfig(width, width, bias=True, activation="gelu_tanh")
        return HeadConfig(pooling, task=task, labels=REPLACED, classifier_bias=True, classifier_dense=dense)
    if task == "tag":
        return HeadConfig(pooling, task=task, labels=read_labels(fields), classifier_bias=True)
    labels = ("choice",) if suffix == "ForMultipleChoice" else read_labels(fields)
    dense = DenseConfig(width, width, bias=True, activation="tanh")
    return HeadConfig("first", False, (dense,), None, task, labels, True, "pooled")


def check_output(root: Path, head: HeadConfig, funnel: FunnelConfig) -> None:
    """Raises `CheckpointError` if a head of tokens has no decoder below it."""
    if head.task in ("tag", "answer") and funnel.output_stride != 1:
        raise CheckpointError(f"{root} has a head for tokens but no decoder; its files do not belong together")


def encoder_parts(config: FunnelTransformerConfig, prefix: str) -> Parts:
    """For each of our encoder weights, the tensors that contain its values, in order."""
    blocks = [
        f"encoder.blocks.{block}.{layer}" for block, size in enumerate(config.block_sizes) for layer in range(size)
    ]
    parts: dict[str, tuple[Part, ...]] = {}
    width, heads = config.hidden_size, (config.num_heads, config.head_dim)
    for ours, shape in weight_shapes(config).items():
        part, _, rest = ours.partition(".")
        if part == "embedding":
            parts[ours] = (Part(f"{prefix}embeddings.word_embeddings.weight", shape),)
        elif part == "embedding_norm":
            parts[ours] = norm_parts(f"{prefix}embeddings.layer_norm", width)
        else:
            index, _, leaf = rest.partition(".")
            at = prefix + (blocks[int(index)] if part == "layers" else f"decoder.layers.{index}")
            if leaf in NORMS:
                parts[ours] = norm_parts(f"{at}.{NORMS[leaf]}", width)
            elif leaf == "relative_positions":
                parts[ours] = (Part(f"{at}.attention.r_kernel", (width, *heads), axes=(1, 2, 0)),)
            else:
                names = LAYER[leaf]
                theirs = {"relative_biases": heads, "relative_types": (2, *heads)}
                each = theirs.get(leaf, (shape[0] // len(names), *shape[1:]))
                parts[ours] = tuple(Part(f"{at}.{name}", each) for name in names)
    return parts


def norm_parts(name: str, width: int) -> tuple[Part, ...]:
    """The factors of a norm, which become zero-centred, and what it adds."""
    return Part(f"{name}.weight", (width,), minus=1.0), Part(f"{name}.bias", (width,))


def head_parts(config: FunnelTransformerConfig, head: HeadConfig) -> Parts:
    """The same for the weights of the head."""
    names: dict[str, str | None]
    if head.classifier_dense is not None:
        names = {"classifier.dense": f"{DISCRIMINATOR}dense", "classifier": f"{DISCRIMINATOR}dense_prediction"}
    else:
        outputs = {"classify": "classifier.linear_out", "tag": "classifier", "answer": "qa_outputs"}
        names = {"dense.0": "classifier.linear_hidden", "classifier": outputs.get(head.task or "")}
    parts = {}
    for ours, shape in head_shapes(config.hidden_size, head).items():
        module, _, leaf = ours.rpartition(".")
        parts[ours] = (Part(f"{names[module]}.{leaf}", shape),)
    return parts
