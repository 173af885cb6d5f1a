"""Reads GGUF files of llama.cpp: Gemma 1, 2, 3 and EmbeddingGemma; one file, or all parts of a split one.

Weights are dequantized to float32 piece by piece. llama.cpp stores norms as `1 + weight`, and no rows are permuted. It
does not store what follows from the architecture; the rules are those of its `src/models/gemma*.cpp`:

- Scores are scaled by `head_dim ** -0.5`. The 27B models, known by their number of layers, have the width per head
  instead of `head_dim`.
- "gemma-embedding" is a bidirectional Gemma 3. The others are causal; "gemma" can be bidirectional too.

A key of the architecture that is not listed here is refused, because it could change the result.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funnel_engine.checkpoints.gguf_file import MAGIC, TYPES, GGUFTensor, Header, check_types, read_header
from funnel_engine.checkpoints.gguf_tokenizer import MODEL, SENTENCEPIECE, rebuild_tokenizer
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.checkpoints.tensors import Part, Parts, assemble, drop_by_name, join_shards
from funnel_engine.checkpoints.tokenizer_files import find_tokenizer
from funnel_engine.config import ModelConfig
from funnel_engine.heads import DenseConfig, HeadConfig, head_shapes
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.input_files import decode, file_in, is_file, reading
from funnel_engine.messages import quote
from funnel_engine.presets import preset
from funnel_engine.text import TextConfig
from funnel_engine.weights import expected_shapes, is_norm
from funnel_kernels.errors import CheckpointError

SUFFIX = ".gguf"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")  # a part of a split file
ARCHITECTURES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text", "gemma-embedding": "gemma3_text"}
LAYERS_27B = {"gemma2": 46, "gemma3": 62}
LAYER_TYPES = {0: "full_attention", 1: "sliding_attention"}
POOLINGS = {0: "mean", 1: "mean", 2: "first", 3: "last"}  # 0 is none; then `embed` takes the mean, as without a head
# Keys of the header after the name of the architecture -> the field of a Hugging Face config.
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
# Our names -> llama.cpp's, without ".weight". Our weight contains the rows of several tensors one after another.
OUTER = {"embedding": "token_embd", "final_norm": "output_norm"}
LAYER = {
    "attention_input_norm": ("attn_norm",),
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "query_norm": ("attn_q_norm",),
    "key_norm": ("attn_k_norm",),
    "attention_output": ("attn_output",),
    "attention_output_norm": ("post_attention_norm",),
    "mlp_input_norm": ("ffn_norm",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
    "mlp_output_norm": ("post_ffw_norm",),
}
DENSE = ("dense_2", "dense_3")  # after EmbeddingGemma's mean
DROPPED = drop_by_name(("output.weight",))  # the output table of a language model, if it is not the embedding's


def matches(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a folder with GGUF files and without safetensors."""
    if path.is_dir():
        return any(path.glob(f"*{SUFFIX}")) and not any(path.glob("*.safetensors"))
    return is_file(path) and first_bytes(path) == MAGIC


def first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


def read_gguf(path: Path, sliding_window: int | None = None) -> SourceModel:
    """Reads a model without the values of its tensors.

    Args:
        path: the file, any part of a split file, or a folder with one model.
        sliding_window: replaces the value in the file.

    Raises:
        CheckpointError: a file is damaged, missing or not supported, or the package gguf is not installed.
    """
    files = find_parts(path)
    first = files[0]
    headers: dict[Path, Header] = {}

    def read_part(file: Path) -> dict[str, GGUFTensor]:
        headers[file] = read_header(file)
        return headers[file].tensors

    tensors = join_shards(first, files, read_part)
    check_parts(headers, len(tensors))
    fields = headers[first].fields
    check_types(first, [tensor for name, tensor in tensors.items() if not DROPPED(name)])
    with reading(first):
        config, head = read_model(first, fields, tensors, sliding_window)
    weights, dropped = assemble(first, weight_parts(config, head), tensors, DROPPED, TYPES)
    text, tokenizer_json, tokenizer_file = read_tokenizer(first, fields, config)
    used = {rows.tensor.name: rows.tensor.dtype for weight in weights.values() for rows in weight}
    return SourceModel(
        format="gguf",
        config=config,
        head=head,
        weights=weights,
        dropped=dropped,
        text=text,
        tokenizer_file=tokenizer_file,
        directory=first.parent,
        tokenizer_json=tokenizer_json,
        quantized=dict(sorted(Counter(kind for kind in used.values() if kind.startswith("Q")).items())),
    )


