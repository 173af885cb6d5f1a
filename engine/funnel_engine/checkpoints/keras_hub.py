"""Reads KerasHub's Gemma 1, 2, 3 and EmbeddingGemma: a preset's folder, or a `.weights.h5` file.

A folder has config.json (`GemmaBackbone` or `Gemma3Backbone`), model.weights.h5 (above 10 GB, model.weights.json and
the shards that it lists), and assets/tokenizer/vocabulary.spm. For a single file, the architecture comes from a
config.json of KerasHub or Hugging Face in the same folder, or else from `architectures.find_config`.

Where KerasHub differs from the models' authors, we follow the authors:
- KerasHub's bidirectional window of W sees (W - 1) // 2 tokens to the left and W // 2 to the right, ours W // 2 both.
- KerasHub 0.32 scales queries by the head dim even if the config says `query_head_dim_normalize=false` (Gemma 2 and 3
  of 27B); we follow the config and scale by `hidden_dim // num_query_heads`.
The `intermediate_dim` of its Gemma 1 and 2 is twice the width of the MLP, because it counts gate and up together.

h5py finds the datasets, which Keras writes uncompressed and in one piece. Their values are then read as from a
safetensors file. HDF5 files can refer to other files through links, external storage and virtual datasets; all of these
are refused.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from funnel_engine.checkpoints.architectures import find_config, is_embedding_gemma
from funnel_engine.checkpoints.safetensors_file import StoredTensor
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.checkpoints.tensors import Part, Parts, assemble, drop_by_name, join_shards
from funnel_engine.checkpoints.tokenizer_files import find_tokenizer
from funnel_engine.config import ModelConfig
from funnel_engine.heads import DenseConfig, HeadConfig
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.input_files import decode, file_in, is_file, open_file, optional_file, read_json, reading
from funnel_engine.messages import quote
from funnel_engine.weights import expected_shapes
from funnel_kernels.errors import CheckpointError

CONFIG = "config.json"
SUFFIX = ".weights.h5"
WEIGHTS = "model.weights.h5"
INDEX = "model.weights.json"
TOKENIZER_FOLDERS = ("assets", "tokenizer")
VOCABULARY = "vocabulary.spm"  # a SentencePiece model

# The prefixes of "layers/" in a file: none for a backbone, the path of the backbone for a task model.
PREFIXES = ("", "layers/gemma_backbone/", "layers/gemma3_backbone/")
EMBEDDING = "layers/reversible_embedding/vars/0"
DENSE = ("layers/dense/vars/0", "layers/dense_1/vars/0")  # after EmbeddingGemma's mean; [in, out]
DROPPED = drop_by_name(tuple(f"{prefix}layers/gemma3_vision_encoder/" for prefix in PREFIXES))

ROWS_OF_HEADS = (0, 2, 1)  # [heads, D, head dim] -> heads * head dim rows of [D]
COLUMNS_OF_HEADS = (2, 0, 1)  # [heads, head dim, D] -> D rows
TRANSPOSED = (1, 0)


def matches(path: Path) -> bool:
    """Whether `path` is a `.weights.h5` file, or a folder with KerasHub's weight files."""
    if not path.is_dir():
        return path.name.endswith(SUFFIX)
    return is_file(path / WEIGHTS) or is_file(path / INDEX)


