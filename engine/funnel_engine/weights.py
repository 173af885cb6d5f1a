"""Names and shapes of the weights, and random weights for benchmarks and tests.

The weights of a model are a flat table by name, in memory and on disk. `nest` turns it into the tree that
`model.forward` reads. Matrices are `[out, in]`.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from funnel_engine.config import Funnel, ModelConfig, layer_steps
from funnel_engine.funnel_transformer_config import EncoderConfig, FunnelTransformerConfig
from funnel_engine.heads import HeadConfig, head_shapes
from funnel_engine.models import funnel_transformer
from funnel_kernels import PackedWeight, QuantizedWeight, Target, Weight, prepare, quantize
from funnel_kernels.errors import CheckpointError, ConfigError, InputError

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
EIGHT_BITS = ("int8", "float8_e4m3fn")  # of matrices, which have a scale for each row then (`QuantizedWeight`)
ACTIVATIONS = ("float32", "bfloat16")  # the dtypes of activations, and of the weights of heads
Shapes = dict[str, tuple[int, ...]]
# The matrices of the products, and the number of matrices that each one consists of.
PRODUCTS = {
    "qkv": 1,
    "q": 1,
    "k": 1,
    "v": 1,
    "kv": 1,
    "attention_output": 1,
    "gate_up": 2,
    "up": 1,
    "down": 1,
    "per_layer_input": 1,
    "per_layer_gate": 1,
    "per_layer_output": 1,
}
# The weights that can be 8 bits wide, by the last part of their names.
MATRICES = ("embedding", "per_layer_embedding", *PRODUCTS)
SCALE = ".scale"  # of the name of a tensor with the scales of a matrix of 8 bits


def check_dtype(dtype: Any, choices: Collection[str] = tuple(DTYPES)) -> str:
    """The name of a dtype, which is given as a name or as a NumPy or JAX dtype, e.g. `jnp.bfloat16`.

    Raises:
        ConfigError: the dtype is not one of the choices, or the value is not a dtype.
    """
    name = dtype
    if dtype is not None and not isinstance(dtype, str):
        with contextlib.suppress(TypeError):
            name = np.dtype(dtype).name
    if isinstance(name, str) and name in choices:
        return name
    if isinstance(name, str) and name == "float16":
        raise ConfigError("dtype 'float16' is refused: Gemma's residual stream overflows it; use bfloat16 or float32")
    raise ConfigError(f"dtype={name!r:.80} is not supported here; choose one of {', '.join(choices)}")


def expected_shapes(config: EncoderConfig, head: HeadConfig) -> Shapes:
    """The shape of every weight of a model, by its name in our checkpoint format.

    `qkv` contains the rows of the query, key and value projections, in this order; `gate_up` contains those of gate and
    up. A layer without keys of its own has `q` instead of `qkv`. `per_layer_input` contains the rows of all layers, and
    `per_layer_embedding` has a row for each token and layer, token by token. Norm weights are zero-centred: the factor
    is `1 + weight`, as in Gemma 1 to 3. `convert` subtracts 1 from those of other models. For Funnel-Transformer see
    `models.funnel_transformer.weight_shapes`.
    """
    if isinstance(config, FunnelTransformerConfig):
        return funnel_transformer.weight_shapes(config) | head_shapes(config.hidden_size, head)
    shapes: Shapes = {"embedding": (config.vocab_size, config.hidden_size)}
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer_shapes(config, index).items()}
    if width := config.per_layer_width:
        shapes |= {"per_layer_input": (config.num_layers * width, config.hidden_size), "per_layer_input_norm": (width,)}
        if config.per_layer_vocab:
            shapes["per_layer_embedding"] = (config.per_layer_vocab * config.num_layers, width)
    return shapes | {"final_norm": (config.hidden_size,)} | head_shapes(config.hidden_size, head)


def layer_shapes(config: ModelConfig, index: int) -> Shapes:
    """The shape of every weight of a layer, by the last part of its name."""
    hidden, heads, mlp = config.hidden_size, config.heads(config.layer_types[index]), config.mlp_width(index)
    shares_keys = config.shares_keys(index)
    shapes: Shapes = {
        "attention_input_norm": (hidden,),
        **(
            {"q": (heads.query_width, hidden)}
            if shares_keys
            else {"qkv": (heads.query_width + 2 * heads.key_width, hidden)}
        ),
        "attention_output": (hidden, heads.query_width),
        "mlp_input_norm": (hidden,),
        "gate_up": (2 * mlp, hidden),
        "down": (hidden, mlp),
    }
    if config.post_norms:
        shapes |= {"attention_output_norm": (hidden,), "mlp_output_norm": (hidden,)}
    if config.qk_norm:
        shapes |= {"query_norm": (heads.dim,)} | ({} if shares_keys else {"key_norm": (heads.dim,)})
    biased = [*("q", "qkv", "attention_output")] * config.attention_bias + ["gate_up", "down"] * config.mlp_bias
    shapes |= {f"{name}_bias": shapes[name][:1] for name in biased if name in shapes}
    if width := config.per_layer_width:
        shapes |= {"per_layer_gate": (width, hidden), "per_layer_output": (hidden, width)}
        shapes["per_layer_output_norm"] = (hidden,)
    if config.layer_scalar:
        shapes["layer_scalar"] = (1,)
    return shapes


def nest(flat: Mapping[str, Any], config: EncoderConfig, funnel: Funnel) -> dict[str, Any]:
    """The tree that `model.forward` reads: `layers` is a list, in which each layer has its rows of `per_layer_input`.
    All other weights keep their names.

    A layer that takes its keys from unpooled rows (`pool_query_only`) gets `q` and `kv` instead of `qkv`, so that no
    weight is split at run time. It gets all three if only some of the funnels by length do this.
    """
    if isinstance(config, FunnelTransformerConfig):
        return funnel_transformer.nest(flat, config)
    layers: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
    tree: dict[str, Any] = {"layers": layers}
    for name, weight in flat.items():
        if name.startswith("layers."):
            _, index, leaf = name.split(".", 2)
            layers[int(index)][leaf] = weight
        else:
            tree[name] = weight
    if config.per_layer_width:
        projection = tree.pop("per_layer_input")
        for number, layer in enumerate(layers):
            first = number * config.per_layer_width
            layer["per_layer_input"] = projection[first : first + config.per_layer_width]
    for layer, layer_type, is_split in zip(layers, config.layer_types, query_splits(config, funnel), strict=True):
        q_width = config.heads(layer_type).query_width
        for kind in ("", "_bias"):
            if any(is_split) and f"qkv{kind}" in layer:
                whole = layer[f"qkv{kind}"]
                layer |= {f"q{kind}": whole[:q_width], f"kv{kind}": whole[q_width:]}
            if all(is_split):
                layer.pop(f"qkv{kind}", None)
    return tree


def query_splits(config: ModelConfig, funnel: Funnel) -> list[list[bool]]:
    """For each layer, whether it takes its keys from unpooled rows, in each of the funnels by length."""
    by_class = [layer_steps(config, each) for _, each in funnel.classes]
    return [
        [not step.shares_keys and step.key_stride != step.query_stride for step in steps]
        for steps in zip(*by_class, strict=True)
    ]


def tensor_types(shapes: Shapes, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape and dtype of each tensor of a checkpoint, by name, if weights of these shapes are stored in a dtype.

    Norms and scalars are float32. With 8 bits, a matrix NAME is a tensor of that name and float32 scales NAME.scale,
    and weights of heads are float32.
    """
    types = {}
    for name, shape in shapes.items():
        stored = dtype_for(name, dtype, "float32" if dtype in EIGHT_BITS else dtype)
        types[name] = jax.ShapeDtypeStruct(shape, DTYPES[stored])
        if stored in EIGHT_BITS:
            types[name + SCALE] = jax.ShapeDtypeStruct(shape[:1], np.float32)
    return types


