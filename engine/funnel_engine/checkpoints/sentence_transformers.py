"""Reads what the sentence-transformers library adds to a Hugging Face model: pooling, dense layers, prompts.

EmbeddingGemma is published in this format. Only models that the engine computes in the same way are accepted:
modules.json must list Transformer, Pooling, any number of Dense, and optionally Normalize (which `Engine.embed` does
anyway), in this order. Or the model is a CrossEncoder of the library, with a classifier: a single Transformer whose
task is "sequence-classification".
"""

from pathlib import Path
from typing import Any, NamedTuple

from funnel_engine.checkpoints.tokenizer_files import read_limit
from funnel_engine.heads import DenseConfig
from funnel_engine.input_files import decode, file_in, optional_file, read_json, reading
from funnel_engine.messages import abbreviate, quote
from funnel_kernels.errors import CheckpointError

MODULES = "modules.json"
POOLINGS = {"mean": "mean", "cls": "first", "lasttoken": "last", "max": "max"}  # theirs -> ours
# The older form: one boolean for each mode.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = {  # the last part of their name -> our name
    "Identity": "identity",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
# Files of the Transformer module; the first one that exists is read. The others are from old versions of the library.
TRANSFORMER = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
TOKENIZER_ARGUMENTS = ("tokenizer_args", "processor_kwargs")
# Arguments that the module passes to transformers (older and newer names), and those that cannot change a vector.
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
    """The fields of the Transformer module for one kind of model, as the library writes them.

    Attributes:
        model_type: the class of the library that saved the model.
        transformer_task: the task of the transformers model.
        outputs: the output of the transformers model that is used, and its name in the library.
    """

    model_type: str
    transformer_task: str
    outputs: tuple[str, str]


EMBEDDER = Task("SentenceTransformer", "feature-extraction", ("last_hidden_state", "token_embeddings"))
CROSS_ENCODER = Task("CrossEncoder", "sequence-classification", ("logits", "scores"))


class Dense(NamedTuple):
    """A linear layer, and the folder with its weights."""

    folder: Path
    config: DenseConfig


class SentenceModel(NamedTuple):
    """A model of the library.

    Attributes:
        transformer: the folder of the encoder, in Hugging Face format.
        cross_encoder: whether it is a classifier that was saved as a CrossEncoder.
        width: the width of the rows that the pooling expects; None without pooling.
        max_tokens: the largest number of tokens of a text; None leaves it to the tokenizer.
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
    """Reads modules.json and the files of its modules. Returns None if modules.json does not exist.

    Raises:
        CheckpointError: a module or an option is not supported or does not fit.
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
            f"{path} lists {', '.join(abbreviate(kinds)) or 'nothing'}; this engine runs Transformer, Pooling, any "
            "number of Dense, and optionally Normalize, or the single Transformer of a CrossEncoder that classifies"
        )
    pooling, width = read_pooling(folders[1])
    dense = tuple(Dense(folder, read_dense(folder)) for folder in folders[2:end])
    size = width
    for folder, layer in dense:
        if layer.in_features != size:
            raise CheckpointError(
                f"the layer in {folder} has in_features={layer.in_features}, but its input has {size} features; these "
                "folders do not belong together, so fetch the model again"
            )
        size = layer.out_features
    if end:
        check_normalize(folders[-1])
    max_tokens = read_transformer(folders[0], EMBEDDER)
    return SentenceModel(
        folders[0], False, width, pooling, dense, *read_sentence_config(directory, EMBEDDER), max_tokens
    )


def read_module(entry: Any, path: Path) -> tuple[str, str]:
    """The class and the folder of a module. The middle of the full class name depends on the version of the library."""
    fields = entry if isinstance(entry, dict) else {}
    kind, folder = fields.get("type"), fields.get("path")
    if not isinstance(kind, str) or not isinstance(folder, str):
        raise CheckpointError(
            f"{path} has the entry {entry!r:.200}; each entry must have a type and a path, so fetch it again"
        )
    if not kind.startswith("sentence_transformers."):
        raise CheckpointError(
            f"{path} lists {kind!r:.80}, a module with its own code; this engine only runs the modules of "
            "sentence_transformers. If it computes the same as one of them, write the name of that one"
        )
    return kind.rpartition(".")[2], folder


