"""Programs full of Triton kernels lower for CUDA without a GPU: names, order and dtypes of arguments, grids.

Every call is one that XLA may record in a CUDA graph, and no kernel is compiled once for each bucket of rows.

In a process of its own, where kernels are compiled instead of interpreted and JAX's CUDA plugin can be found (`make
test` puts it into a folder beside the packages).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from funnel_engine import preset
from tiny_models import CONFIG

LOWER = r"""
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
from funnel_kernels import Target, triton_calls
from jax_triton import triton_lib
from tiny_models import CONFIG

target = Target(sys.argv[4], "gpu", "NVIDIA GPU", sys.argv[3])
config = CONFIG if sys.argv[1] == "tiny" else preset(sys.argv[1])
dtype = DTYPES[sys.argv[2]]
funnel = FunnelConfig.after(1, recovery="mean_last", pool_query_only=True)
plan = make_plan(config, funnel)
weights = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in expected_shapes(config, HeadConfig()).items()}
params = jax.eval_shape(lambda flat: nest(flat, config, funnel), weights)
options = {"config": config, "funnel": funnel, "dtype": dtype, "target": target}
program = jax.jit(lambda params, batch: forward(params, batch, **options))
allowed = [export.DisabledSafetyCheck.custom_call(name) for name in (triton_calls.FFI_TARGET, "mosaic_gpu_v2")]

compiled = []
compile_kernel = triton_lib.compile_ttir_inplace

def counting(*arguments):
    compiled.append(arguments)
    return compile_kernel(*arguments)

triton_lib.compile_ttir_inplace = counting
for rows in (128, 192, 320):
    batch = pack(plan, np.arange(50, dtype=np.int32), np.array([0, 20, 50], np.int32), rows)
    text = export.export(program, platforms=["cuda"], disabled_checks=allowed)(params, batch).mlir_module()
    calls = re.findall(r"custom_call @(triton\w+)\(.*?\) \{(.*?)\}", text)
    assert {target for target, _ in calls} == {"triton_kernel_call_ffi"}, calls
    assert all("mhlo.backend_config = {opaque = " in attributes for _, attributes in calls), calls
    print(len(calls), text.count("custom_call @mosaic_gpu_v2("), len(compiled))
"""


LAYERS = {"tiny": CONFIG.num_layers, "gemma-2b": preset("gemma-2b").num_layers}


@pytest.mark.parametrize(
    ("model", "dtype", "capability", "backend"),
    [
        ("tiny", "float32", 80, "triton"),
        ("tiny", "bfloat16", 90, "triton"),
        ("gemma-2b", "bfloat16", 90, "triton"),
        ("gemma-2b", "bfloat16", 90, "auto"),  # attention by Mosaic
        ("gemma-2b", "float32", 90, "auto"),
    ],
)
def test_a_forward_pass_lowers_for_cuda(model, dtype, capability, backend):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [Path(sys.prefix) / "lowering", Path(__file__).parents[1], *sys.path]
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", LOWER, model, dtype, f"{capability / 10}", backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    counts = [tuple(map(int, line.split())) for line in done.stdout.splitlines()[-3:]]
    others = 2  # pool_norm, recover_norm
    if (backend, dtype) == ("auto", "bfloat16"):
        assert counts == [(others, LAYERS[model], others)] * 3
    else:
        assert counts == [(LAYERS[model] + others, 0, others + 1)] * 3
