"""`funnel_benchmarks.device`: the peer that runs in a process of its own."""

import json
import subprocess
import sys
import time

import pytest

from funnel_benchmarks.device import hugging_face, peer
from funnel_benchmarks.device.bench import Bench
from funnel_benchmarks.device.clock import Clock
from funnel_benchmarks.device.sizes import SMALL
from funnel_benchmarks.results import LeftOut
from funnel_engine import FunnelError


@pytest.fixture
def bench():
    return Bench(SMALL, "xla", 5, Clock(9.0, time.monotonic()))


@pytest.fixture
def one_thread(monkeypatch):
    """PyTorch's threads wait for each other actively, which takes minutes where other tests use the same cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_hugging_face_runs_the_same_sizes(bench, one_thread):
    row = peer.measure(bench, "sdpa_without_mask")
    assert len(row["peer_seconds"]["samples"]) == 2 * SMALL.repeats
    assert len(row["seconds"]["samples"]) == 4 * SMALL.repeats  # before and after
    assert row["peer_tokens_per_second"] == pytest.approx(SMALL.tokens / row["peer_seconds"]["median"])
    assert row["speedup"]["median"] == pytest.approx(row["tokens_per_second"] / row["peer_tokens_per_second"])
    assert set(row["versions"]) == {"torch", "transformers"}


def test_attention_without_a_mask_is_full_attention():
    import torch

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, 1, 1))
    out, _ = hugging_face.attention_without_mask(None, q, k, v, None, 0.3, dropout=0.0)
    weights = torch.softmax(0.3 * q @ k.transpose(2, 3), -1)
    torch.testing.assert_close(out, (weights @ v).transpose(1, 2))


def test_a_mask_hides_no_later_token():
    import torch
    import transformers

    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(0)
    model = hugging_face.make_model(transformers, {"attention": "sdpa", "config": config})
    mask = torch.tensor([[1, 1, 1, 0]])
    with torch.inference_mode():
        first, other = (
            model(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state[0, 0]
            for ids in ([5, 6, 7, 0], [5, 6, 8, 0])
        )
    assert (first - other).abs().max() > 1e-4


def test_what_is_not_installed_is_named(bench):
    with pytest.raises(LeftOut, match="flash_attn is not installed"):
        peer.run_peer(bench, "flash_attention_2", "cpu")


def test_a_gpu_that_pytorch_does_not_see_is_named(bench):
    with pytest.raises(LeftOut, match="PyTorch sees no GPU here"):
        peer.run_peer(bench, "sdpa", "cuda")


def answered(monkeypatch, **fields):
    monkeypatch.setattr(peer.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], **fields))


def test_a_peer_that_fails_is_an_error_with_its_last_words(bench, monkeypatch):
    answered(monkeypatch, returncode=1, stdout="", stderr="Traceback\nout of memory\n")
    with pytest.raises(FunnelError, match=r"the peer failed: Traceback\nout of memory$"):
        peer.run_peer(bench, "sdpa", "cpu")


def test_the_answer_is_the_last_line(bench, monkeypatch):
    answered(monkeypatch, returncode=0, stdout='warning: {\n{"samples": [1.0]}\n', stderr="")
    assert peer.run_peer(bench, "sdpa", "cpu") == {"samples": [1.0]}


def test_a_peer_is_stopped_when_time_is_up(bench, monkeypatch):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    run = subprocess.run
    monkeypatch.setattr(peer.subprocess, "run", lambda command, **options: run(sleep, **options))
    bench.clock = Clock(1 / 60, time.monotonic())
    with pytest.raises(LeftOut, match="out of time while it was compiling or running"):
        peer.run_peer(bench, "sdpa", "cpu")


def test_where_pytorch_does_not_run_the_peer_is_left_out(bench, monkeypatch):
    class TPU:
        platform = "tpu"

    monkeypatch.setattr(peer.jax, "devices", lambda: [TPU])
    with pytest.raises(LeftOut, match="JAX runs on tpu, where this peer does not"):
        peer.measure(bench, "sdpa")


def test_the_peer_is_told_our_architecture(bench, monkeypatch):
    tasks = []

    def run(command, **_):
        tasks.append(json.loads(command[-1]))
        return subprocess.CompletedProcess(command, 0, '{"samples": []}', "")

    monkeypatch.setattr(peer.subprocess, "run", run)
    peer.run_peer(bench, "sdpa", "cpu")
    (task,) = tasks
    assert (task["sequences"], task["tokens"], task["dtype"]) == (8, 32, "bfloat16")
    config = task["config"]
    assert config["num_hidden_layers"] == SMALL.config.num_layers
    assert (config["hidden_size"], config["intermediate_size"], config["head_dim"]) == (64, 128, 16)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 1)