def read_keras(path: Path, sliding_window: int | None = None) -> SourceModel:
    """Reads a preset or a file of weights without the values of its tensors.

    Args:
        sliding_window: replaces the value in the config.

    Raises:
        CheckpointError: a file is damaged or refers to other files, the architecture is not supported, tensors are
            missing, quantized or do not fit the config, or h5py is not installed.
    """
    directory = path if path.is_dir() else path.parent
    tensors = read_tensors(path)
    prefixes = [prefix for prefix in PREFIXES if prefix + EMBEDDING in tensors]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{path} is not a KerasHub Gemma: it must have one {EMBEDDING}; the names of its {len(tensors)} tensors "
            f"are {quote(tensors)}"
        )
    (prefix,) = prefixes
    config, dense = read_architecture(directory, tensors, prefix, sliding_window)
    dense_parts = {
        f"dense.{index}.weight": (Part(prefix + name, (layer.in_features, layer.out_features), axes=TRANSPOSED),)
        for index, (name, layer) in enumerate(zip(DENSE, dense, strict=False))
    }
    parts = {**encoder_parts(config, prefix), **dense_parts}
    weights, dropped = assemble(path, parts, tensors, DROPPED)
    folder = directory
    for name in TOKENIZER_FOLDERS:
        folder = file_in(folder, name, str(folder))
    text, tokenizer_file = find_tokenizer(folder, config, VOCABULARY)
    return SourceModel(
        format="keras",
        config=config,
        head=HeadConfig(dense=dense, similarity="cosine" if dense else None),
        weights=weights,
        dropped=dropped,
        text=text,
        tokenizer_file=tokenizer_file,
        directory=directory,
    )


def read_architecture(
    directory: Path, tensors: Mapping[str, StoredTensor], prefix: str, sliding_window: int | None
) -> tuple[ModelConfig, tuple[DenseConfig, ...]]:
    """The encoder and its dense layers, from KerasHub's config, or from Hugging Face's and the tensors."""
    config_file = optional_file(directory, CONFIG)
    fields = read_json(config_file) if config_file else {}
    if config_file and "class_name" in fields:
        with reading(config_file):
            return read_keras_config(fields, config_file, sliding_window)
    shape = tensors[prefix + EMBEDDING].shape
    if len(shape) != 2 or not all(shape):
        raise CheckpointError(f"{prefix}{EMBEDDING} in {directory} has shape {shape}; it must be a matrix")
    config = find_config(directory, tensors, lambda config: encoder_parts(config, prefix), shape[0], sliding_window)
    shapes = [tensors[prefix + name].shape for name in DENSE if prefix + name in tensors]
    if (shapes or is_embedding_gemma(config)) and [len(shape) for shape in shapes] != [2, 2]:
        raise CheckpointError(f"{directory} must have EmbeddingGemma's matrices {' and '.join(DENSE)}; fetch it again")
    with reading(directory):
        return config, tuple(DenseConfig(shape[1], shape[0]) for shape in shapes)


