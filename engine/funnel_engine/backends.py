"""Which backend serves each op of a model here, and why not a better one."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from funnel_engine.config import FunnelConfig, ModelConfig
from funnel_kernels import dispatch
from funnel_kernels.add_norm import IMPLEMENTATIONS as ADD_NORM
from funnel_kernels.attention import IMPLEMENTATIONS as ATTENTION
from funnel_kernels.linear import ADD_NORM_IMPLEMENTATIONS as LINEAR_ADD_NORM
from funnel_kernels.linear import IMPLEMENTATIONS as LINEAR
from funnel_kernels.linear import PackedWeight
from funnel_kernels.linear.packed import packs
from funnel_kernels.pool import IMPLEMENTATIONS as POOL
from funnel_kernels.recover import IMPLEMENTATIONS as RECOVER

ROWS = 64  # any number: no backend refuses one


class Served(NamedTuple):
    """The backend that serves an op, and why those that are tried before it do not."""

    backend: str
    refusals: dict[str, str]

    def __str__(self) -> str:
        return "; ".join([self.backend, *(f"not {name}: {reason}" for name, reason in self.refusals.items())])


def served_by(
    config: ModelConfig, funnel: FunnelConfig, dtype: str, backend: str, *, over_mesh: bool = False
) -> dict[str, Served]:
    """What runs each op of a model; nothing is computed. Over a mesh weights are never packed."""

    def rows(count: int, width: int, kind: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, width) if width else (count,), jnp.dtype(kind))

    keys = rows(ROWS, config.num_kv_heads * config.head_dim)
    bounds = rows(ROWS, 0, "int32")
    matrix: Any = rows(config.hidden_size, config.hidden_size)
    if packs(matrix.dtype, backend) and not over_mesh:
        matrix = PackedWeight(rows(1, 0), matrix.shape)  # of any size: only the call looks at it
    x, short, weight = rows(ROWS, config.hidden_size), rows(ROWS // 2, config.hidden_size), rows(config.hidden_size, 0)
    # Traced inside a mesh, whatever its size, the kernels give the reasons that hold there.
    where = jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("model",))) if over_mesh else nullcontext()
    with where:
        answers = {
            "linear": dispatch.explain(LINEAR, backend, x, matrix, None),
            "linear_add_norm": dispatch.explain(
                LINEAR_ADD_NORM, backend, x, matrix, x, weight, None, eps=config.norm_eps
            ),
            "attention": dispatch.explain(
                ATTENTION, backend,
                rows(ROWS, config.num_heads * config.head_dim), keys, keys, bounds, bounds,
                heads=config.num_heads, kv_heads=config.num_kv_heads, scale=config.query_scale, softcap=config.softcap,
            ),
            "add_norm": dispatch.explain(ADD_NORM, backend, x, x, weight, None, eps=config.norm_eps),
            "pool_norm": dispatch.explain(
                POOL, backend, x, rows(ROWS, 0, "bool"), weight,
                stride=2, pool=funnel.pool, eps=config.norm_eps,
            ),
            "recover_norm": dispatch.explain(
                RECOVER, backend, short, x, weight,
                stride=2, mode="sum", site=funnel.recovery_site, eps=config.norm_eps,
            ),
        }  # fmt: skip
    return {op: Served(name or "nothing", refusals) for op, (name, refusals) in answers.items()}
