"""`funnel_benchmarks.peers`: peers in processes of their own, what they need, and how they are fed."""

import os
import sys
import textwrap
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import funnel_native
from funnel_benchmarks.peers import llama_cpp_peer, onnx_runtime_peer, openvino_peer, sentence_transformers_peer
from funnel_benchmarks.peers.batches import embedding, in_order, make_batches, padded
from funnel_benchmarks.peers.peer import LIMITS, VARIABLES, Peer
from funnel_benchmarks.peers.peer_process import not_installed
from funnel_benchmarks.results import LeftOut
from funnel_engine import FunnelError

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

        def call(batch):
            print("not an answer")
            calls.append(str(batch))
            open(task["log"], "w").write("".join(calls))
            if len(calls) == task["fails_at"]:
                raise ValueError("the last words")
            time.sleep(0.01)
            return np.array([[len(calls), sequence, task["number"]] for sequence in task["batches"][batch]])

        return call, {"version": "1.2"}
"""
BATCHES = [[2, 0], [1]]


def test_a_peer_computes_only_when_it_is_asked_to(module, tmp_path):
    log = tmp_path / "log"
    with Peer(module(COUNTING), log=str(log), number=7, fails_at=0, batches=BATCHES) as peer:
        assert peer.facts == {"version": "1.2"}
        assert peer.result.tolist() == [[3, 2, 7], [3, 0, 7], [4, 1, 7]]
        assert log.read_text() == "0101"  # each batch twice
        assert all(peer.sample() >= 0.02 for _ in range(2))
        assert log.read_text() == "01010101"
        assert peer.sample(1) >= 0.01
        assert log.read_text()[8:] == "1"
    assert peer.process.returncode is not None


ECHO = """
    import os
    import numpy

    def make(task):
        return lambda batch: numpy.zeros((1, 1)), {name: os.environ.get(name) for name in task["names"]}
