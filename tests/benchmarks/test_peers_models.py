"""`funnel_benchmarks.peers`: what PyTorch computes of the same weights, with each library's own code.

ONNX Runtime and OpenVINO compute the graph of `torch_graph`; they are no part of what the tests need.
"""

import sys

import numpy as np
import pytest
import torch

from funnel_benchmarks.cpu.bench import check_same
from funnel_benchmarks.cpu.sizes import SMALL
from funnel_benchmarks.peers import hugging_face, sentence_transformers_peer, torch_graph
from funnel_benchmarks.peers.batches import make_batches, padded
from funnel_benchmarks.peers.checkpoint import write_random_model
from funnel_benchmarks.peers.peer import Peer
from funnel_benchmarks.peers.sentence_model import text_of, write_sentence_model
from funnel_benchmarks.results import LeftOut
from funnel_engine import Engine, FunnelError, convert

# EmbeddingGemma sees 4 tokens to each side, but for one layer, so that these lengths meet the window's edge.
MODELS = {
    "gemma": SMALL.models["gemma-2b x 4"],
    "embeddinggemma": SMALL.models["embeddinggemma-300m"]
    | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}
LENGTHS = np.array([5, 17, 2, 9], np.int32)
NEAR = 5  # tokens that all see each other


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """The folder of a tiny model as Hugging Face reads it, and that of ours."""
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder / "source", MODELS[request.param])
    convert(folder / "source", folder / "converted")
    return folder / "source", folder


@pytest.fixture(scope="module")
def engine(model):
    _, folder = model
    return load(folder)


def load(folder, **options):
    return Engine.load(folder / "converted", max_batch_tokens=64, backend="xla", **options)


def random_sequences(lengths):
    generator = np.random.default_rng(3)
    return [generator.integers(0, 128, length).tolist() for length in lengths]


def make_task(source, lengths, order, attention="sdpa"):
    """What `hugging_face.make` takes, and the random sequences that it embeds."""
    sequences = random_sequences(lengths)
    task = {"checkpoint": str(source), "mode": "eager", "attention": attention, "cores": 1}
    return task | {"batches": make_batches(lengths, order, 3), "sequences": sequences}, sequences


@pytest.mark.parametrize(
    ("lengths", "order", "attention"),
    [
        (LENGTHS, "sorted", "sdpa"),
        (LENGTHS, "unsorted", "sdpa"),
        (np.full(3, 12), "equal", "sdpa"),
        (np.full(7, NEAR), "equal", hugging_face.WITHOUT_MASK),
    ],
)
def test_hugging_face_computes_what_the_engine_does(model, engine, lengths, order, attention):
    source, _ = model
    task, sequences = make_task(source, lengths, order, attention)
    call, to_array, facts = hugging_face.make(task)
    assert set(facts) == {"torch", "transformers", "dtype", "threads"}
    assert check_same(engine.embed(sequences, normalize=False), to_array(call()), 0.02) > 0


def test_another_attention_is_seen(model):
    source, folder = model
    task, sequences = make_task(source, LENGTHS, "sorted")
    call, to_array, _ = hugging_face.make(task)
    causal = load(folder, attention="causal")
    with pytest.raises(FunnelError, match="computes something else"):
        check_same(causal.embed(sequences, normalize=False), to_array(call()), 0.05)


def test_the_graph_computes_what_hugging_face_does(model):
    """At other sizes than those it was exported with: more sequences, the longest one, and a single token."""
    source, _ = model
    graph = torch_graph.export({"checkpoint": str(source), "sequences": random_sequences([3, 40])}).module()
    for lengths in (LENGTHS, np.array([40]), np.array([1])):
        task, sequences = make_task(source, lengths, "equal")
        with torch.no_grad():
            vectors = graph(*map(torch.from_numpy, padded(sequences))).numpy()
        assert vectors.dtype == np.float32
        call, to_array, _ = hugging_face.make(task)
        assert check_same(vectors, to_array(call()), 0.02) > 0


def test_looked_up_angles_are_those_of_the_model(model):
    source, _ = model
    encoder = hugging_face.load_model(str(source), torch.float32, "sdpa")
    tables = torch_graph.angle_tables(torch, encoder, 50)
    x, positions = torch.zeros(1), torch.tensor([[0, 3, 49]])
    for kind in [()] if encoder.config.model_type == "gemma" else [("sliding_attention",), ("full_attention",)]:
        for looked_up, made in zip(tables(x, positions, *kind), encoder.rotary_emb(x, positions, *kind), strict=True):
            torch.testing.assert_close(looked_up, made)


def test_every_row_of_a_mask_sees_something(model):
    """Softmax over nothing would be NaN, also in the rows of padding that no real token is near."""
    source, _ = model
    config = hugging_face.load_model(str(source), torch.float32, "sdpa").config
    real = torch.tensor([[1] * 3 + [0] * 17, [1] * 20])
    masks = torch_graph.attention_masks(torch, config, real)
    masks = masks if isinstance(masks, dict) else {"full_attention": masks}
    full = masks["full_attention"][:, 0]
    assert full[0].sum(1).tolist() == [3] * 3 + [4] * 17  # a row of padding sees itself too
    assert full[1].all()
    if "sliding_attention" in masks:
        near = masks["sliding_attention"][:, 0].sum(2)
        assert near[0].tolist() == [3] * 3 + [4, 4, 3, 2] + [1] * 13
        assert near[1].tolist() == [5, 6, 7, 8] + [9] * 12 + [8, 7, 6, 5]


def test_sentence_transformers_computes_what_the_engine_does(tmp_path):
    write_sentence_model(tmp_path / "source", MODELS["embeddinggemma"])
    convert(tmp_path / "source", tmp_path / "converted")
    engine, sequences = load(tmp_path), random_sequences([*LENGTHS, 30, 1])
    task = {"checkpoint": str(tmp_path / "source"), "sequences": sequences, "cores": 1}
    call, to_array, facts = sentence_transformers_peer.make(task | {"batches": [[0, 1, 2], [3, 4, 5]]})
    assert facts["dtype"] == "bfloat16"
    assert "pooling mean, 2 dense layers" in engine.describe()
    ours = engine.embed(sequences)
    assert check_same(ours, to_array(call()), 0.03) > 0
    np.testing.assert_array_equal(engine.embed([text_of(ids) for ids in sequences]), ours)


def test_the_encoder_of_a_sentence_model_has_the_same_weights(tmp_path):
    fields = MODELS["gemma"] | {"num_hidden_layers": 1}
    write_random_model(tmp_path / "alone", fields)
    write_sentence_model(tmp_path / "sentence", fields)
    alone, sentence = (
        hugging_face.load_model(str(tmp_path / name), torch.bfloat16, "sdpa").state_dict()
        for name in ("alone", "sentence")
    )
    assert alone.keys() == sentence.keys()
    assert all(torch.equal(alone[name], sentence[name]) for name in alone)


def test_a_sentence_model_needs_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(LeftOut, match=r"^sentence_transformers is not installed: pip install"):
        write_sentence_model(tmp_path / "source", MODELS["gemma"])
    assert not (tmp_path / "source").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compiled", "frozen"])
def test_compiled_models_are_the_same(mode, tmp_path):
    write_random_model(tmp_path / "source", MODELS["gemma"] | {"num_hidden_layers": 1})
    lengths = np.array([7, 4, 5])
    task, _ = make_task(tmp_path / "source", lengths, "sorted")
    call, to_array, _ = hugging_face.make(task)
    with Peer(hugging_face, **task | {"mode": mode}) as compiled:
        assert check_same(compiled.result, to_array(call()), 0.02) > 0  # rounded in other places
