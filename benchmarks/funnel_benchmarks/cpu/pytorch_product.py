"""PyTorch's product with a packed weight as a peer: what its compiler makes of a frozen linear layer.

It is the oneDNN inside PyTorch, newer than the wheel's; the result has the dtype of the operands. With ONEDNN_VERBOSE=1
it says `brg_matmul:avx512_core_bf16` on a blocked weight, where the processor has that.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from funnel_benchmarks.cpu.onednn_product import operands


def make(task: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], np.ndarray], dict[str, Any]]:
    """The call, which returns `x @ weight.T`, and what makes an array of it; `task` is as for `onednn_product`."""
    torch: Any = importlib.import_module("torch")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(task["cores"])
    x, weight = (
        torch.from_numpy(array.astype(np.float32)).to(getattr(torch, task["dtype"])) for array in operands(task)
    )
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, task["rows"])

    def product() -> Any:
        with torch.no_grad():
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    def array(result: Any) -> np.ndarray:
        return result.float().numpy()

    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "result": task["dtype"]}
    return product, array, facts
