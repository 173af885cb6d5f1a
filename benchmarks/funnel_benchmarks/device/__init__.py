"""What `funnel bench all` runs: the suites at sizes that fill an accelerator, within some minutes.

It needs Python, NumPy, JAX, click, rich and, for the Triton kernels, Triton and jax-triton. matplotlib draws the plots
and PyTorch with transformers is a peer: where they are missing, the report says what was left out because of it.
"""
