"""Names of arrays by their shape, for signatures. N and M count packed rows, D is the width of a model.

All are `jax.Array`: type checkers do not compare shapes, the checks of an op do (`checks.py`).
"""

import jax

Rows = jax.Array  # [N, D], float32 or bfloat16: packed rows, e.g. the residual stream
Heads = jax.Array  # [N, heads * d]: a row holds its heads side by side
Vector = jax.Array  # [D]: the weight of a norm, zero-centred (the factor is 1 + weight)
Bounds = jax.Array  # [N] int32: the first key row that each query row sees, or the first behind them
Mask = jax.Array  # [N] bool
Angles = jax.Array  # [N, d / 2] float32: cosines or sines of a head's pairs
Matrix = jax.Array  # [out, in]: a weight as it is on disk
