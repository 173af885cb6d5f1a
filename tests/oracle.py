"""The numerical truth of the tests: a forward pass in float64 NumPy that shares no code with the engine.

It follows the definitions (docs/semantics.md) literally: one sequence at a time, no packing, no padding, the
windows of a funnel as explicit lists of tokens, a dense boolean mask. Tensors go by the names of Hugging Face.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Tensors = Mapping[str, np.ndarray]
Windows = list[tuple[int, int]]  # the first and the last token that each row holds

# The norms of a layer: before and after attention, before and after the MLP. Where none is "after", as in Gemma 1,
# post_attention_layernorm is the one before the MLP.
PRE_NORMS = ("input_layernorm", None, "post_attention_layernorm", None)
NORMS = {
    "gemma": PRE_NORMS,
    "gemma2": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "t5gemma": (
        "pre_self_attn_layernorm",
        "post_self_attn_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
NORMS["gemma3_text"] = NORMS["gemma2"]
NORMS["t5gemma2"] = NORMS["t5gemma"]
LLAMAS = ("llama", "mistral", "qwen3", "eurobert")  # norms times w, not 1 + w; silu; embeddings as they are
NORMS |= dict.fromkeys(LLAMAS, PRE_NORMS)
GEMMA_4 = ("gemma4_text", "embedding_gemma2_text")  # norms times w, and there is more, see below
NORMS |= dict.fromkeys(GEMMA_4, NORMS["gemma2"])


def forward(
    tensors: Tensors,
    config: Mapping[str, Any],
    ids: Sequence[int],
    attention: str,
    *,
    strides: Sequence[int] = (),
    pool: str = "max",
    pool_query_only: bool = False,
    positions: str = "first",
    keep_first: bool = False,
    keep_last: bool = False,
    recovery: str | None = None,
    recovery_site: str = "before_norm",
) -> np.ndarray:  # [R, D] float64
    """Rows of one sequence after the final norm; R is the number of tokens, or of pooled rows without a recovery.

    Args:
        tensors: float64 weights of the encoder, by their Hugging Face names without any prefix.
        config: content of the `config.json` that transformers 5.23 writes for the model.
        ids: the token ids.
        attention: "bidirectional" or "causal".
        strides, ..., recovery_site: the fields of `FunnelConfig`.
    """
    family = config["model_type"]
    config = config.get("encoder", config)  # T5Gemma
    end_of_image = config.get("eoi_token_index")
    config = config.get("text_config", config)  # T5Gemma 2
    everywhere = "sliding_attention" if family == "mistral" and config["sliding_window"] else "full_attention"
    layer_types = config.get("layer_types") or [everywhere] * config["num_hidden_layers"]
    eps = config["rms_norm_eps"]
    activation = silu if family in LLAMAS else gelu
    if family in (*LLAMAS, *GEMMA_4):
        tensors = {name: tensor - 1 if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}

    x = tensors["embed_tokens.weight"][list(ids)]
    if family not in LLAMAS:
        x = x * config["hidden_size"] ** 0.5
    if end_of_image is not None:
        x[np.array(ids) == end_of_image] = tensors["embed_tokens.eoi_embedding"]
    per_layer = per_layer_inputs(tensors, config, ids, x)
    made = {}  # what the keys and values of the last layer of each type were made of
    windows = [(token, token) for token in range(len(ids))]
    full_length = [x]  # h_0, the embedding, then h_1 .. h_L, the outputs of the layers before the first funnel

    for index, layer_type in enumerate(layer_types):
        weights = {
            name.removeprefix(f"layers.{index}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"layers.{index}.")
        }
        before_attention, after_attention, before_mlp, after_mlp = (
            name and weights[f"{name}.weight"] for name in NORMS[family]
        )

        unpooled, unpooled_windows = x, windows
        if index < len(strides) and strides[index] > 1:
            groups = neighbours(len(x), strides[index], keep_first, keep_last)
            x = np.stack([pool_window(x[group], pool) for group in groups])
            windows = [(windows[group[0]][0], windows[group[-1]][1]) for group in groups]
        if index < len(layer_types) - config.get("num_kv_shared_layers", 0):
            keys, key_windows = (unpooled, unpooled_windows) if pool_query_only else (x, windows)
            made[layer_type] = norm(keys, before_attention, eps), key_windows, weights
        keys, key_windows, key_weights = made[layer_type]

        update = attend(
            family,
            config | config.get("per_layer_config", {}).get(str(index), {}),
            layer_type,
            weights,
            norm(x, before_attention, eps),
            row_positions(windows, positions),
            key_weights,
            keys,
            row_positions(key_windows, positions),
            visible(windows, key_windows, *radii(family, config, layer_type, attention)),
        )
        x = x + (update if after_attention is None else norm(update, after_attention, eps))

        normed = norm(x, before_mlp, eps)
        hidden = activation(project(weights, "mlp.gate", normed)) * project(weights, "mlp.up", normed)
        update = project(weights, "mlp.down", hidden)
        x = x + (update if after_mlp is None else norm(update, after_mlp, eps))

        if per_layer is not None:
            weights |= {name.removeprefix("ple_block."): tensor for name, tensor in weights.items()}
            inputs = np.stack([per_layer[first : last + 1, index].mean(0) for first, last in windows])
            hidden = gelu(x @ weights["per_layer_input_gate.weight"].T) * inputs
            update = hidden @ weights["per_layer_projection.weight"].T
            x = x + norm(update, weights["post_per_layer_input_norm.weight"], eps)
        x = x * weights.get("layer_scalar", 1)

        if all(stride == 1 for stride in strides[: index + 1]):
            full_length.append(x)

    def final_norm(rows):
        return norm(rows, tensors["norm.weight"], eps)

    return recover(x, windows, full_length, recovery, recovery_site, final_norm)


def per_layer_inputs(tensors: Tensors, config: Mapping[str, Any], ids: Sequence[int], x: np.ndarray):
    """[T, layers, width]: what the third part of each layer reads of each token; None if the layers have two parts."""
    tensors = {name.removeprefix("ple."): tensor for name, tensor in tensors.items()}
    if not (width := config.get("hidden_size_per_layer_input", 0)):
        return None
    shape = len(ids), config["num_hidden_layers"], width
    projected = (x @ tensors["per_layer_model_projection.weight"].T * config["hidden_size"] ** -0.5).reshape(shape)
    inputs = norm(projected, tensors["per_layer_projection_norm.weight"], config["rms_norm_eps"])
    if "embed_tokens_per_layer.weight" in tensors:
        table = tensors["embed_tokens_per_layer.weight"][list(ids)].reshape(shape)
        inputs = (inputs + table * width**0.5) / 2**0.5
    return inputs


def neighbours(rows: int, stride: int, keep_first: bool, keep_last: bool) -> list[range]:
    """Which rows are pooled into one: `stride` neighbours, the last window shorter if need be; the first row alone
    with `keep_first`. With `keep_last` the last row alone, and before it `stride` neighbours each, counted back from
    the end, so that the first window is shorter if need be."""
    if keep_last:
        groups, end = [range(rows - 1, rows)], rows - 1
        while end > 0:
            groups.insert(0, range(max(0, end - stride), end))
            end -= stride
        return groups
    starts = [0, *range(1, rows, stride)] if keep_first else list(range(0, rows, stride))
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], rows], strict=True)]


def pool_window(rows: np.ndarray, pool: str) -> np.ndarray:
    return {"max": lambda: rows.max(0), "mean": lambda: rows.mean(0), "first": lambda: rows[0]}[pool]()


def row_positions(windows: Windows, rule: str) -> np.ndarray:
    """RoPE positions, in tokens."""
    first, last = np.array(windows).T
    return {"first": first, "last": last, "mid": (first + last) / 2, "compact": np.arange(len(windows))}[rule]


def radii(family: str, config: Mapping[str, Any], layer_type: str, attention: str) -> tuple[float, float]:
    """How many tokens a layer sees to the left and to the right, besides the row's own."""
    left = right = np.inf
    if layer_type == "sliding_attention":
        left = config["sliding_window"] - 1
        if family in ("gemma3_text", "gemma4_text") and attention == "bidirectional":
            left = config["sliding_window"] // 2
        if family == "embedding_gemma2_text" or (family in LLAMAS and attention == "bidirectional"):
            left = config["sliding_window"]
        right = left
        if family == "t5gemma2":
            left, right = (config["sliding_window"] + 1) // 2 - 1, config["sliding_window"] // 2
    return left, 0 if attention == "causal" else right


