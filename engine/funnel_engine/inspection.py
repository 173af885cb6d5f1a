"""Facts about a checkpoint, converted or not, for people and programs. The weights are not read."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from funnel_engine.checkpoints.formats import detect_format, read_source
from funnel_engine.checkpoints.native import open_checkpoint, verify_files
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.config import Funnel, FunnelConfig
from funnel_engine.flops import forward_flops, ideal_ratio
from funnel_engine.heads import DenseConfig
from funnel_engine.weights import DTYPES, count_bytes, count_parameters, expected_shapes
from funnel_kernels.errors import CheckpointError, FunnelError

Facts = dict[str, Any]


def inspect_checkpoint(
    path: Path,
    form: str | None = None,
    sliding_window: int | None = None,
    *,
    funnel: Funnel | None = None,
    seq_len: int = 512,
    verify: bool = False,
    base: Path | None = None,
) -> Facts:
    """All facts that can be found without reading a weight.

    Args:
        form, sliding_window, base: as `format`, `sliding_window` and `base` of `convert`.
        funnel: the funnel for the costs; None takes the checkpoint's own.
        seq_len: the number of tokens per sequence for the costs.
        verify: compare the files of a converted checkpoint with its hashes; this reads all files.

    Returns:
        "format"; "problems", a list of lines, which is empty if `Engine.load` or `convert` accepts the checkpoint; and
        if it is empty, the model, its head, its texts and its costs.
    """
    try:
        form = form or detect_format(path)
    except FunnelError as error:
        return {"format": None, "problems": str(error).splitlines()}
    try:
        model = read_source(path, form, sliding_window, base)
        if verify:
            check_hashes(path, form)
        return (
            {"format": form, "problems": []}
            | describe(model)
            | costs(model, model.funnel if funnel is None else funnel, seq_len)
        )
    except FunnelError as error:
        return {"format": form, "problems": [line.strip() for line in str(error).splitlines()]}


def check_hashes(path: Path, form: str) -> None:
    if form != "funnel":
        raise CheckpointError(
            f"{path} has no hashes to verify; only a converted checkpoint has them, so leave --verify out"
        )
    manifest, files = open_checkpoint(path)
    verify_files(files, manifest)


def describe(model: SourceModel) -> Facts:
    """The model, its head and its texts."""
    config, head, text = model.config, model.head, model.text
    shapes = expected_shapes(config, head)
    sliding = config.layer_types.count("sliding")
    stored = sorted({rows.tensor.dtype for weight in model.weights.values() for rows in weight})
    return {
        "family": config.family,
        "attention": config.attention,
        "layers": config.num_layers,
        "sliding_layers": sliding,
        "window": list(config.window("sliding")) if sliding else None,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.heads("sliding" if sliding else "full").keys,
        "head_dim": config.head_dim,
        "full_kv_heads": config.heads("full").keys,
        "full_head_dim": config.heads("full").dim,
        "per_layer_width": config.per_layer_width,
        "per_layer_vocab": config.per_layer_vocab,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_positions,
        "parameters": count_parameters(shapes),
        "dtype": ", ".join(stored),
        "quantized": model.quantized,
        "files": [model.name_of(file) for file in model.files],
        "gigabytes": sum(file.stat().st_size for file in model.files) / 1e9,
        "gigabytes_converted": {dtype: count_bytes(shapes, dtype) / 1e9 for dtype in DTYPES},
        "left_out": model.dropped,
        "pooling": head.pooling,
        "dense_layers": list(map(dense_facts, head.dense)),
        "similarity": head.similarity,
        "intended_funnel": str(model.funnel),
        "training": None if model.training is None else dataclasses.asdict(model.training),
        "task": head.task,
        "labels": list(head.labels),
        "classifier_input": head.classifier_input,
        "classifier_dense": None if head.classifier_dense is None else dense_facts(head.classifier_dense),
        "tokenizer": "tokenizer.json" if model.tokenizer_json else model.tokenizer_file and model.tokenizer_file.name,
        "begin_id": text.begin,
        "end_id": text.end,
        "max_tokens": text.max_tokens,
        "prompts": text.prompts,
        "default_prompt_name": text.default_prompt_name,
    }


def dense_facts(dense: DenseConfig) -> Facts:
    return {"out": dense.out_features, "in": dense.in_features, "bias": dense.bias, "activation": dense.activation}


def costs(model: SourceModel, funnel: Funnel, seq_len: int) -> Facts:
    """The FLOPs per token without a funnel, and the ratio of FLOPs with this funnel and without it."""
    lengths = np.array([seq_len], np.int32)
    return {
        "funnel": str(funnel),
        "seq_len": seq_len,
        "gflops_per_token": forward_flops(model.config, FunnelConfig(), lengths) / seq_len / 1e9,
        "ideal_ratio": ideal_ratio(model.config, funnel, lengths),
    }
