"""What this machine can do at best: a large matrix product, and a copy of memory that no cache holds.

On a CPU where our kernels run, the product is oneDNN's own with a packed weight, in a process of its own that sleeps
meanwhile; in float32 where the processor does not multiply bfloat16, because our kernels compute in float32 there too.
The copy is NumPy's into memory that is there already, by as many threads as there are cores. Elsewhere both are XLA's.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funnel_benchmarks.kernels import onednn_product
from funnel_benchmarks.machine import multiplies_bfloat16, usable_cores
from funnel_benchmarks.measure import Sample, sampler
from funnel_benchmarks.peers.peer import Peer
from funnel_engine.devices import local_target
from funnel_kernels.linear.packed import packs

HOST_PRODUCT = {"rows": 1024, "in": 2048, "out": 16384}
HOST_SIDE, DEVICE_SIDE = 2048, 8192  # of both factors of XLA's product
HOST_BYTES, DEVICE_BYTES = 2**28, 2**31  # that are copied
SAMPLE_SECONDS = 0.02


class Ceiling(NamedTuple):
    """Something that is done as fast as it can be.

    Attributes:
        name: "product" or "copy".
        work: floating-point operations of a call, or bytes that it reads and writes.
        about: what it is, in words.
        sample: measures the seconds of a call.
    """

    name: str
    work: int
    about: str
    sample: Sample


@contextmanager
def ceilings(dtype: str, shrink: int = 1, seconds: float = SAMPLE_SECONDS) -> Iterator[tuple[Ceiling, Ceiling]]:
    """The product, and the copy, as long as the block lasts.

    Args:
        dtype: of the product's operands, and of its weights only on a CPU that does not multiply bfloat16: it computes
            in float32.
        shrink: divides each side of the product, for rehearsals; and the bytes twice.
        seconds: that a sample lasts at least.
    """
    host = jax.default_backend() == "cpu"
    if host and dtype == "bfloat16" and not multiplies_bfloat16():
        dtype = "float32"
    side, size = (HOST_SIDE, HOST_BYTES) if host else (DEVICE_SIDE, DEVICE_BYTES)
    with ExitStack() as stack:
        if host and packs(local_target("cpu")):
            product = stack.enter_context(onednn(dtype, shrink))
        else:
            product = xla_product(dtype, side // shrink, seconds)
        copy = (
            stack.enter_context(host_copy(size // shrink**2, seconds)) if host else xla_copy(size // shrink**2, seconds)
        )
        yield product, copy


@contextmanager
def onednn(dtype: str, shrink: int) -> Iterator[Ceiling]:
    sizes = {name: size // shrink for name, size in HOST_PRODUCT.items()}
    with Peer(onednn_product, **sizes, dtype=dtype, batches=[[0]]) as peer:
        about = f"{' x '.join(map(str, sizes.values()))}, {dtype}, oneDNN ({peer.facts['implementation']})"
        yield Ceiling("product", 2 * math.prod(sizes.values()), about, peer.sample)


@contextmanager
def host_copy(size: int, seconds: float) -> Iterator[Ceiling]:
    threads = usable_cores()
    source = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    pairs = list(zip(np.array_split(np.empty_like(source), threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(np.copyto, *zip(*pairs, strict=True)))

        about = f"{size / 1e9:.2g} GB by {threads} threads"
        yield Ceiling("copy", 2 * size, about, sampler(copy, seconds))


def xla_product(dtype: str, side: int, seconds: float) -> Ceiling:
    a, b = (jax.random.normal(jax.random.key(stream), (side, side), dtype) for stream in range(2))
    product = jax.jit(jnp.matmul)
    about = f"{side} x {side} x {side}, {dtype}, XLA"
    return Ceiling("product", 2 * side**3, about, sampler(lambda: product(a, b), seconds))


def xla_copy(size: int, seconds: float) -> Ceiling:
    x, copy = jnp.arange(size // 4, dtype=jnp.int32), jax.jit(jnp.copy)  # a result may not be an argument: it is copied
    return Ceiling("copy", 2 * size, f"{size / 1e9:.2g} GB, XLA", sampler(lambda: copy(x), seconds))