def find_parts(path: Path) -> list[Path]:
    """The file of a model, or all parts of it in order."""
    if path.is_dir():
        names = sorted(file.name for file in path.glob(f"*{SUFFIX}"))
        models = {PART.sub(r"\1", name) for name in names}
        if len(models) != 1:
            raise CheckpointError(
                f"{path} must have one model, but it has {quote(names) or 'no .gguf file'}; give the path of the file"
            )
        path = file_in(path, names[0], str(path))
    match = PART.fullmatch(path.name)
    if match is None or int(match[3]) == 0:
        return [path]
    name, _, count = match.groups()
    return [file_in(path.parent, f"{name}-{i:05}-of-{count}{SUFFIX}", str(path)) for i in range(1, int(count) + 1)]


def check_parts(headers: Mapping[Path, Header], tensor_count: int) -> None:
    """Raises `CheckpointError` unless the files are all parts of one model, as their headers count them."""
    for index, (file, header) in enumerate(headers.items()):
        number, count, total = (
            decode(int, header.fields.get(f"split.{name}", default), f"{file}: split.{name}")
            for name, default in (("no", 0), ("count", 1), ("tensors.count", tensor_count))
        )
        if (number, max(count, 1)) != (index, len(headers)):
            raise CheckpointError(
                f"{file} says that it is part {number + 1} of {max(count, 1)}, but its name says {index + 1} of "
                f"{len(headers)}; fetch all parts under their own names (NAME-00001-of-0000N.gguf), or join them: "
                "llama-gguf-split --merge FIRST.gguf NEW.gguf"
            )
        if total != tensor_count:
            raise CheckpointError(
                f"{file} says that all parts have {total} tensors, but they have {tensor_count}; fetch them again"
            )


class Keys:
    """The values in a header that belong to the architecture. Each is taken once; `refuse_others` refuses the rest."""

    def __init__(self, path: Path, architecture: str, fields: Mapping[str, Any]) -> None:
        self.where, prefix = f"{path}: {architecture}.", f"{architecture}."
        self.values = {name.removeprefix(prefix): fields[name] for name in fields if name.startswith(prefix)}

    def take(self, name: str, kind: Any, default: Any = None) -> Any:
        """The value of a key, or its default. A key without a default must be there, unless its kind is Any."""
        value = self.values.pop(name, default)
        if value is None and kind is not Any:
            raise CheckpointError(f"{self.where}{name} is missing; fetch the file again, or convert the original model")
        return decode(kind, value, self.where + name)

    def require(self, name: str, value: Any) -> None:
        if (found := self.values.pop(name, value)) != value:
            raise CheckpointError(
                f"{self.where}{name} is {found!r:.80}, but only {value!r:.80} is supported here; convert the original "
                "model, or fetch another file"
            )

    def refuse_others(self) -> None:
        if self.values:
            raise CheckpointError(
                f"{self.where}* has keys that this engine does not know and that could change the result: "
                f"{quote(self.values)}; convert the original model"
            )


def read_model(
    path: Path, fields: Mapping[str, Any], tensors: Mapping[str, GGUFTensor], sliding_window: int | None
) -> tuple[ModelConfig, HeadConfig]:
    """The encoder and its head.

    Raises:
        CheckpointError: the architecture is not supported, a key is missing or unknown, or keys contradict each other.
        ConfigError: the values do not fit together.
    """
    architecture, kind = fields.get("general.architecture"), fields.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{path} is of type {kind!r:.80}; give the path of a whole model")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} has architecture {architecture!r:.80}; this engine reads {', '.join(ARCHITECTURES)}"
        )
    table = tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise CheckpointError(f"{path} has no matrix token_embd.weight; fetch the whole model again")
    keys = Keys(path, architecture, fields)
    translated = translate(keys, architecture, table.shape[0])
    head = read_head(path, keys, tensors)
    keys.refuse_others()
    config = read_model_config(translated, sliding_window)
    published = expected_shapes(preset("embeddinggemma-300m"), HeadConfig())
    if not head.dense and expected_shapes(config, HeadConfig()) == published:
        raise CheckpointError(
            f"{path} is EmbeddingGemma without its two dense layers, so its vectors would be others; write it again: "
            "convert_hf_to_gguf.py --sentence-transformers-dense-modules FOLDER"
        )
    return config, head


