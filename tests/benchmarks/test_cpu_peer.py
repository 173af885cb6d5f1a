"""`funnel_benchmarks.cpu`: peers in processes of their own, and what they compute."""

import textwrap
from types import ModuleType

import numpy as np
import pytest

from funnel_benchmarks.accelerator.tables import LeftOut
from funnel_benchmarks.cpu import hugging_face, onednn_product, pytorch_product
from funnel_benchmarks.cpu.bench import check_same
from funnel_benchmarks.cpu.checkpoint import write_random_model
from funnel_benchmarks.cpu.peer import Peer
from funnel_benchmarks.cpu.sizes import SMALL
from funnel_engine import Engine, FunnelError, convert

LENGTHS = np.array([5, 17, 2, 9], np.int32)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of this source, which the other process can import."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(source):
        (tmp_path / "some_peer.py").write_text(textwrap.dedent(source))
        return ModuleType("some_peer")

    return make


COUNTING = """
    import time
    import numpy as np

    def make(task):
        calls = []

        def call():
            print("not an answer")
            calls.append(1)
            open(task["log"], "w").write(str(len(calls)))
            if len(calls) == task["fails_at"]:
                raise ValueError("the last words")
            time.sleep(0.01)
            return [len(calls), task["number"]]

        return call, np.array, {"version": "1.2"}
"""


def test_a_peer_computes_only_when_it_is_asked_to(module, tmp_path):
    log = tmp_path / "log"
    with Peer(module(COUNTING), log=str(log), number=7, fails_at=0) as peer:
        assert peer.facts == {"version": "1.2"}
        assert peer.result.tolist() == [2, 7]
        assert log.read_text() == "2"
        assert all(peer.sample() >= 0.01 for _ in range(3))
        assert log.read_text() == "5"
    assert peer.process.returncode is not None


def test_a_peer_that_fails_later_is_an_error_with_its_last_words(module, tmp_path):
    with Peer(module(COUNTING), log=str(tmp_path / "log"), number=7, fails_at=4) as peer:
        peer.sample()
        for _ in range(2):  # and it stays one
            with pytest.raises(FunnelError, match=r"the peer some_peer failed: (?s:.*)ValueError: the last words$"):
                peer.sample()


def test_a_peer_that_cannot_be_made_is_an_error(module):
    peer = Peer(module("def make(task): raise ValueError('too large: %s' % task['size'])"), size=3)
    with pytest.raises(FunnelError, match=r"ValueError: too large: 3$"), peer:
        pass
    assert peer.process.returncode is not None


def test_what_is_not_installed_is_named(module):
    with pytest.raises(LeftOut, match=r"^no_such_package is not installed$"):
        Peer(module("def make(task): import no_such_package")).__enter__()


def test_a_peer_ends_with_its_block_whatever_happens(module, tmp_path):
    with (
        pytest.raises(KeyError),
        Peer(module(COUNTING), log=str(tmp_path / "log"), number=1, fails_at=0) as peer,
    ):
        raise KeyError
    assert peer.process.returncode is not None


@pytest.mark.parametrize("module", [onednn_product, pytorch_product])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_products(module, dtype, tolerance, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    task = {"rows": 7, "in": 33, "out": 19, "dtype": dtype}
    call, to_array, facts = module.make(task)
    x, weight = (np.float64(operand) for operand in onednn_product.operands(task))
    result = to_array(call())
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, x @ weight.T, rtol=tolerance, atol=tolerance * 33)
    assert facts["result"] == (dtype if module is pytorch_product else "float32")


def test_operands_have_the_sizes_and_dtype_that_are_asked_for():
    x, weight = onednn_product.operands({"rows": 3, "in": 5, "out": 7, "dtype": "bfloat16"})
    assert (x.shape, weight.shape) == ((3, 5), (7, 5))
    assert (str(x.dtype), str(weight.dtype)) == ("bfloat16", "bfloat16")
    assert np.float32(x).std() > 0.5


def test_what_onednn_refuses_is_an_error():
    with pytest.raises(RuntimeError, match="oneDNN returned status 2"):
        onednn_product.OneDNN().layout((-1, 4), np.dtype(np.float32))


def test_batches():
    assert hugging_face.make_batches(LENGTHS, "equal", 3) == [[0, 1, 2, 3]]
    assert hugging_face.make_batches(LENGTHS, "sorted", 3) == [[1, 3, 0], [2]]
    assert hugging_face.make_batches(LENGTHS, "unsorted", 3) == [[0, 1, 2], [3]]


@pytest.fixture(scope="module", params=["gemma-2b x 4", "embeddinggemma-300m"])
def model(request, tmp_path_factory):
    """The folder of a tiny model as Hugging Face reads it, and engines with it: bidirectional as it is, and causal."""
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder / "source", SMALL.models[request.param])
    convert(folder / "source", folder / "converted")
    engine, causal = (
        Engine.load(folder / "converted", max_batch_tokens=64, attention=attention) for attention in (None, "causal")
    )
    return folder / "source", engine, causal


def make_task(source, lengths, order, attention="sdpa"):
    """What `hugging_face.make` takes, and the random sequences that it embeds."""
    generator = np.random.default_rng(3)
    sequences = [generator.integers(0, 128, length).tolist() for length in lengths]
    task = {"checkpoint": str(source), "mode": "eager", "attention": attention, "cores": 1}
    return task | {"batches": hugging_face.make_batches(lengths, order, 3), "sequences": sequences}, sequences


@pytest.mark.parametrize(
    ("lengths", "order", "attention"),
    [
        (LENGTHS, "sorted", "sdpa"),
        (LENGTHS, "unsorted", "sdpa"),
        (np.full(3, 12), "equal", "sdpa"),
        (np.full(3, 12), "equal", hugging_face.WITHOUT_MASK),
    ],
)
def test_hugging_face_computes_what_the_engine_does(model, lengths, order, attention, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source, engine, causal = model
    task, sequences = make_task(source, lengths, order, attention)
    call, to_array, facts = hugging_face.make(task)
    assert set(facts) == {"torch", "transformers", "threads"}
    theirs = to_array(call())
    assert check_same(engine.embed(sequences, normalize=False), theirs, 0.01) > 0
    with pytest.raises(FunnelError, match="computes something else"):
        check_same(causal.embed(sequences, normalize=False), theirs, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compiled", "frozen"])
def test_compiled_models_are_the_same(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_random_model(tmp_path / "source", SMALL.models["gemma-2b x 4"] | {"num_hidden_layers": 1})
    lengths = np.array([7, 4, 5])
    task, _ = make_task(tmp_path / "source", lengths, "sorted")
    call, to_array, _ = hugging_face.make(task)
    with Peer(hugging_face, **task | {"mode": mode}) as compiled:
        assert check_same(compiled.result, to_array(call()), 0.02) > 0  # rounded in other places