def leaf_of(name: str) -> str:
    """The last part of a name, e.g. "qkv"."""
    return name.rpartition(".")[2]


def count_bytes(shapes: Shapes, dtype: str) -> int:
    """The bytes of all tensors of `tensor_types`."""
    return sum(tensor.size * tensor.dtype.itemsize for tensor in tensor_types(shapes, dtype).values())


def join_scales(tensors: Mapping[str, Any], join: Callable[[Any, Any], Any] = QuantizedWeight) -> dict[str, Any]:
    """A table of weights from a table of tensors: a matrix and its scales become one."""
    return {
        name: join(tensor, tensors[name + SCALE]) if name + SCALE in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }


def dtype_of(weights: Mapping[str, Any]) -> str:
    """The dtype of the matrices in a table or a tree of weights."""
    return str(weights["embedding"].dtype)


def dtype_for(name: str, dtype: str, activations: str) -> str:
    """The dtype of the weight of this name: that of matrices, that of activations for a head, else float32."""
    if is_norm(name) or leaf_of(name) == "layer_scalar":
        return "float32"
    return dtype if leaf_of(name) in MATRICES else activations


def is_norm(name: str) -> bool:
    """Whether the weight of this name is that of a norm."""
    return name.endswith("_norm")


def prepare_weight(name: str, weight: Any, dtype: str, activations: str, target: Target) -> Weight:
    """Casts one weight and puts it into the layout for a target (`funnel_kernels.linear.prepare`).

    Args:
        name: its name in the flat table or in the tree.
        dtype: of matrices.
        activations: the dtype of activations, and of the weights of heads.

    Raises:
        ConfigError: the weight is already packed, with another dtype.
        CheckpointError: the weight contains NaN or infinity, and 8 bits cannot represent them.
    """
    leaf = leaf_of(name)
    weight = cast(name, weight, dtype_for(name, dtype, activations))
    return prepare(weight, parts=PRODUCTS[leaf], target=target) if leaf in PRODUCTS else weight


