"""Measures kernels and engine on the accelerator of this machine: `python -m funnel_benchmarks.accelerator --out DIR`.

It needs Python, NumPy, JAX and, for the Triton kernels, Triton and jax-triton. matplotlib draws the plots and PyTorch
with transformers is a peer: where they are missing, the report says what was left out because of it.
"""

import os

# Read when JAX makes its first array. A peer runs in a process of its own, and needs memory that JAX would hold.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
