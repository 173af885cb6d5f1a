"""Programs full of Triton kernels lower for CUDA without a GPU: names, order and dtypes of arguments, grids.

In a process of its own, where kernels are compiled instead of interpreted and JAX's CUDA plugin can be found (`make
test` puts it into a folder beside the packages).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOWER = """
import re
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from funnel_engine import FunnelConfig, HeadConfig, preset
from funnel_engine.model import forward
from funnel_engine.packing import make_plan, pack
from funnel_engine.weights import DTYPES, expected_shapes, nest
from funnel_kernels import triton_calls
from tiny_models import CONFIG

triton_calls.capability = lambda: int(sys.argv[3])
config = CONFIG if sys.argv[1] == "tiny" else preset(sys.argv[1])
dtype = DTYPES[sys.argv[2]]
funnel = FunnelConfig.after(1, recovery="mean_last", pool_query_only=True)
batch = pack(make_plan(config, funnel), np.arange(50, dtype=np.int32), np.array([0, 20, 50], np.int32), 64)
weights = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in expected_shapes(config, HeadConfig()).items()}
params = jax.eval_shape(lambda flat: nest(flat, config, funnel), weights)
program = jax.jit(lambda params, batch: forward(params, batch, config=config, funnel=funnel, backend="triton"))
allowed = [export.DisabledSafetyCheck.custom_call("triton_kernel_call")]
text = export.export(program, platforms=["cuda"], disabled_checks=allowed)(params, batch).mlir_module()
print(config.num_layers, len(re.findall(r"custom_call @triton_kernel_call", text)))
"""


@pytest.mark.parametrize(
    ("model", "dtype", "capability"), [("tiny", "float32", 80), ("tiny", "bfloat16", 90), ("gemma-2b", "bfloat16", 90)]
)
def test_a_forward_pass_lowers_for_cuda(model, dtype, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [Path(sys.prefix) / "lowering", Path(__file__).parents[1]]
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", LOWER, model, dtype, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    layers, calls = map(int, done.stdout.split()[-2:])
    assert calls == layers + 2  # attention in every layer, pool_norm, recover_norm