def read_keras_config(
    fields: dict[str, Any], file: Path, sliding_window: int | None
) -> tuple[ModelConfig, tuple[DenseConfig, ...]]:
    """Translates the config of a backbone to the fields of Hugging Face, for `read_model_config`.

    It does not contain the length of the longest sequence. This is Hugging Face's default for the family, and 2048 for
    EmbeddingGemma.

    Raises:
        CheckpointError: the class is not supported, or no Gemma has this combination of options.
        ConfigError: the values do not fit together.
    """
    class_name = fields["class_name"]
    options = decode(dict[str, Any], fields.get("config"), f"{file}: config")

    def option(kind: Any, name: str, default: Any = None) -> Any:
        return decode(kind, options.get(name, default), f"{file}: {name}")

    def require(name: str, value: Any, default: Any) -> None:
        if options.get(name, default) != value:
            raise CheckpointError(
                f"{file}: {name} is {options.get(name, default)!r}; for {family} it must be {value!r}"
            )

    post_norms = option(bool, "use_post_attention_norm", False)
    families = {"GemmaBackbone": "gemma2" if post_norms else "gemma", "Gemma3Backbone": "gemma3_text"}
    if not isinstance(class_name, str) or class_name not in families:
        raise CheckpointError(f"{file} is of a {class_name!r:.80}; this engine reads {' and '.join(families)}")
    family = families[class_name]
    require("use_post_ffw_norm", family != "gemma", False)
    require("use_post_attention_norm", family != "gemma", False)
    require("layer_norm_epsilon", 1e-6, 1e-6)  # KerasHub's blocks use it for any value in the config
    sliding = option(bool, "use_sliding_window_attention", False)
    heads, width, head_dim = (option(int, name) for name in ("num_query_heads", "hidden_dim", "head_dim"))
    by_head = option(bool, "query_head_dim_normalize", True)
    intermediate = option(int, "intermediate_dim")
    translated = {
        "model_type": family,
        "vocab_size": option(int, "vocabulary_size"),
        "num_hidden_layers": option(int, "num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": option(int, "num_key_value_heads"),
        "hidden_size": width,
        "head_dim": head_dim,
        "intermediate_size": intermediate if family == "gemma3_text" else intermediate // 2,
        "query_pre_attn_scalar": head_dim if by_head else width // max(heads, 1),
        "sliding_window": option(int, "sliding_window_size", 4096),
        "sliding_window_pattern": (6 if family == "gemma3_text" else 2) if sliding else 1,  # the period of full layers
    }
    dense: tuple[DenseConfig, ...] = ()
    if family == "gemma3_text":
        require("use_query_key_norm", True, True)
        require("attention_logit_soft_cap", None, None)
        translated["rope_parameters"] = {
            "full_attention": rope(1_000_000.0, option(float, "global_rope_scaling_factor", 1.0)),
            "sliding_attention": rope(10_000.0, option(float, "local_rope_scaling_factor", 1.0)),
        }
        translated["use_bidirectional_attention"] = option(bool, "use_bidirectional_attention", False)
        if option(bool, "is_embedding_model", False):
            translated["max_position_embeddings"] = 2048
            middle, last = option(int, "pooling_intermediate_dim"), option(int, "embedding_dim")
            dense = (DenseConfig(middle, width), DenseConfig(last, middle))
    else:
        translated["attn_logit_softcapping"] = option(float | None, "attention_logit_soft_cap")
        if family == "gemma":
            require("attention_logit_soft_cap", None, None)
            require("use_sliding_window_attention", False, False)
    return read_model_config(translated, sliding_window), dense


def rope(theta: float, factor: float) -> dict[str, Any]:
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def encoder_parts(config: ModelConfig, prefix: str) -> Parts:
    """For each of our weights, the datasets that contain its values, in order."""
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    layer: dict[str, tuple[Part, ...]] = {
        "attention_input_norm": (Part("pre_attention_norm", (hidden,)),),
        "qkv": tuple(
            Part(f"attention/{name}_dense", (count, hidden, head_dim), axes=ROWS_OF_HEADS)
            for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
        ),
        "query_norm": (Part("attention/query_norm", (head_dim,)),),
        "key_norm": (Part("attention/key_norm", (head_dim,)),),
        "attention_output": (Part("attention/output_dense", (heads, head_dim, hidden), axes=COLUMNS_OF_HEADS),),
        "attention_output_norm": (Part("post_attention_norm", (hidden,)),),
        "mlp_input_norm": (Part("pre_ffw_norm", (hidden,)),),
        "gate_up": tuple(
            Part(name, (hidden, intermediate), axes=TRANSPOSED) for name in ("gating_ffw", "gating_ffw_2")
        ),
        "down": (Part("ffw_linear", (intermediate, hidden), axes=TRANSPOSED),),
        "mlp_output_norm": (Part("post_ffw_norm", (hidden,)),),
    }
    block = "gemma3_decoder_block" if config.family == "gemma3_text" else "gemma_decoder_block"
    parts: dict[str, tuple[Part, ...]] = {
        "embedding": (Part(prefix + EMBEDDING, (config.vocab_size, hidden)),),
        "final_norm": (Part(f"{prefix}layers/rms_normalization/vars/0", (hidden,)),),
    }
    for ours in expected_shapes(config, HeadConfig()):
        if ours.startswith("layers."):
            _, index, leaf = ours.split(".")
            path = f"{prefix}layers/{block}" + (f"_{index}" if index != "0" else "")  # Keras does not number the first
            parts[ours] = tuple(part._replace(name=f"{path}/{part.name}/vars/0") for part in layer[leaf])
    return parts


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The datasets of a file, of a folder's single weight file, or of the shards that its index lists."""
    if not path.is_dir():
        return read_datasets(path)
    if single_file := optional_file(path, WEIGHTS):
        return read_datasets(single_file)
    index = optional_file(path, INDEX)
    if index is None:
        raise CheckpointError(f"{path} has neither {WEIGHTS} nor {INDEX}; save the model with save_to_preset")
    weight_map = decode(dict[str, Any], read_json(index).get("weight_map"), f"{index}: weight_map")
    listed = {  # pairs of a group and a shard; the variables of a group may be in several
        (group, file_in(path, name, str(index)))
        for group, names in weight_map.items()
        for name in (names if isinstance(names, list) else [names])
    }
    files = sorted({file for _, file in listed})
    return join_shards(
        index,
        files,
        read_datasets,
        {(group, file.name) for group, file in listed},
        lambda name: f"/{name.rpartition('/')[0]}",
        lambda name: DROPPED(name.removeprefix("/")),
    )


def read_datasets(file: Path) -> dict[str, StoredTensor]:
    """The datasets of an HDF5 file by their path in it, without their values.

    Raises:
        CheckpointError: the file does not exist, is damaged or refers to other files, or h5py is not installed.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{file} is a Keras checkpoint; to read it, run: pip install 'funnel-engine[keras]'"
        ) from error
    with open_file(file):  # checks the file first: h5py has other errors, and would wait for a pipe
        try:
            with h5py.File(file, "r") as root:
                return {dataset.name[1:]: locate(file, dataset) for dataset in walk_datasets(file, root, set())}
        except CheckpointError:
            raise
        except Exception as error:  # for damaged bytes, h5py may raise any exception
            raise CheckpointError(f"{file} is damaged, or not an HDF5 file: {error!s:.300}. Fetch it again") from error


def walk_datasets(file: Path, group: Any, seen: set[int]) -> Iterator[Any]:
    """The datasets in a group and in its subgroups. Each object must be in the file only once.

    Raises:
        CheckpointError: an object is in the file twice, or is a link.
    """
    import h5py

    for name in group:
        where = f"{file}: {group.name}/{name}"
        link = group.id.links.get_info(name.encode())
        if link.type != h5py.h5l.TYPE_HARD:
            raise CheckpointError(
                f"{where} is a link to another object or file; a checkpoint must contain all values, so fetch it again"
            )
        address = link.u
        if address in seen:
            raise CheckpointError(f"{where} is in the file twice, which Keras does not write; fetch it again")
        seen.add(address)
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from walk_datasets(file, item, seen)
        elif isinstance(item, h5py.Dataset):
            yield item
        else:
            raise CheckpointError(
                f"{where} is neither a group nor a dataset, which Keras does not write; fetch it again"
            )


def locate(file: Path, dataset: Any) -> StoredTensor:
    """The position in its file of the values of a dataset, which Keras writes in one piece.

    Keras stores bfloat16 as two opaque bytes, with an attribute. A dtype that is not supported gets HDF5's name.
    """
    import h5py

    where = f"{file}: {dataset.name}"
    if dataset.is_virtual or dataset.external:
        raise CheckpointError(
            f"{where} has its values in other files; a checkpoint must contain all values, so fetch it again"
        )
    start = dataset.id.get_offset()  # None unless the values are in one piece
    if dataset.size and start is None:
        raise CheckpointError(
            f"{where} is compressed or in chunks, which Keras does not write; run: "
            "h5repack --layout=CONTI --filter=NONE OLD.weights.h5 NEW.weights.h5"
        )
    stored = dataset.id.get_type()
    if stored == h5py.h5t.IEEE_F32LE:
        dtype = "float32"
    elif stored == h5py.h5t.IEEE_F16LE:
        dtype = "float16"
    elif dataset.dtype == np.dtype("V2") and dataset.attrs.get("dtype") == "bfloat16":
        dtype = "bfloat16"
    else:
        dtype = f"HDF5 {dataset.dtype.str}"
    return StoredTensor(file, dataset.name[1:], dtype, dataset.shape or (), start or 0, dataset.nbytes)