def read_pooling(folder: Path) -> tuple[str, int]:
    """Our name for the pooling, and the width of the rows that it pools."""
    path = file_in(folder, "config.json", str(folder))
    fields = read_json(path)
    flags = [mode for flag, mode in POOLING_FLAGS.items() if fields.get(flag)]
    modes = fields.get("pooling_mode", flags or "mean")
    modes = [modes] if isinstance(modes, str) else modes
    if modes not in [[mode] for mode in POOLINGS]:
        raise CheckpointError(f"{path} has pooling {modes!r}; this engine supports one of {', '.join(POOLINGS)}")
    require(path, fields, "include_prompt", (True,), True)
    width = fields.get("embedding_dimension", fields.get("word_embedding_dimension"))
    return POOLINGS[modes[0]], decode(int, width, f"{path}: embedding_dimension")


def read_dense(folder: Path) -> DenseConfig:
    """The sizes, bias and activation of a layer. The default activation is Tanh; by default there is a bias."""
    path = file_in(folder, "config.json", str(folder))
    fields = read_json(path)
    require(path, fields, "use_residual", (False,), False)
    require(path, fields, "module_input_name", ("sentence_embedding",), "sentence_embedding")
    require(path, fields, "module_output_name", ("sentence_embedding", None), None)
    activation = fields.get("activation_function", "torch.nn.modules.activation.Tanh")
    name = activation.rpartition(".")[2] if isinstance(activation, str) and activation.startswith("torch.nn.") else None
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: activation_function is {activation!r}; this engine supports torch's {', '.join(ACTIVATIONS)}"
        )
    with reading(path):
        return DenseConfig(
            decode(int, fields.get("out_features"), f"{path}: out_features"),
            decode(int, fields.get("in_features"), f"{path}: in_features"),
            decode(bool, fields.get("bias", True), f"{path}: bias"),
            ACTIVATIONS[name],
        )


def check_normalize(folder: Path) -> None:
    """Checks the Normalize module, for which the library before version 6 wrote no file."""
    if path := optional_file(folder, "config.json"):
        fields = read_json(path)
        for name in ("module_input_name", "module_output_name"):
            require(path, fields, name, ("sentence_embedding", None), None)


def read_transformer(folder: Path, task: Task) -> int | None:
    """Checks the Transformer module. Returns its largest number of tokens of a text, or None if it has no limit."""
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
        require(path, modalities, "message", (None,), None)  # a chat template, which would be put around every text
        require(path, modalities, "text", ({"method": "forward", "method_output_name": output},), None)
    limits = []
    for group in ARGUMENTS:
        arguments = decode(dict[str, Any], fields.get(group) or {}, f"{path}: {group}")
        if group in TOKENIZER_ARGUMENTS:
            limits.append(arguments.get("model_max_length"))
        if unknown := arguments.keys() - HARMLESS_ARGUMENTS:
            raise CheckpointError(
                f"{path}: {group} has {', '.join(abbreviate(sorted(unknown)))}, which this engine does not support; "
                "load the model with sentence-transformers, apply them there, and save it without them"
            )
    return read_limit([*limits, fields.get("max_seq_length")], str(path))


def read_sentence_config(directory: Path, task: Task) -> tuple[str | None, dict[str, str], str | None]:
    """The similarity function, the prompts by name, and the name of the default prompt."""
    path = optional_file(directory, "config_sentence_transformers.json")
    if path is None:
        return None, {}, None
    fields = read_json(path)
    require(path, fields, "model_type", (task.model_type,), EMBEDDER.model_type)
    require(path, fields, "similarity_fn_name", (None, *SIMILARITIES), None)
    require(path, fields, "truncate_dim", (None,), None)  # in this engine it is an argument of each call of `embed`
    prompts = decode(dict[str, str | None], fields.get("prompts") or {}, f"{path}: prompts")
    prompts = {name: prompt or "" for name, prompt in prompts.items()}
    default = fields.get("default_prompt_name")
    if default not in (None, *prompts):
        raise CheckpointError(f"{path}: default_prompt_name {default!r} is not one of the prompts {quote(prompts)}")
    return fields.get("similarity_fn_name"), prompts, default


def require(path: Path, fields: dict[str, Any], name: str, allowed: tuple[Any, ...], default: Any) -> None:
    """Raises `CheckpointError` unless a field, or its default if it is missing, has one of the allowed values."""
    value = fields.get(name, default)
    if value not in allowed:
        raise CheckpointError(
            f"{path}: {name} is {value!r:.80}; this engine only supports {' or '.join(map(repr, allowed))}"
        )
