"""What the sentence-transformers library puts beside a Hugging Face model: pooling, dense layers, prompts.

EmbeddingGemma is published so. Only what the engine computes in the same way is accepted: modules.json must list
Transformer, Pooling, any number of Dense, and optionally Normalize (`Engine.embed` normalises by itself), in that
order. Or it is the library's CrossEncoder around a classifier: a Transformer alone, whose task is
"sequence-classification".
"""

from pathlib import Path
from typing import Any, NamedTuple

from funnel_engine.checkpoints.tokenizer_files import read_limit
from funnel_engine.heads import DenseConfig
from funnel_engine.input_files import decode, file_in, optional_file, read_json, reading
from funnel_engine.messages import first_of, quote
from funnel_kernels.errors import CheckpointError

MODULES = "modules.json"
POOLINGS = {"mean": "mean", "cls": "first", "lasttoken": "last", "max": "max"}  # theirs -> ours
# The older spelling: one boolean for each mode.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = {  # theirs, by the last part of the name -> ours
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
# Files of the Transformer module, the first of which counts; the others are of old versions of the library.
TRANSFORMER = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
TOKENIZER_ARGUMENTS = ("tokenizer_args", "processor_kwargs")
# What that module hands on to transformers, under its older and newer names, and which of it cannot change a vector.
ARGUMENTS = (
    *TOKENIZER_ARGUMENTS,
    "model_args",
    "model_kwargs",
    "config_args",
    "config_kwargs",
    "processing_kwargs",
)
HARMLESS_ARGUMENTS = {
    "model_max_length",
    "padding_side",
    "attn_implementation",
    "torch_dtype",
    "dtype",
    "trust_remote_code",
}


class Task(NamedTuple):
    """What the Transformer module of a kind of model says of itself, as the library writes it.

    Attributes:
        model_type: the class of the library that has saved the model.
        transformer_task: what transformers is asked for.
        outputs: what of the model's output is taken, and under which name it goes on.
    """

    model_type: str
    transformer_task: str
    outputs: tuple[str, str]


EMBEDDER = Task("SentenceTransformer", "feature-extraction", ("last_hidden_state", "token_embeddings"))
CROSS_ENCODER = Task("CrossEncoder", "sequence-classification", ("logits", "scores"))


class Dense(NamedTuple):
    """A linear layer, and the folder that holds its weights."""

    folder: Path
    config: DenseConfig


class SentenceModel(NamedTuple):
    """Attributes:
    transformer: the folder of the encoder, in Hugging Face format.
    cross_encoder: whether it is a classifier, saved as a CrossEncoder.
    width: of the encoder's rows that the pooling expects; None without one.
    max_tokens: the most tokens of a text; None leaves it to the tokenizer.
    """

    transformer: Path
    cross_encoder: bool
    width: int | None
    pooling: str
    dense: tuple[Dense, ...]
    similarity: str | None
    prompts: dict[str, str]
    default_prompt_name: str | None
    max_tokens: int | None


def read_sentence_model(directory: Path) -> SentenceModel | None:
    """Reads modules.json and what it refers to; None if there is no modules.json.

    Raises:
        CheckpointError: a module or an option that this engine does not have, or that does not fit.
    """
    path = optional_file(directory, MODULES)
    if path is None:
        return None
    modules = [read_module(entry, path) for entry in read_json(path, list)]
    kinds = [kind for kind, _ in modules]
    folders = [file_in(directory, folder, str(path)) if folder else directory for _, folder in modules]
    if kinds == ["Transformer"]:
        max_tokens = read_transformer(folders[0], CROSS_ENCODER)
        return SentenceModel(
            folders[0], True, None, "mean", (), *read_sentence_config(directory, CROSS_ENCODER), max_tokens
        )
    end = -1 if kinds[-1:] == ["Normalize"] else None
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind != "Dense" for kind in kinds[2:end]):
        raise CheckpointError(
            f"{path} lists {', '.join(first_of(kinds)) or 'nothing'}; this engine runs Transformer, Pooling, then any "
            "number of Dense, then optionally Normalize, or the Transformer alone of a CrossEncoder that classifies"
        )
    pooling, width = read_pooling(folders[1])
    dense = tuple(Dense(folder, read_dense(folder)) for folder in folders[2:end])
    size = width
    for folder, layer in dense:
        if layer.in_features != size:
            raise CheckpointError(
                f"the layer in {folder} takes {layer.in_features} features, but there are {size} before it; these "
                "folders do not belong together"
            )
        size = layer.out_features
    if end:
        check_normalize(folders[-1])
    max_tokens = read_transformer(folders[0], EMBEDDER)
    return SentenceModel(
        folders[0], False, width, pooling, dense, *read_sentence_config(directory, EMBEDDER), max_tokens
    )


def read_module(entry: Any, path: Path) -> tuple[str, str]:
    """Class and folder of a module. Its full type depends on the version of the library, both ends of it do not."""
    fields = entry if isinstance(entry, dict) else {}
    kind, folder = fields.get("type"), fields.get("path")
    if not isinstance(kind, str) or not isinstance(folder, str):
        raise CheckpointError(f"{path} has the entry {entry!r:.200}, which lacks a type or a path")
    if not kind.startswith("sentence_transformers."):
        raise CheckpointError(
            f"{path} lists {kind!r:.80}, a module with code of its own; this engine only runs those of "
            "sentence_transformers. If it computes the same as one of them, name that one"
        )
    return kind.rpartition(".")[2], folder


