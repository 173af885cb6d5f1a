"""What the row-wise Pallas kernels share: blocks of whole windows, and rows a stride apart.

A TPU register is 8 rows by 128 columns. Rows that are a stride apart are gathered and scattered by strided loads and
stores of vector memory, which the compiler has for float32 arrays of exactly 128 columns. So a block of full-length
rows passes through scratch memory of shape [columns / 128, rows, 128]: window `i` of a block is its rows
`stride * i .. stride * i + stride - 1`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from funnel_kernels.target import Unsupported

LANES = 128  # columns of a register
WINDOWS = 16  # a block holds a multiple: the rows of a register in bfloat16
MOST_WINDOWS = 512  # the program of a block is unrolled; it takes the compiler seconds from here on
GROUP = 8  # windows whose rows are in registers at once; more spill
FEWEST_BLOCKS = 4  # so that transfers overlap with work, and two cores both have some
MEMORY = 8 * 2**20  # of a block, in bytes: half of the smallest vector memory, TPU v4's; registers spill into the rest


def check_width(width: int) -> None:
    """Raises `Unsupported` for rows that do not fill registers."""
    if width % LANES:
        raise Unsupported(f"rows of width {width}; the kernel needs a multiple of {LANES}")


def windows_per_block(windows: int, window_bytes: int) -> int:
    """How many windows a block holds.

    Args:
        windows: that there are.
        window_bytes: of vector memory that each takes, in all buffers together.

    Raises:
        Unsupported: the smallest block does not fit.
    """
    fitting = MEMORY // window_bytes // WINDOWS * WINDOWS
    if not fitting:
        raise Unsupported(
            f"{WINDOWS} windows take {WINDOWS * window_bytes:,} bytes of vector memory; the kernel may use {MEMORY:,}"
        )
    wanted = pl.cdiv(windows, FEWEST_BLOCKS * WINDOWS) * WINDOWS
    return min(fitting, wanted, MOST_WINDOWS)


def widen(columns: jax.Array, width: int) -> jax.Array:
    """[n, 128] -> [n, width]: the same columns again and again. It costs nothing, unlike a broadcast of one column."""
    return jnp.concatenate([columns] * (width // LANES), axis=1)


def rms_norm(x: jax.Array, weight_ref: Any, eps: float) -> jax.Array:
    """Gemma's RMSNorm of rows [n, D] by the weight in `weight_ref` [1, D], all float32."""
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + eps)
    return x * inverse_rms * (1.0 + weight_ref[...].astype(jnp.float32))