def visible(queries: Windows, keys: Windows, left: float, right: float) -> np.ndarray:
    """[Nq, Nk] bool. A row's place is its first token, whatever its RoPE position is."""
    distance = np.array(keys)[None, :, 0] - np.array(queries)[:, None, 0]
    return (-left <= distance) & (distance <= right)


def attend(family, config, layer_type, weights, queries, query_positions, key_weights, keys, key_positions, mask):
    """Grouped-query attention of normed rows, with its output projection: [Nq, D] and [Nk, D] -> [Nq, D].

    `key_weights` are those of the layer whose keys and values are read.
    """
    head_dim = config["head_dim"]
    values = "v" if "self_attn.v_proj.weight" in key_weights else "k"  # some layers of Gemma 4 have no values
    q, k, v = (
        project(layer, f"self_attn.{name}", rows).reshape(len(rows), -1, head_dim)
        for layer, name, rows in ((weights, "q", queries), (key_weights, "k", keys), (key_weights, values, keys))
    )
    if family in ("gemma3_text", "t5gemma2", "qwen3", *GEMMA_4):
        q = norm(q, weights["self_attn.q_norm.weight"], config["rms_norm_eps"])
        k = norm(k, key_weights["self_attn.k_norm.weight"], config["rms_norm_eps"])
    if family in GEMMA_4:
        v = norm(v, 0, config["rms_norm_eps"])
    rope = config["rope_parameters"].get(layer_type, config["rope_parameters"])
    q, k = rotate(q, query_positions, rope), rotate(k, key_positions, rope)
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)  # key/value head j serves query heads j*group, ...

    scores = np.einsum("qhd,khd->hqk", q, k, optimize=True)
    if family not in GEMMA_4:
        scores = scores * config.get("query_pre_attn_scalar", head_dim) ** -0.5
    if family in ("gemma2", "t5gemma"):
        scores = np.tanh(scores / config["attn_logit_softcapping"]) * config["attn_logit_softcapping"]
    scores = np.where(mask, scores, -np.inf)
    probabilities = np.exp(scores - scores.max(-1, keepdims=True))  # every row sees itself, so the maximum is finite
    probabilities /= probabilities.sum(-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", probabilities, v, optimize=True)
    return project(weights, "self_attn.o", mixed.reshape(len(queries), -1))


def project(weights: Tensors, name: str, rows: np.ndarray) -> np.ndarray:
    """A product, and its bias if it has one."""
    return rows @ weights[f"{name}_proj.weight"].T + weights.get(f"{name}_proj.bias", 0)


def rotate(x: np.ndarray, positions: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """RoPE of [N, heads, d]. The float32 angle, of torch's float32 frequencies, is the specification: at position
    8191 the exact one is 3e-4 away from what every implementation of these models computes."""
    head_dim = x.shape[-1]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope["rope_theta"] ** exponents
    if rope["rope_type"] == "llama3":
        frequencies = stretch(frequencies, rope)
    elif rope["rope_type"] != "default":
        frequencies = frequencies / rope.get("factor", 1.0)
    frequencies[int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2) :] = 0  # the other pairs do not turn
    angles = positions.astype(np.float32)[:, None, None] * frequencies.numpy()
    assert angles.dtype == np.float32
    cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    first, second = x[..., : head_dim // 2], x[..., head_dim // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def stretch(frequencies: torch.Tensor, rope: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3's frequencies: long waves turn slower by `factor`, short ones do not, and those between by some part."""
    result = []
    for frequency in frequencies:
        turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)  # in the original context
        kept = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        kept = kept.clamp(0, 1)
        result.append((1 - kept) * frequency / rope["factor"] + kept * frequency)
    return torch.stack(result)


def norm(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    """RMSNorm with a zero-centred weight."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + weight)


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh approximation."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def recover(x, windows, full_length, recovery, site, final_norm):
    """Tiles the pooled rows back to tokens, combines them with full-length rows, and applies the final norm."""
    if recovery is None:
        return final_norm(x)
    tiled = np.concatenate([np.tile(row, (last - first + 1, 1)) for row, (first, last) in zip(x, windows, strict=True)])
    if recovery == "tile":
        return final_norm(tiled)
    layers = full_length[1:] or full_length  # the embedding stands in if the funnel is before the first layer
    how, source = recovery.split("_")
    kept = {"first": layers[0], "last": layers[-1], "max": np.max(layers, 0), "mean": np.mean(layers, 0)}[source]
    combine = {"sum": np.add, "mean": lambda a, b: (a + b) / 2, "max": np.maximum}[how]
    if site == "after_norm":
        return combine(final_norm(tiled), final_norm(kept))
    return final_norm(combine(tiled, kept))