"""


@pytest.mark.parametrize(("limit", "values"), [*LIMITS.items(), ("amx", ()), ("", ())])
def test_a_peer_is_limited_as_the_engine_is(module, monkeypatch, limit, values):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(funnel_native, "INSTRUCTION_SETS", (*LIMITS, "amx"))
    monkeypatch.setenv("FUNNEL_CPU_ISA", limit)
    with Peer(module(ECHO), names=VARIABLES, batches=[[0]]) as peer:
        assert tuple(value for value in peer.facts.values() if value) == values
    assert not set(VARIABLES) & set(os.environ)


def test_every_limit_of_the_engine_is_known():
    assert set(funnel_native.INSTRUCTION_SETS) - {"amx"} <= set(LIMITS)


def test_a_task_may_be_longer_than_a_command(module):
    source = "import numpy\ndef make(task): return lambda batch: numpy.array([len(task['ids'])]), {}"
    with Peer(module(source), ids=[262143] * 100_000, batches=[[0]]) as peer:
        assert peer.result == [100_000]


def test_a_peer_that_fails_later_is_an_error_with_its_last_words(module, tmp_path):
    with Peer(module(COUNTING), log=str(tmp_path / "log"), number=7, fails_at=4, batches=[[0]]) as peer:
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
    with pytest.raises(LeftOut, match=r"^no_such_package is not installed: pip install 'funnel-engine\[peers\]'$"):
        Peer(module("def make(task): import no_such_package")).__enter__()


@pytest.mark.parametrize("source", ["import time; time.sleep(60)", COUNTING])
def test_a_peer_is_ended_when_time_is_up(module, tmp_path, source):
    """While it is made, and between two samples."""
    task = {"log": str(tmp_path / "log"), "number": 1, "fails_at": 0, "batches": [[0]]}
    until = time.monotonic() + 3

    def sample_forever():
        with Peer(module(source), until=until, **task) as peer:
            while True:
                peer.sample()

    with pytest.raises(LeftOut, match="out of time while it was compiling or running"):
        sample_forever()
    assert until <= time.monotonic() < until + 30


def test_a_peer_ends_with_its_block_whatever_happens(module, tmp_path):
    with (
        pytest.raises(KeyError),
        Peer(module(COUNTING), log=str(tmp_path / "log"), number=1, fails_at=0, batches=[[0]]) as peer,
    ):
        raise KeyError
    assert peer.process.returncode is not None


@pytest.mark.parametrize(
    ("module", "package", "command"),
    [
        (sentence_transformers_peer, "sentence_transformers", "pip install 'funnel-engine[peers]'"),
        (onnx_runtime_peer, "onnxruntime", "pip install 'funnel-engine[peers]'"),
        (onnx_runtime_peer, "onnxscript", "pip install 'funnel-engine[peers]'"),
        (openvino_peer, "openvino", "pip install 'funnel-engine[peers]'"),
        (openvino_peer, "nncf", "pip install 'funnel-engine[peers]'"),
        (llama_cpp_peer, "llama_cpp", "pip install llama-cpp-python, which compiles llama.cpp"),
    ],
)
def test_a_peer_says_at_once_what_it_needs(module, package, command, monkeypatch):
    for present in {"onnxruntime", "onnxscript", "openvino"} - {package}:
        monkeypatch.setitem(sys.modules, present, ModuleType(present))
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "openvino_telemetry", ModuleType("openvino_telemetry"))
    with pytest.raises(ModuleNotFoundError) as error:
        module.make({"checkpoint": "nowhere", "cores": 1, "dtype": "int8", "sequences": [[1]], "batches": [[0]]})
    assert not_installed(error.value.name) == f"{package} is not installed: {command}"


def test_batches():
    assert make_batches(LENGTHS, "unsorted", 9) == [[0, 1, 2, 3]]
    assert make_batches(LENGTHS, "sorted", 3) == [[1, 3, 0], [2]]
    assert make_batches(LENGTHS, "unsorted", 3) == [[0, 1, 2], [3]]


def test_padding_is_at_the_end_and_in_no_mask():
    ids, mask = padded([[7, 8], [3], [4, 0, 6]])
    assert ids.tolist() == [[7, 8, 0], [3, 0, 0], [4, 0, 6]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert ids.dtype == mask.dtype == np.int64


def test_batches_are_embedded_one_by_one():
    task = {"sequences": [[7, 8], [3], [4, 5, 6]], "batches": BATCHES}
    seen = []

    def run(ids, mask):
        seen.append(ids.shape)
        return np.stack([(ids * mask).sum(1), mask.sum(1)], axis=1).astype(np.float32)

    call = embedding(task, run)
    rows = np.concatenate([call(batch) for batch in (0, 1)])
    assert rows.tolist() == [[15, 3], [15, 2], [3, 1]]
    assert in_order(BATCHES, rows).tolist() == [[15, 2], [3, 1], [15, 3]]
    assert seen == [(2, 3), (1, 1)]


def test_nncf_calibrates_on_random_ids_of_the_measured_lengths(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 50}')
    lengths = (3, 7, 300)
    task = {"checkpoint": str(tmp_path), "sequences": [[1] * length for length in lengths]}
    drawn = openvino_peer.calibration(task)
    assert len(drawn) == openvino_peer.CALIBRATION_SEQUENCES
    assert {len(ids) for ids in drawn} == {3, 7, openvino_peer.CALIBRATION_TOKENS}
    assert {number for ids in drawn for number in ids} == set(range(50))
    assert drawn == openvino_peer.calibration(task)


@pytest.mark.parametrize(("saturates", "fix"), [(True, "ENABLE"), (False, "DISABLE")])
def test_nncf_leaves_room_for_sums_where_products_saturate(saturates, fix):
    given = {}

    def quantize(model, dataset, **options):
        given.update(options)
        return [model, *dataset]

    nncf = SimpleNamespace(
        quantize=quantize,
        Dataset=list,
        ModelType=SimpleNamespace(TRANSFORMER="transformer"),
        OverflowFix=SimpleNamespace(ENABLE="ENABLE", DISABLE="DISABLE"),
        AdvancedQuantizationParameters=dict,
    )
    model, first, second = openvino_peer.quantized(nncf, "model", [[4, 2], [7]], saturates=saturates)
    assert (model, first["ids"].tolist(), first["mask"].tolist()) == ("model", [[4, 2]], [[1, 1]])
    assert second["ids"].tolist() == [[7]]
    assert given["advanced_parameters"] == {"overflow_fix": fix}
    assert (given["model_type"], given["subset_size"]) == ("transformer", 2)


def test_llama_cpp_gets_sequences_end_to_end():
    def init(tokens, embeddings, sequences):
        """The arrays of a `llama_batch`, as long as was asked for."""
        assert (embeddings, sequences) == (0, 1)
        names = ("token", "pos", "n_seq_id", "logits")
        return SimpleNamespace(seq_id=[[None] for _ in range(tokens)], **{name: [None] * tokens for name in names})

    batch = llama_cpp_peer.make_batch(SimpleNamespace(llama_batch_init=init), [[7, 8], [3], [4, 5, 6]])
    assert batch.n_tokens == 6
    assert batch.token == [7, 8, 3, 4, 5, 6]
    assert batch.pos == [0, 1, 0, 0, 1, 2]
    assert batch.seq_id == [[0], [0], [1], [2], [2], [2]]
    assert batch.n_seq_id == batch.logits == [1] * 6
