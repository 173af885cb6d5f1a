"""Whether a benchmark fits in memory, estimated before anything of its size is allocated."""

import os
from pathlib import Path

import jax

from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.heads import HeadConfig
from funnel_engine.jax_settings import default_device
from funnel_engine.weights import count_bytes, expected_shapes
from funnel_kernels.errors import InputError
from funnel_kernels.mlp import rows_per_block

MLP_BYTES = 12  # per row and MLP unit, in one block of rows: the two inputs in float32, and their product
WIDTH_BYTES = 6 * 4  # per row and model dimension: residual stream, norm, update and recovery buffer
PER_LAYER_BYTES = 3 * 4  # per row and dimension of per-layer inputs: the product, its norm, and what the gate makes
HEAD_BYTES = 3 * 4  # per row and dimension of q, k and v: before RoPE, after it, and what attention makes of them


def check_memory(config: EncoderConfig, head: HeadConfig, dtype: str, rows: int) -> None:
    """Raises `InputError` unless weights and activations of a batch of `rows` packed rows are expected to fit."""
    weights, activations = weight_bytes(config, head, dtype), activation_bytes(config, rows)
    available = available_bytes()
    if weights + activations > available:
        raise InputError(
            f"this needs about {(weights + activations) / 1e9:,.1f} GB ({weights / 1e9:,.1f} GB of weights, and "
            f"activations of {rows:,} rows), but {available / 1e9:,.1f} GB are available; take a smaller batch, "
            "shorter sequences or a smaller model"
        )


def weight_bytes(config: EncoderConfig, head: HeadConfig, dtype: str) -> int:
    return count_bytes(expected_shapes(config, head), dtype)


def activation_bytes(config: EncoderConfig, rows: int) -> int:
    """The peak of one layer, `block * 12 * F + rows * (24 * D + 12 * (H + 2 K) * d + 12 * P)` bytes.

    The MLP takes all rows in one block, on a CPU at most `mlp.rows_per_block`.

    F is the MLP's width, D the model's, P that of the per-layer inputs, H and K the query and key/value heads of d
    dimensions. It is an upper estimate: buffers of attention and of the MLP, counted both, can share memory.
    """
    heads = max(each.query_width + 2 * each.key_width for each in map(config.heads, set(config.layer_types)))
    width = max(map(config.mlp_width, range(config.num_layers)))
    block = min(rows, rows_per_block(width)) if default_device().platform == "cpu" else rows
    per_row = WIDTH_BYTES * config.hidden_size + HEAD_BYTES * heads + PER_LAYER_BYTES * config.per_layer_width
    return block * MLP_BYTES * width + rows * per_row


def available_bytes() -> int:
    """Memory that is free on the device or, if that is the CPU, on the machine."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return available_host_bytes(Path("/proc/meminfo"))


def available_host_bytes(meminfo: Path) -> int:
    """`MemAvailable` of Linux; elsewhere all physical memory, since nothing portable says how much is free."""
    try:
        lines = meminfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
