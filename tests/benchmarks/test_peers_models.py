"""`funnel_benchmarks.peers`: what PyTorch computes of the same weights, with each library's own code.

ONNX Runtime and OpenVINO compute the graph of `exported_graph`; they are no part of what the tests need.
"""

import sys

import numpy as np
import pytest
import torch

from funnel_benchmarks.peers import engine_peer, exported_graph, hugging_face, sentence_transformers_peer
from funnel_benchmarks.peers.batches import in_order, make_batches, padded
from funnel_benchmarks.peers.peer import Peer
from funnel_benchmarks.peers.sentence_model import text_of, write_sentence_model
from funnel_benchmarks.peers.suite import check_same, difference
from funnel_benchmarks.random_checkpoint import write_random_model
from funnel_benchmarks.results import LeftOut
from funnel_engine import Engine, FunnelError, convert
from tiny_peers import MODELS

LENGTHS = np.array([5, 17, 2, 9], np.int32)
NEAR = 5  # tokens that all see each other, unless the model is causal
CAUSAL = ("qwen3", "mistral")


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


def make_task(source, lengths, order):
    """What `hugging_face.make` takes, and the random sequences that it embeds."""
    sequences = random_sequences(lengths)
    batches = make_batches(np.asarray(lengths), order, 3)
    task = {"checkpoint": str(source), "mode": "eager", "cores": 1, "batches": batches, "sequences": sequences}
    task |= {"dtype": "bfloat16", "device": "cpu"}
    return task, sequences


def embedded(module, task):
    """All vectors of a peer, in the order of the sequences, and its facts."""
    call, facts = module.make(task)
    rows = np.concatenate([call(batch) for batch in range(len(task["batches"]))])
    assert rows.dtype == np.float32
    return in_order(task["batches"], rows), facts


@pytest.mark.parametrize(
    ("lengths", "order", "without_mask"),
    [
        (LENGTHS, "sorted", ()),
        (LENGTHS, "unsorted", ()),
        ([12] * 3, "sorted", ("gemma", "eurobert")),
        ([NEAR] * 7, "sorted", MODELS.keys() - CAUSAL),
    ],
)
def test_hugging_face_computes_what_the_engine_does(request, model, engine, lengths, order, without_mask):
    source, _ = model
    task, sequences = make_task(source, lengths, order)
    theirs, facts = embedded(hugging_face, task)
    assert set(facts) == {"torch", "transformers", "dtype", "attention", "threads"}
    masked = request.node.callspec.params["model"] not in without_mask
    assert facts["attention"] == ("sdpa" if masked else hugging_face.WITHOUT_MASK)
    # The vectors of EmbeddingGemma 2 are rounded once more, after the projection.
    limit = 0.03 if request.node.callspec.params["model"] == "embeddinggemma2" else 0.02
    assert 0 < difference(engine.embed(sequences, normalize=False), theirs) < limit


def test_hugging_face_computes_in_the_dtype_that_it_is_told(model):
    """Float32 is nearer to the same weights in float64 by more than a hundred times."""
    source, _ = model
    task, _ = make_task(source, LENGTHS, "sorted")
    half, single = (embedded(hugging_face, task | {"dtype": dtype}) for dtype in ("bfloat16", "float32"))
    assert [facts["dtype"] for _, facts in (half, single)] == ["bfloat16", "float32"]
    assert 1e-3 < difference(half[0], single[0]) < 0.03


def test_another_attention_is_seen(model):
    source, folder = model
    task, sequences = make_task(source, LENGTHS, "sorted")
    theirs, _ = embedded(hugging_face, task)
    own = load(folder).config.attention
    other = load(folder, attention={"causal": "bidirectional", "bidirectional": "causal"}[own])
    with pytest.raises(FunnelError, match=r"by [01]\.\d+ .* limit of 0\.05 for bfloat16: it computes something else"):
        check_same("the engine's", "bfloat16", other.embed(sequences, normalize=False), theirs)