def read_pooling(folder: Path) -> tuple[str, int]:
    """Our name of the pooling, and the width of the rows that it pools."""
    path = file_in(folder, "config.json", str(folder))
    fields = read_json(path)
    flags = [mode for flag, mode in POOLING_FLAGS.items() if fields.get(flag)]
    modes = fields.get("pooling_mode", flags or "mean")
    modes = [modes] if isinstance(modes, str) else modes
    if modes not in [[mode] for mode in POOLINGS]:
        raise CheckpointError(f"{path} asks for pooling {modes!r}; this engine has one of {', '.join(POOLINGS)}")
    require(path, fields, "include_prompt", (True,), True)
    width = fields.get("embedding_dimension", fields.get("word_embedding_dimension"))
    return POOLINGS[modes[0]], decode(int, width, f"{path}: embedding_dimension")


def read_dense(folder: Path) -> DenseConfig:
    """A layer's sizes, bias and activation; an absent activation means Tanh, an absent bias means one."""
    path = file_in(folder, "config.json", str(folder))
    fields = read_json(path)
    require(path, fields, "use_residual", (False,), False)
    require(path, fields, "module_input_name", ("sentence_embedding",), "sentence_embedding")
    require(path, fields, "module_output_name", ("sentence_embedding", None), None)
    activation = fields.get("activation_function", "torch.nn.modules.activation.Tanh")
    name = activation.rpartition(".")[2] if isinstance(activation, str) and activation.startswith("torch.nn.") else None
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: activation_function is {activation!r}; this engine has torch's {', '.join(ACTIVATIONS)}"
        )
    with reading(path):
        return DenseConfig(
            decode(int, fields.get("out_features"), f"{path}: out_features"),
            decode(int, fields.get("in_features"), f"{path}: in_features"),
            decode(bool, fields.get("bias", True), f"{path}: bias"),
            ACTIVATIONS[name],
        )


def check_normalize(folder: Path) -> None:
    """Versions of the library before 6 write no file for this module."""
    if path := optional_file(folder, "config.json"):
        fields = read_json(path)
        for name in ("module_input_name", "module_output_name"):
            require(path, fields, name, ("sentence_embedding", None), None)


def read_transformer(folder: Path, task: Task) -> int | None:
    """Checks the Transformer module. Returns the most tokens of a text if it says so, else None."""
    path = next((file for name in TRANSFORMER if (file := optional_file(folder, name)) and read_json(file)), None)
    fields = read_json(path) if path else {}
    path = path or folder / TRANSFORMER[0]
    output, name = task.outputs
    require(path, fields, "transformer_task", (task.transformer_task,), EMBEDDER.transformer_task)
    require(path, fields, "module_output_name", (name, None), None)
    require(path, fields, "do_lower_case", (False, None), None)
    require(path, fields, "query_expansion", (None, False), None)
    for name in ("query_length", "document_length", "tokenizer_name_or_path"):
        require(path, fields, name, (None,), None)
    modalities = decode(dict[str, Any] | None, fields.get("modality_config"), f"{path}: modality_config")
    if modalities is not None:
        require(path, modalities, "message", (None,), None)  # a chat template around every text, where it is there
        require(path, modalities, "text", ({"method": "forward", "method_output_name": output},), None)
    limits = []
    for group in ARGUMENTS:
        arguments = decode(dict[str, Any], fields.get(group) or {}, f"{path}: {group}")
        if group in TOKENIZER_ARGUMENTS:
            limits.append(arguments.get("model_max_length"))
        if unknown := arguments.keys() - HARMLESS_ARGUMENTS:
            raise CheckpointError(
                f"{path}: {group} has {', '.join(first_of(sorted(unknown)))}, which this engine does not follow; "
                "load the model with sentence-transformers, apply them there, and save it without"
            )
    return read_limit([*limits, fields.get("max_seq_length")], str(path))


def read_sentence_config(directory: Path, task: Task) -> tuple[str | None, dict[str, str], str | None]:
    """The similarity function, the prompts by name, and the name of the one that is used when a call names none."""
    path = optional_file(directory, "config_sentence_transformers.json")
    if path is None:
        return None, {}, None
    fields = read_json(path)
    require(path, fields, "model_type", (task.model_type,), EMBEDDER.model_type)
    require(path, fields, "similarity_fn_name", (None, *SIMILARITIES), None)
    require(path, fields, "truncate_dim", (None,), None)  # embed(truncate_dim=...) is given at each call
    prompts = decode(dict[str, str | None], fields.get("prompts") or {}, f"{path}: prompts")
    prompts = {name: prompt or "" for name, prompt in prompts.items()}
    default = fields.get("default_prompt_name")
    if default not in (None, *prompts):
        raise CheckpointError(f"{path}: default_prompt_name {default!r} is none of the prompts {quote(prompts)}")
    return fields.get("similarity_fn_name"), prompts, default


def require(path: Path, fields: dict[str, Any], name: str, allowed: tuple[Any, ...], default: Any) -> None:
    """Raises `CheckpointError` unless a field, or its default where it is absent, is one of the allowed values."""
    value = fields.get(name, default)
    if value not in allowed:
        raise CheckpointError(
            f"{path}: {name} is {value!r:.80}; this engine only runs {' or '.join(map(repr, allowed))}"
        )
