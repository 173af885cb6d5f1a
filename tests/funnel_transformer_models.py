"""Tiny random Funnel-Transformers of transformers, and what they compute."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 60,
    "block_sizes": [2, 1, 1],
    "num_decoder_layers": 2,
    "d_model": 32,
    "n_head": 4,
    "d_head": 8,
    "d_inner": 48,
    "attention_type": "factorized",  # works for every length; "relative_shift" fails for some below 7 tokens
}


def random_model(name: str = "FunnelModel", *, seed: int = 0, **fields: Any) -> torch.nn.Module:
    """A model of a class of transformers, with weights large enough that every term of a score matters."""
    generator = torch.Generator().manual_seed(seed)
    config = transformers.FunnelConfig(**(SIZES | fields))
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_factor = parameter_name.endswith("layer_norm.weight")
            parameter.normal_(float(is_factor), 0.3, generator=generator)
    return model


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def random_inputs(lengths: Any, *, seed: int = 0, vocabulary: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, offsets, types) of sequences of these lengths; the types are random."""
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = generator.integers(0, vocabulary, offsets[-1]).astype(np.int32)
    return ids, offsets, generator.integers(0, 3, offsets[-1]).astype(np.int32)


def run_each(model: Any, ids: np.ndarray, offsets: np.ndarray, types: np.ndarray) -> list[Any]:
    """What the model returns for each sequence alone, without padding."""
    outputs = []
    with torch.no_grad():
        for begin, end in itertools.pairwise(offsets):
            tokens, kinds = (torch.from_numpy(array[None, begin:end].astype(np.int64)) for array in (ids, types))
            outputs.append(model(tokens, token_type_ids=kinds))
    return outputs
