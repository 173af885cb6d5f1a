"""OpenVINO as a peer, on the CPU: the graph that torch.export makes, in float32, bfloat16, or in int8 by NNCF."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from funnel_benchmarks.peers.batches import embedding, padded
from funnel_benchmarks.peers.exported_graph import export

PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}
# NNCF finds the ranges of activations on sequences of random ids, each as likely as another, with lengths drawn from
# those that are measured, but no longer than this.
CALIBRATION_SEQUENCES, CALIBRATION_TOKENS = 16, 128


def make(task: dict[str, Any]) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """The call that embeds one of the task's batches, [count, D] float32; see the package about the task."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # OpenVINO and NNCF send nothing without it
    openvino: Any = importlib.import_module("openvino")
    nncf: Any = importlib.import_module("nncf") if task["dtype"] == "int8" else None
    model = openvino.convert_model(export(task))
    if nncf:
        model = quantized(nncf, model, calibration(task), saturates=not task["multiplies_int8"])
    options = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[task["float_dtype" if nncf else "dtype"]],
        "INFERENCE_NUM_THREADS": task["cores"],
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.compile_model(model, "CPU", options)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    dtype = {theirs: ours for ours, theirs in PRECISIONS.items()}.get(taken, taken)
    facts = {
        "openvino": openvino.__version__,
        **({"nncf": nncf.__version__, "dtype": "int8", "rest": dtype} if nncf else {"dtype": dtype}),
        "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
    }
    return embedding(task, lambda ids, mask: compiled({"ids": ids, "mask": mask})[0]), facts


def quantized(nncf: Any, model: Any, sequences: list[list[int]], *, saturates: bool) -> Any:
    """The model with weights and activations of its products in int8, by ranges on sequences of token ids.

    Args:
        saturates: whether the processor adds pairs of products in 16 bits; weights have 7 bits then.
    """
    inputs = [dict(zip(("ids", "mask"), padded([ids]), strict=True)) for ids in sequences]
    fix = nncf.OverflowFix.ENABLE if saturates else nncf.OverflowFix.DISABLE
    return nncf.quantize(
        model,
        nncf.Dataset(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(inputs),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
    )


def calibration(task: dict[str, Any]) -> list[list[int]]:
    """Sequences of random ids, other ones than the task's."""
    config = json.loads((Path(task["checkpoint"]) / "config.json").read_text(encoding="utf-8"))
    generator = np.random.default_rng(1)
    lengths = generator.choice([min(len(ids), CALIBRATION_TOKENS) for ids in task["sequences"]], CALIBRATION_SEQUENCES)
    return [generator.integers(0, config["vocab_size"], length).tolist() for length in lengths]
