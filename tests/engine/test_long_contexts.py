"""Sequences of 8,192 and 16,384 tokens: every family runs them, with memory that is linear in the length."""

import dataclasses
import json

import numpy as np
import pytest

import hugging_face_models as hf
from funnel_engine import FunnelConfig, HeadConfig
from funnel_engine.hugging_face_config import read_model_config
from funnel_engine.programs import ProgramKey
from option_grid import each_value_once
from tiny_models import make_engine, random_ids

LONG, LONGEST = 8192, 16384
FUNNEL = FunnelConfig((1, 2), recovery="mean_last")
FAMILIES = {
    "gemma": hf.gemma,
    "gemma2": hf.gemma2,
    "gemma3": hf.gemma3,
    "embeddinggemma": lambda: hf.gemma3(use_bidirectional_attention=True),
    "t5gemma": hf.t5gemma,
    "t5gemma2": hf.t5gemma2,
    "llama": hf.llama,
    "mistral": hf.mistral,
    "qwen3": hf.qwen3,
    "eurobert": hf.eurobert,
    "embeddinggemma2": hf.embedding_gemma2,
    "gemma4": hf.gemma4,
}


def long_engine(family, backend, **changes):
    """An engine of two or more tiny layers with a funnel, for sequences of up to 16,384 tokens."""
    config = read_model_config(json.loads(FAMILIES[family]().to_json_string(use_diff=False)))
    config = dataclasses.replace(config, max_positions=LONGEST, **changes)
    return make_engine(HeadConfig(), config, funnel=FUNNEL, max_batch_tokens=LONGEST, backend=backend)


@each_value_once(family=FAMILIES, backend=("xla", "cpu"))
def test_memory_is_linear_in_the_length(family, backend):
    """A program has no array with a row for each pair of tokens: at twice the length it needs twice the memory."""
    (programs,) = long_engine(family, backend).programs
    half, whole = (
        programs.program(ProgramKey("forward", rows)).memory_analysis().temp_size_in_bytes for rows in (LONG, LONGEST)
    )
    assert 1.5 * half < whole < 2.1 * half
    assert whole < LONGEST**2  # bytes: not even a mask of all pairs


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_long_sequences_run(family):
    """A causal model sees the same beginning in a short sequence and in a long one; the others give what XLA gives."""
    engine = long_engine(family, "cpu")
    vocabulary = engine.config.vocab_size
    (ids,) = random_ids([LONGEST], seed=3, vocab_size=vocabulary)
    (rows,) = engine.hidden_states([ids])
    assert rows.shape == (LONGEST, engine.config.hidden_size)
    if engine.config.attention == "causal":
        (expected,) = engine.hidden_states([ids[:LONG]])
        rows = rows[:LONG]
    else:
        (expected,) = long_engine(family, "xla").hidden_states([ids])
    np.testing.assert_allclose(rows, expected, atol=2e-4)
