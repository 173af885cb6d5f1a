"""The feed-forward half of a layer: two ops, on blocks of rows whose size suits the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from funnel_kernels.linear import Weight, gated_linear, linear_add_norm
from funnel_kernels.shapes import Rows
from funnel_kernels.target import Target

HIDDEN_PER_BLOCK = 2**24  # elements between the two products in one block of rows on a CPU


def mlp(
    x: jax.Array,  # [N, D]
    normed: jax.Array,  # [N, D]
    gate_up: Weight,  # [2 * hidden, D]
    down: Weight,  # [D, hidden]
    norm_weight: jax.Array,  # [D]
    *,
    update_weight: jax.Array | None = None,  # [D]
    scale: jax.Array | None = None,  # [1]
    gate_up_bias: jax.Array | None = None,  # [2 * hidden]
    down_bias: jax.Array | None = None,  # [D]
    activation: str,
    eps: float,
    axis: str | None = None,
    one_block: bool = False,
    target: Target,
) -> tuple[Rows, Rows]:  # [N, D] each, dtype of x
    """`x + down(activation(gate(normed)) * up(normed))`, and Gemma's RMSNorm of the sum.

    These are the ops `gated_linear` and `linear_add_norm`. The hidden rows between them are many times wider than `x`.
    On a CPU they are computed in blocks, so their memory does not grow with N, and XLA's products are faster: a layer
    of Gemma 2B on 4096 rows runs at 337 GFLOP/s on two cores, and at 296 in one block. The copies of a block's rows are
    negligible, unless the MLP is narrow: that of EmbeddingGemma is a third slower in blocks of 1024 rows. Accelerators
    need large products, so there all rows are one block.

    Args:
        x: float32 or bfloat16, the residual stream.
        normed: its norm, in the same dtype.
        gate_up, down: as `prepare` returns them for the target; gate_up with `parts=2`.
        activation: see `gated_linear`.
        gate_up_bias, down_bias: float32 or bfloat16, added to the products; None adds nothing.
        norm_weight, update_weight, scale, eps, axis: see `linear_add_norm`.
        one_block: all rows are one block on a CPU too. The derivative of blocks keeps the hidden rows of all of them.
        target: where it runs, and with which kernels.

    Raises:
        InputError: the shapes or dtypes do not fit together.
        BackendUnavailable: the backend does not support this call.
    """

    def block(x: Rows, normed: Rows) -> tuple[Rows, Rows]:
        hidden = gated_linear(normed, gate_up, bias=gate_up_bias, activation=activation, target=target)
        return linear_add_norm(
            hidden,
            down,
            x,
            norm_weight,
            update_weight=update_weight,
            scale=scale,
            bias=down_bias,
            eps=eps,
            axis=axis,
            target=target,
        )

    blocked = target.platform == "cpu" and not one_block
    most_rows = rows_per_block(gate_up.shape[0] // 2) if blocked else x.shape[0]
    return in_blocks(block, most_rows, x, normed)


def rows_per_block(hidden: int) -> int:
    """The largest number of rows in a block on a CPU, for an MLP of this width: 1024 for Gemma 2B."""
    return max(1, HIDDEN_PER_BLOCK // hidden)


def in_blocks(function: Callable[..., tuple[Rows, Rows]], most_rows: int, x: Rows, normed: Rows) -> tuple[Rows, Rows]:
    """Applies a function to the rows of both arrays, in blocks of near-equal size, one after another."""
    rows = x.shape[0]
    blocks = -(-rows // most_rows)
    if blocks == 1:
        return function(x, normed)
    size = -(-rows // blocks)

    def update(block: jax.Array, arrays: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
        rows_of_block = (jax.lax.dynamic_slice_in_dim(array, block * size, size) for array in arrays)
        x, normed = (
            jax.lax.dynamic_update_slice_in_dim(array, new, block * size, axis=0)
            for array, new in zip(arrays, function(*rows_of_block), strict=True)
        )
        return x, normed

    padded = tuple(jnp.pad(array, ((0, blocks * size - rows), (0, 0))) for array in (x, normed))
    x, normed = jax.lax.fori_loop(0, blocks, update, padded)
    return x[:rows], normed[:rows]
