"""Code that the row-wise Pallas kernels share: blocks of whole windows, and access to rows a stride apart.

A TPU register holds 8 rows of 128 columns. Strided loads and stores of vector memory gather and scatter rows that are
a stride apart. The compiler supports them only for float32 arrays of exactly 128 columns, so a block of full-length
rows passes through scratch memory of shape [columns / 128, rows, 128]. Window `i` of a block is its rows
`stride * i .. stride * i + stride - 1`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from funnel_kernels.target import Unsupported

LANES = 128  # columns of a register
WINDOWS = 16  # a block has a multiple of this: the rows of a register in bfloat16
MOST_WINDOWS = 512  # the loop over a block is unrolled; with more windows it compiles for many seconds
GROUP = 8  # windows that are in registers at once; more would spill
FEWEST_BLOCKS = 4  # so that transfers overlap with work, and each of two cores has some
MEMORY = 8 * 2**20  # bytes for a block: half of the smallest vector memory (TPU v4); the rest is for spilled registers


def check_width(width: int) -> None:
    """Raises `Unsupported` unless rows fill whole registers."""
    if width % LANES:
        raise Unsupported(f"rows are {width} wide; the width must be a multiple of {LANES}")


def windows_per_block(windows: int, window_bytes: int) -> int:
    """The number of windows in a block.

    Args:
        windows: the number of windows of the whole array.
        window_bytes: vector memory of one window, all buffers together.

    Raises:
        Unsupported: the smallest block does not fit.
    """
    fitting = MEMORY // window_bytes // WINDOWS * WINDOWS
    if not fitting:
        raise Unsupported(
            f"{WINDOWS} windows, the smallest block, need {WINDOWS * window_bytes:,} bytes of vector memory; the limit "
            f"is {MEMORY:,}"
        )
    wanted = pl.cdiv(windows, FEWEST_BLOCKS * WINDOWS) * WINDOWS
    return min(fitting, wanted, MOST_WINDOWS)


def widen(columns: jax.Array, width: int) -> jax.Array:
    """[n, 128] -> [n, width]: repeats the columns. This is free; a broadcast of one column is not."""
    return jnp.concatenate([columns] * (width // LANES), axis=1)


def rms_norm(x: jax.Array, weight_ref: Any, eps: float) -> jax.Array:
    """Gemma's RMSNorm of rows [n, D] by the weight in `weight_ref` [1, D], all float32."""
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + eps)
    return x * inverse_rms * (1.0 + weight_ref[...].astype(jnp.float32))
