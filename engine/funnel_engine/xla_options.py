"""The compiler options that the engine sets for XLA, by platform. An option in `XLA_FLAGS` is not changed.

On NVIDIA GPUs XLA compares its own and cuBLAS's matrix products while it compiles (`xla_gpu_autotune_level`), and
records runs of at least five kernels as CUDA graphs (`xla_gpu_enable_command_buffer`). A call through the legacy
custom-call interface ends such a run. The Triton kernels are called through the typed interface
(`funnel_kernels.triton_calls`), so a forward pass is one graph.
`funnel bench all --only flags` measures what other options would change.
"""

import os
import re

OPTIONS: dict[str, dict[str, str | bool]] = {
    # Sums over a mesh's "model" axis overlap with products that do not need them (JAX's advice for several GPUs).
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


def compiler_options(platform: str, threads: int = 0) -> dict[str, str | bool]:
    """The options for a JAX platform ("cpu", "gpu", "tpu"), without those that the user has set in `XLA_FLAGS`.

    Args:
        threads: of an engine on a CPU, see `threads.py`. XLA's own operations can use one thread or all of them.
    """
    named = set(re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", "")))
    options = OPTIONS.get(platform, {})
    if platform == "cpu" and threads == 1:
        options = options | {"xla_cpu_multi_thread_eigen": False}
    return {name: value for name, value in options.items() if name not in named}