def cast(name: str, weight: Any, dtype: str) -> Any:
    """A weight in another dtype; quantizes it, or widens a quantized one."""
    if str(weight.dtype) == dtype:
        return weight
    if isinstance(weight, PackedWeight):
        raise ConfigError(f"{name} is packed as {weight.dtype}; cast it to {dtype} before it is prepared")
    if dtype not in EIGHT_BITS:
        return weight.astype(DTYPES[dtype])
    try:
        return quantize(weight.astype(np.float32) if isinstance(weight, QuantizedWeight) else weight, dtype)
    except InputError as error:
        raise CheckpointError(f"{name}: {error}") from error


def random_weights(config: EncoderConfig, head: HeadConfig, dtype: str, seed: int) -> dict[str, Any]:
    """A flat table of uniform random weights of standard deviation 0.02, those of norms too; scalars are near 1."""
    generator = np.random.default_rng(seed)
    shapes = expected_shapes(config, head)
    return {name: random_weight(generator, name, shape, dtype) for name, shape in shapes.items()}


def random_weight(generator: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """One weight of `random_weights` in the dtype that a checkpoint stores it in, see `tensor_types`."""
    stored = str(tensor_types({name: shape}, dtype)[name].dtype)
    weight = random_array(generator, shape, "float32" if stored in EIGHT_BITS else stored)
    if leaf_of(name) == "layer_scalar":
        weight += 1
    return quantize(weight, stored) if stored in EIGHT_BITS else weight


def random_array(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    out = np.empty(shape, DTYPES[dtype])
    rows = out.reshape(shape[0], -1)
    step = max(1, 2**22 // rows.shape[1])  # a few MB of float32 at a time, for any size of the matrix
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        part[...] = (generator.random(part.shape, np.float32) - np.float32(0.5)) * np.float32(0.02 * 12**0.5)
    return out


def count_parameters(shapes: Shapes) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())
