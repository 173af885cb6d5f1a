"""What a sequence is packed with, in which order and into which bucket, does not change its result."""

import numpy as np
import pytest
from transformers import Gemma2Model, Gemma3TextModel, MistralModel, Qwen3Model

import funnel_native
import hugging_face_models as hf
from funnel_engine import Engine, FunnelConfig, convert
from option_grid import each_value_once

TOLERANCE = 1e-5  # float32; the sums of another bucket have another order
LENGTHS = (1, 2, 7, 13, 16, 31)
SEQUENCES = hf.random_ids(*LENGTHS)
COMPANIONS = hf.random_ids(40, 3, 40, 1, 25, 40, 6, 40, seed=1)
SUBJECTS = {
    "no funnel": (Gemma2Model, hf.gemma2(), "bidirectional", FunnelConfig()),
    "pooled": (Gemma2Model, hf.gemma2(), "bidirectional", FunnelConfig((1, 2), pool="mean")),
    "keep_first": (
        Gemma3TextModel,
        hf.gemma3(),
        "causal",
        FunnelConfig((1, 3), keep_first=True, positions="mid", pool_query_only=True),
    ),
    "keep_last": (Gemma3TextModel, hf.gemma3(), "causal", FunnelConfig((1, 2, 2), keep_last=True, positions="mid")),
    "recovered": (Gemma2Model, hf.gemma2(), "causal", FunnelConfig((1, 2, 2), recovery="max_last")),
    "recovered after the norm": (
        Gemma3TextModel,
        hf.gemma3(use_bidirectional_attention=True),
        "bidirectional",
        FunnelConfig((1, 1, 3), keep_first=True, recovery="sum_mean", recovery_site="after_norm"),
    ),
    "qwen3": (Qwen3Model, hf.qwen3(), "causal", FunnelConfig((1, 2))),
    "mistral": (MistralModel, hf.mistral(), "causal", FunnelConfig()),
}


@pytest.fixture(scope="module", params=SUBJECTS)
def engine(request, tmp_path_factory):
    model_class, config, attention, funnel = SUBJECTS[request.param]
    specimen = hf.Specimen.make(tmp_path_factory.mktemp("model"), hf.build(model_class, config), attention)
    return specimen.engine(funnel=funnel, max_batch_tokens=256)


@pytest.fixture(scope="module")
def alone(engine):
    """The rows and the vector of each sequence, run by itself."""
    rows = [engine.hidden_states([ids])[0] for ids in SEQUENCES]
    vectors = np.concatenate([engine.embed([ids]) for ids in SEQUENCES])
    return rows, vectors


def check(rows, vectors, alone):
    assert hf.worst(rows, alone[0]) < TOLERANCE
    assert hf.worst(vectors, alone[1]) < TOLERANCE


def test_in_a_batch(engine, alone):
    check(engine.hidden_states(SEQUENCES), engine.embed(SEQUENCES), alone)


def test_in_another_order(engine, alone):
    order = np.random.default_rng(0).permutation(len(SEQUENCES))
    shuffled = [SEQUENCES[index] for index in order]
    rows, vectors = engine.hidden_states(shuffled), engine.embed(shuffled)
    back = np.argsort(order)
    check([rows[index] for index in back], vectors[back], alone)


def test_among_others_in_a_larger_bucket(engine, alone):
    mixed = [ids for pair in zip(COMPANIONS, SEQUENCES, strict=False) for ids in pair]
    check(engine.hidden_states(mixed)[1::2], engine.embed(mixed)[1::2], alone)


def test_split_over_several_batches(engine, alone):
    """More than one bucket holds: the call is cut into batches, and the results come back in input order."""
    repeats = 1 + engine.programs[0].buckets[-1] // sum(LENGTHS)
    before = engine.stats()["batches"]
    rows, vectors = engine.hidden_states(SEQUENCES * repeats), engine.embed(SEQUENCES * repeats)
    assert engine.stats()["batches"] - before > 2
    for start in range(0, len(rows), len(SEQUENCES)):
        part = slice(start, start + len(SEQUENCES))
        check(rows[part], vectors[part], alone)


# A model whose products are the C++ kernels', with rows that cross blocks of keys.
WIDE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64, "sliding_window": 64}
FUNNELS = {
    "no funnel": FunnelConfig(),
    "pooled": FunnelConfig.after(2, pool="mean"),
    "keep_first": FunnelConfig((1, 3), keep_first=True, pool_query_only=True),
    "keep_last": FunnelConfig((1, 2, 2), keep_last=True),
    "recovered": FunnelConfig.after(2, recovery="mean_last"),
}
BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (3e-3, 0.2)}  # of vectors, and of rows, whose numbers go up to 5


@pytest.fixture(scope="module", params=BOUNDS)
def wide(request, tmp_path_factory):
    """A checkpoint, and its dtype."""
    folder = tmp_path_factory.mktemp("wide")
    hf.build(Gemma3TextModel, hf.gemma3(**WIDE, use_bidirectional_attention=True)).save_pretrained(folder / "source")
    convert(folder / "source", folder / "checkpoint", dtype=request.param)
    return folder / "checkpoint", request.param


def same_bits(backend, dtype):
    """Whether our own kernels make every product here, and oneDNN none with Intel's AMX, which we could not try."""
    amx = dtype == "bfloat16" and funnel_native.handlers().instruction_set() == "amx"
    return backend == "auto" and not amx


@each_value_once(["wide"], wide=BOUNDS, served=[*((funnel, "auto") for funnel in FUNNELS), ("no funnel", "xla")])
def test_every_bit_with_the_kernels_for_cpus_and_within_bounds_on_xla(wide, served):
    (checkpoint, dtype), (funnel, backend) = wide, served
    engine = Engine.load(checkpoint, funnel=FUNNELS[funnel], backend=backend, max_batch_tokens=1024)
    sequences, others = hf.random_ids(7, 100, 300), hf.random_ids(350, 31, 77, 5, seed=1)
    mixed = [*others, *sequences]
    together = engine.embed(mixed)[4:], engine.hidden_states(mixed)[4:]
    alone = [engine.embed([ids])[0] for ids in sequences], [engine.hidden_states([ids])[0] for ids in sequences]
    for ours, expected, bound in zip(together, alone, BOUNDS[dtype], strict=True):
        assert hf.worst(ours, expected) <= (0 if same_bits(backend, dtype) else bound)
