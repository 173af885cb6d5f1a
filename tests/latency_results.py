"""Contents of result files of `funnel bench latency`, made by hand."""

import dataclasses
from typing import Any

from funnel_benchmarks.funnels import funnel_name
from funnel_engine import FunnelConfig

LAYERS = (2, 8, 14)
RATIOS = (0.56, 0.73, 0.9)
IDEALS = (0.55, 0.72, 0.88)


def spread(low: float, median: float, high: float) -> dict[str, float]:
    return {"low": low, "median": median, "high": high}


def make_row(strides: tuple[int, ...], ratio: float, ideal: float, **options: Any) -> dict[str, Any]:
    funnel = FunnelConfig(strides, **options)
    return {
        "cell": f"{funnel_name(funnel)}; 2 x 512 tokens",
        "funnel": {"name": funnel_name(funnel), **dataclasses.asdict(funnel)},
        "batch": BATCH,
        "seconds": spread(0.19 * ratio, 0.2 * ratio, 0.22 * ratio) | {"samples": [0.2 * ratio] * 4},
        "baseline_seconds": spread(0.198, 0.2, 0.203) | {"samples": [0.2] * 4},
        "ratio": spread(ratio - 0.02, ratio, ratio + 0.05),
        "saving_percent": 100 * (1 - ratio),
        "ideal_ratio": ideal,
        "efficiency": ideal / ratio,
        "tokens_per_second": 1024 / (0.2 * ratio),
        "flops_per_second": 3.3e11 + len(strides) * 1e9,
        "baseline_flops": 66_000_000_000,
        "padding_waste": 0.013,
        "compile_seconds": 1.7,
        "baseline_padding_waste": 0.004,
        "baseline_compile_seconds": 2.5,
        "peak_memory_gb": {"process": 0.81 - len(strides) / 100},
    }


BATCH = {
    "name": "2 x 512 tokens",
    "source": "all equal",
    "sequences": 2,
    "tokens": 1024,
    "shortest": 512,
    "median": 512.0,
    "longest": 512,
}


def make_result() -> dict[str, Any]:
    model = {
        "name": "<tiny & co>",  # must be escaped in HTML
        "family": "gemma",
        "layers": 18,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "heads": 4,
        "kv_heads": 1,
        "head_dim": 128,
        "attention": "bidirectional",
        "parameters": 69_000_000,
        "weights": "random",
        "dtype": "bfloat16",
    }
    options = {
        "model": model,
        "batches": [BATCH],
        "backend": "auto",
        "served_by": "xla",
        "repeats": 2,
        "order": "A B B A",
        "seed": 0,
    }
    machine = {
        "cpu": "Imaginary 9000",
        "cores": 2,
        "memory_gb": 25.3,
        "platform": "Linux",
        "devices": ["cpu"],
        "python": "3.11.7",
        "jax": "0.10.2",
        "jaxlib": "0.10.2",
        "numpy": "2.4.6",
        "revision": None,
    }
    figures = zip(LAYERS, RATIOS, IDEALS, strict=True)
    rows = [make_row((1,) * layer + (2,), ratio, ideal) for layer, ratio, ideal in figures]
    return {
        "schema": 3,
        "suite": "latency",
        "started": "2026-01-02T03:04:05Z",
        "options": options,
        "machine": machine,
        "resumed": [],
        "complete": True,
        "rows": rows,
        "left_out": [],
        "errors": [],
    }


def with_other_rows() -> dict[str, Any]:
    """The same among rows of other kinds, with the first of its own kind before the others."""
    result = make_result()
    first, *rest = result["rows"]
    others = [
        make_row((1, 1, 4), 0.4, 0.33),
        make_row((1, 1, 2, 2), 0.4, 0.33),
        make_row((1, 1, 1, 2), 0.6, 0.5, pool="mean"),
        make_row((1, 1, 1, 1, 2), 0.6, 0.5, recovery="tile"),
        make_row((1, 1, 1, 2), 0.6, 0.5) | {"batch": BATCH | {"name": "1 x 4096 tokens"}},
    ]
    result["rows"] = [first, *others, *reversed(rest)]
    return result
