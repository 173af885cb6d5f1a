"""Suites for a machine with an accelerator, at sizes that fill one; `funnel bench all` runs them within some minutes.

They need Python, NumPy, JAX, click, rich and, for the Triton kernels, Triton and jax-triton. matplotlib draws the plots
and PyTorch with transformers is a peer: where they are missing, the report says what was left out because of it.
"""
