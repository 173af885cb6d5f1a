"""ONNX Runtime as a peer, on the CPU: the graph that torch.onnx exports, in float32 or with dynamic int8 products.

It has no product in bfloat16 for x86, and its optimiser for transformers does not know these families, so that what
it fuses when a session is made is all there is.
"""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from funnel_benchmarks.peers.batches import embedding
from funnel_benchmarks.peers.exported_graph import export


def make(task: dict[str, Any]) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """The call that embeds one of the task's batches, [count, D] float32; see the package about the task."""
    torch, onnxruntime, _ = map(importlib.import_module, ("torch", "onnxruntime", "onnxscript"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task["cores"]
    with tempfile.TemporaryDirectory() as folder:  # a session has read its files once it is made
        file = Path(folder) / "model.onnx"
        # One file holds 2 GB at most.
        torch.onnx.export(export(task), dynamo=True, verbose=False).save(file, external_data=True)
        if task["dtype"] == "int8":
            file = quantized(file, saturates=not task["multiplies_int8"])
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    facts = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "dtype": task["dtype"]}
    facts["threads"] = task["cores"]
    return embedding(task, lambda ids, mask: session.run(None, {"ids": ids, "mask": mask})[0]), facts


def quantized(file: Path, *, saturates: bool) -> Path:
    """The model with its weights in int8, a scale for each output, and products of activations that are rounded to
    uint8 when it runs, with a scale and a zero point for each product.

    Args:
        saturates: whether the processor adds pairs of products in 16 bits; weights have 7 bits then, as ONNX Runtime
            recommends.
    """
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    out = file.with_name("int8.onnx")
    quantization.quantize_dynamic(
        file,
        out,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=saturates,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=True,
    )
    return out