def translate(keys: Keys, architecture: str, vocab_size: int) -> dict[str, Any]:
    """The fields of a Hugging Face config, for `read_model_config`."""
    family = ARCHITECTURES[architecture]
    config: dict[str, Any] = {theirs: keys.take(name, int) for name, theirs in SIZES.items()}
    config |= {"model_type": family, "vocab_size": vocab_size}
    config["rms_norm_eps"] = keys.take("attention.layer_norm_rms_epsilon", float)
    head_dim, per_head = config["head_dim"], config["hidden_size"] // max(1, config["num_attention_heads"])
    largest = config["num_hidden_layers"] == LAYERS_27B.get(architecture)
    config["query_pre_attn_scalar"] = per_head if largest else head_dim
    keys.require("vocab_size", vocab_size)
    keys.require("attention.value_length", head_dim)
    keys.require("rope.dimension_count", head_dim)

    theta = keys.take("rope.freq_base", float, None if family == "gemma3_text" else 10_000.0)
    scaling, factor = keys.take("rope.scaling.type", str, "linear"), keys.take("rope.scaling.factor", float, 1.0)
    rope = {"rope_type": "default" if scaling == "none" else scaling, "rope_theta": theta, "factor": factor}
    if family == "gemma3_text":
        sliding_rope = {"rope_theta": keys.take("rope.freq_base_swa", float, 10_000.0)}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": sliding_rope}
    else:
        keys.require("rope.freq_base_swa", theta)
        config["rope_parameters"] = rope

    keys.take("final_logit_softcapping", Any)  # for the language model's output, which is left out
    if architecture == "gemma":
        return config | {"is_causal": keys.take("attention.causal", bool, True)}
    if family == "gemma2":
        config["attn_logit_softcapping"] = keys.take("attn_logit_softcapping", float, 50.0)
    width = keys.take("attention.sliding_window", int, 4096 if family == "gemma2" else 0)
    pattern = keys.take("attention.sliding_window_pattern", Any)
    if width == 0:
        config["sliding_window_pattern"] = 1  # every layer is a full one
    elif isinstance(pattern, list):
        config["layer_types"] = [LAYER_TYPES.get(kind, kind) for kind in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern
    config["sliding_window"] = width or None
    bidirectional = architecture == "gemma-embedding"
    keys.require("attention.causal", not bidirectional)
    return config | {"use_bidirectional_attention": bidirectional}


def read_head(path: Path, keys: Keys, tensors: Mapping[str, GGUFTensor]) -> HeadConfig:
    """The pooling, and EmbeddingGemma's dense layers."""
    pooling = keys.take("pooling_type", int, 1)
    if pooling not in POOLINGS:
        raise CheckpointError(
            f"{keys.where}pooling_type is {pooling}; this engine reads {', '.join(map(str, POOLINGS))} (none, mean, "
            "first, last)"
        )
    shapes = [tensors[f"{name}.weight"].shape for name in DENSE if f"{name}.weight" in tensors]
    if shapes and ([len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]):
        raise CheckpointError(f"{path} must have two matrices {' and '.join(DENSE)} that fit together; fetch it again")
    for name, (out_features, in_features) in zip(DENSE, shapes, strict=False):
        keys.require(f"{name}_feat_in", in_features)
        keys.require(f"{name}_feat_out", out_features)
    dense = tuple(DenseConfig(out_features, in_features) for out_features, in_features in shapes)
    return HeadConfig(POOLINGS[pooling], dense=dense, similarity="cosine" if dense else None)


def weight_parts(config: ModelConfig, head: HeadConfig) -> Parts:
    """For each of our weights, the tensors that contain its rows, in order."""
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {"qkv": (q_width, kv_width, kv_width), "gate_up": (config.intermediate_size,) * 2}
    parts = {}
    for ours, shape in expected_shapes(config, HeadConfig()).items():
        block, _, leaf = ours.rpartition(".")  # "layers.3" and "qkv", or "" and "embedding"
        prefix = block.replace("layers", "blk")
        names = [f"{prefix}.{name}.weight" for name in LAYER[leaf]] if block else [f"{OUTER[leaf]}.weight"]
        sizes = rows.get(leaf, shape[:1])
        minus = float(is_norm(ours))  # llama.cpp stores `1 + weight`
        parts[ours] = tuple(
            Part(name, (size, *shape[1:]), minus=minus) for name, size in zip(names, sizes, strict=True)
        )
    for ours, shape in head_shapes(config.hidden_size, head).items():
        parts[ours] = (Part(f"{DENSE[int(ours.split('.')[1])]}.weight", shape),)
    return parts


def read_tokenizer(
    path: Path, fields: Mapping[str, Any], config: ModelConfig
) -> tuple[TextConfig, str | None, Path | None]:
    """How texts are prepared, and the content of a tokenizer.json from the header, or the tokenizer in the folder.

    Raises:
        CheckpointError: the file has a tokenizer of another kind, and there is none in the folder.
    """
    kind = fields.get(MODEL, "none")
    if kind == SENTENCEPIECE:
        return *rebuild_tokenizer(path, fields, config.vocab_size), None
    text, tokenizer_file = find_tokenizer(path.parent, config)
    if tokenizer_file is None and kind != "none":
        raise CheckpointError(
            f"{path}: {MODEL} is {kind!r:.80}, but Gemma's tokenizer is {SENTENCEPIECE!r}; put the model's own "
            "tokenizer.json beside it"
        )
    return text, None, tokenizer_file
