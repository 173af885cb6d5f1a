"""Compiler options that the engine sets for XLA, by platform. What `XLA_FLAGS` names is left as it says there.

On NVIDIA GPUs XLA by itself tries out its own and cuBLAS's matrix products while it compiles, and records whole
programs, kernels of Triton included, as CUDA graphs (`xla_gpu_autotune_level`, `xla_gpu_enable_command_buffer`).
`python -m funnel_benchmarks.accelerator --only flags` measures what other options would change.
"""

import os
import re

OPTIONS: dict[str, dict[str, str | bool]] = {
    # Sums over a mesh's "model" axis run beside products that do not need them (JAX's advice for several GPUs).
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


def compiler_options(platform: str) -> dict[str, str | bool]:
    """The options for a platform of JAX ("cpu", "gpu", "tpu"), less those that the user has set in `XLA_FLAGS`."""
    named = set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))
    return {name: value for name, value in OPTIONS.get(platform, {}).items() if name not in named}