def test_the_graph_computes_what_hugging_face_does(model):
    """At other sizes than those it was exported with: more sequences, the longest one, and a single token."""
    source, _ = model
    graph = exported_graph.export({"checkpoint": str(source), "sequences": random_sequences([3, 40])}).module()
    for lengths in (LENGTHS, np.array([40]), np.array([1])):
        task, sequences = make_task(source, lengths, "unsorted")
        with torch.no_grad():
            vectors = graph(*map(torch.from_numpy, padded(sequences))).numpy()
        assert vectors.dtype == np.float32
        theirs, _ = embedded(hugging_face, task)
        assert 0 < difference(vectors, theirs) < 0.02


def test_looked_up_angles_are_those_of_the_model(model):
    source, _ = model
    encoder = hugging_face.load_model(str(source), torch.float32, "sdpa")
    tables = exported_graph.angle_tables(torch, encoder, 50)
    x, positions = torch.zeros(1), torch.tensor([[0, 3, 49]])
    by_kind = encoder.config.model_type in ("gemma3_text", "embedding_gemma2_text")
    for kind in [("sliding_attention",), ("full_attention",)] if by_kind else [()]:
        for looked_up, made in zip(tables(x, positions, *kind), encoder.rotary_emb(x, positions, *kind), strict=True):
            torch.testing.assert_close(looked_up, made)


@pytest.mark.parametrize("model", [name for name in MODELS if name not in CAUSAL], indirect=True)
def test_every_row_of_a_mask_sees_something(model):
    """Softmax over nothing would be NaN, also in the rows of padding that no real token is near."""
    source, _ = model
    config = hugging_face.load_model(str(source), torch.float32, "sdpa").config
    real = torch.tensor([[1] * 3 + [0] * 17, [1] * 20])
    masks = exported_graph.attention_masks(torch, config, real)
    masks = masks if isinstance(masks, dict) else {"full_attention": masks}
    full = masks["full_attention"][:, 0]
    assert full[0].sum(1).tolist() == [3] * 3 + [4] * 17  # a row of padding sees itself too
    assert full[1].all()
    if "sliding_attention" in masks:
        near = masks["sliding_attention"][:, 0].sum(2)
        assert near[0].tolist() == [3] * 3 + [4, 4, 3, 2] + [1] * 13
        assert near[1].tolist() == [5, 6, 7, 8] + [9] * 12 + [8, 7, 6, 5]


@pytest.mark.parametrize("model", CAUSAL, indirect=True)
def test_a_causal_mask_sees_what_is_before(model):
    source, _ = model
    config = hugging_face.load_model(str(source), torch.float32, "sdpa").config
    masks = exported_graph.attention_masks(torch, config, torch.tensor([[1] * 3 + [0] * 5, [1] * 8]))
    mask = (masks["full_attention"] if isinstance(masks, dict) else masks)[:, 0]
    first, second = mask.sum(2).tolist()
    if config.model_type == "mistral":  # padding sees the real tokens that are near, and itself
        assert (first, second) == ([1, 2, 3, 4, 4, 3, 2, 1], [1, 2, 3, 4, 5, 5, 5, 5])
    else:
        assert (first, second) == ([1, 2, 3, 4, 4, 4, 4, 4], [1, 2, 3, 4, 5, 6, 7, 8])
    assert not mask.triu(1).any()


def test_the_engine_is_a_peer_too(model, engine):
    source, _ = model
    task, sequences = make_task(source, LENGTHS, "sorted")
    theirs, facts = embedded(engine_peer, task)
    assert facts == {"dtype": "bfloat16"}
    assert difference(engine.embed(sequences, normalize=False), theirs) < 0.02


def test_sentence_transformers_computes_what_the_engine_does(tmp_path):
    write_sentence_model(tmp_path / "source", MODELS["embeddinggemma"])
    convert(tmp_path / "source", tmp_path / "converted")
    engine, sequences = load(tmp_path), random_sequences([*LENGTHS, 30, 1])
    task = {"checkpoint": str(tmp_path / "source"), "sequences": sequences, "cores": 1, "dtype": "bfloat16"}
    theirs, facts = embedded(sentence_transformers_peer, task | {"batches": [[5, 1, 2], [3, 4, 0]]})
    assert facts["dtype"] == "bfloat16"
    assert "pooling mean, 2 dense layers" in engine.describe()
    ours = engine.embed(sequences)
    assert 0 < difference(ours, theirs) < 0.03
    np.testing.assert_array_equal(engine.embed([text_of(ids) for ids in sequences]), ours)


