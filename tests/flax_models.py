"""Checkpoints as DeepMind's Flax library and Orbax write them, from random Hugging Face models.

`leaves_of` names parameters as the FLAT layout does, without its "transformer/". The other functions make of these the
trees of parameters that Orbax saves, which differ in their keys alone.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

Leaves = dict[str, np.ndarray]
NORMS = {
    "input_layernorm": "pre_attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
NORMS_OF_FAMILY = {
    "gemma": {"input_layernorm": "pre_attention_norm", "post_attention_layernorm": "pre_ffw_norm"},
    "gemma2": NORMS,
    "gemma3_text": NORMS | {"self_attn.q_norm": "attn/_query_norm", "self_attn.k_norm": "attn/_key_norm"},
    "t5_gemma_module": {
        "pre_self_attn_layernorm": "pre_attention_norm",
        "post_self_attn_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_ffw_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


def leaves_of(encoder: Any, *, transposed_gating: bool = False) -> Leaves:
    """The parameters of a Hugging Face encoder: queries, keys and values fused where there are as many of each.

    Args:
        transposed_gating: the two inputs of the MLP are stored [out, in], as in Gemma 2 9B, 27B and Gemma 3.
    """
    config = encoder.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    state = {name.removesuffix(".weight"): tensor.detach().numpy() for name, tensor in encoder.state_dict().items()}

    def project(name: str, count: int) -> np.ndarray:
        """[count * H, D] -> [count, D, H]"""
        return np.stack([rows.T for rows in np.split(state[name], count)])

    leaves = {"embedder/input_embedding": state["embed_tokens"], "final_norm/scale": state["norm"]}
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"layers.{layer}.", f"layer_{layer}/"
        query = project(f"{theirs}self_attn.q_proj", heads)
        key, value = (project(f"{theirs}self_attn.{name}_proj", kv_heads) for name in "kv")
        if heads == kv_heads:
            leaves[f"{ours}attn/qkv_einsum/w"] = np.stack([query, key, value])
        else:
            leaves[f"{ours}attn/q_einsum/w"] = query
            leaves[f"{ours}attn/kv_einsum/w"] = np.stack([key, value])
        by_head = np.split(state[f"{theirs}self_attn.o_proj"], heads, axis=1)
        leaves[f"{ours}attn/attn_vec_einsum/w"] = np.stack([columns.T for columns in by_head])
        gate, up = (state[f"{theirs}mlp.{name}_proj"] for name in ("gate", "up"))
        leaves[f"{ours}mlp/gating_einsum/w"] = np.stack([gate, up] if transposed_gating else [gate.T, up.T])
        leaves[f"{ours}mlp/linear/w"] = state[f"{theirs}mlp.down_proj"].T
        for name, flax_name in NORMS_OF_FAMILY[config.model_type].items():
            leaves[f"{ours}{flax_name}/scale"] = state[theirs + name]
    return leaves


def flat(leaves: Leaves, prefix: str = "transformer/") -> dict[str, Any]:
    """{"transformer/layer_0/attn/q_einsum": {"w": ...}}, as published."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *path, leaf = name.split("/")
        tree.setdefault(prefix + "/".join(path), {})[leaf] = value
    return tree


def nested(leaves: Leaves) -> dict[str, Any]:
    """{"layer_0": {"attn": {"q_einsum": {"w": ...}}}}, as `model.init` makes it: the MLP's arrays have no "w"."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *path, leaf = (name.removesuffix("/w") if "/mlp/" in name else name).split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def kauldron(leaves: Leaves) -> dict[str, Any]:
    """A whole training state; the optimiser has an array for every parameter."""
    return {
        "params": nested(leaves),
        "opt_state": [{"mu": nested({name: -value for name, value in leaves.items()})}, {"count": np.int32(3)}],
        "collections": {"statistics": np.ones(3, np.float32)},
        "step": np.int32(7),
    }


def stacked(leaves: Leaves, period: int = 2) -> dict[str, Any]:
    """Layers `kind`, `kind + period`, `kind + 2 period`, ... in one array."""
    stacks: dict[str, list[np.ndarray]] = {}
    rest: Leaves = {}
    for name, value in leaves.items():  # in the order of the layers
        prefix, layer, leaf = re.fullmatch(r"(?:(.*)layer_(\d+)/)?(.*)", name).groups()
        if layer is None:
            rest[name] = value
        else:
            kind = int(layer) % period
            stacks.setdefault(f"{prefix}stacked_layers/attention_type_{kind}/{leaf}", []).append(value)
    return flat(rest | {name: np.stack(values) for name, values in stacks.items()})


def save(path: Path, tree: Mapping[str, Any], dtype: str = "float32", **options: Any) -> Path:
    """Writes a checkpoint with Orbax; options: `use_ocdbt`, `use_zarr3`."""

    def array(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: array(value) for key, value in node.items()}
        if isinstance(node, list):
            return [array(value) for value in node]
        return jnp.asarray(node, dtype if node.dtype == np.float32 else None)

    if options:
        ocp.PyTreeCheckpointer(**options).save(path, array(tree))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, array(tree))
    return path
