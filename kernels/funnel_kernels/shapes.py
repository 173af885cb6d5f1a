"""Type names for arrays by shape, used in signatures. N and M count packed rows, D is the width of a model.

All of them are `jax.Array`. Type checkers do not compare shapes; the checks of an op do (`checks.py`).
"""

import jax

Rows = jax.Array  # [N, D], float32 or bfloat16: packed rows, e.g. the residual stream
Heads = jax.Array  # [N, heads * d]: the heads of a row, side by side
Vector = jax.Array  # [D]: the weight of a norm, zero-centred (the factor is 1 + weight)
Bounds = jax.Array  # [N] int32: for each query row, the first key row that it sees, or one past the last
Mask = jax.Array  # [N] bool
Angles = jax.Array  # [N, d / 2] float32: cosines or sines of the angles of a head