def test_a_sentence_model_that_projects_its_rows_has_no_other_dense_layers(tmp_path):
    write_sentence_model(tmp_path / "source", MODELS["embeddinggemma2"])
    convert(tmp_path / "source", tmp_path / "converted")
    engine, sequences = load(tmp_path), random_sequences([5, 17])
    task = {"checkpoint": str(tmp_path / "source"), "sequences": sequences, "cores": 1, "dtype": "bfloat16"}
    theirs, _ = embedded(sentence_transformers_peer, task | {"batches": [[1, 0]]})
    assert (engine.head.pooling, len(engine.head.dense), theirs.shape) == ("mean", 1, (2, 48))
    assert 0 < difference(engine.embed(sequences), theirs) < 0.03


def test_a_sentence_model_that_is_causal_has_the_last_token(tmp_path):
    write_sentence_model(tmp_path / "source", MODELS["qwen3"])
    convert(tmp_path / "source", tmp_path / "converted")
    engine, sequences = load(tmp_path), random_sequences([*LENGTHS, 30, 1])
    task = {"checkpoint": str(tmp_path / "source"), "sequences": sequences, "cores": 1, "dtype": "bfloat16"}
    theirs, _ = embedded(sentence_transformers_peer, task | {"batches": [[5, 1, 2], [3, 4, 0]]})
    assert (engine.head.pooling, engine.head.dense) == ("last", ())
    assert 0 < difference(engine.embed(sequences), theirs) < 0.03


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


def test_attention_without_a_mask_is_full_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, 1, 1))
    out, _ = hugging_face.attention_without_mask(None, q, k, v, None, 0.3, dropout=0.0)
    weights = torch.softmax(0.3 * q @ k.transpose(2, 3), -1)
    torch.testing.assert_close(out, (weights @ v).transpose(1, 2))


@pytest.mark.parametrize(
    ("changes", "name"), [({"device": "cuda"}, "PyTorch for CUDA"), ({"mode": "flash"}, "flash_attn")]
)
def test_what_a_gpu_s_peer_needs_is_named(model, changes, name):
    task, _ = make_task(model[0], LENGTHS, "sorted")
    with pytest.raises(ModuleNotFoundError) as error:
        hugging_face.make(task | changes)
    assert error.value.name == name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compiled", pytest.param("frozen", marks=pytest.mark.grid)])
def test_compiled_models_are_the_same(mode, tmp_path):
    write_random_model(tmp_path / "source", MODELS["gemma"] | {"num_hidden_layers": 1})
    task, _ = make_task(tmp_path / "source", [7, 4, 5], "sorted")
    call, _ = hugging_face.make(task)
    with Peer(hugging_face, **task | {"mode": mode}) as compiled:
        assert 0 < difference(compiled.result, call(0)) < 0.02  # rounded in other places


def test_what_differs_in_shape_is_something_else():
    with pytest.raises(FunnelError, match=r"a result is \(2, 3\) where \(2, 4\) is expected"):
        difference(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(FunnelError, match=r"the peer's result differs .* by nan"):
        check_same("the peer's", "float32", np.full((1, 2), np.nan), np.ones((1, 2)))


def test_agreement_is_the_mean_cosine():
    reference = np.array([[3.0, 4.0], [0.0, 2.0]])
    vectors = np.array([[3.0, 4.0], [0.0, 2.0]]) @ np.array([[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]])
    assert check_same("the peer's", "int8", 1.1 * vectors, reference) == pytest.approx(np.cos(0.2))
    with pytest.raises(FunnelError, match=r"the peer's result .* by 0\.232 .* limit of 0\.05 for float32"):
        check_same("the peer's", "float32", 1.1 * vectors, reference)
    assert check_same("the peer's", "float32", 1.1 * vectors, reference, 0.3) == pytest.approx(np.cos(0.2))


def test_many_shapes_are_compiled_together():
    assert hugging_face.shapes([[3, 5], [5, 4], [3], [7]]) == {(2, 5), (1, 3), (1, 7)}
