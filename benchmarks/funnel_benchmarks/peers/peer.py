"""A peer in a process of its own, seen from ours: it sleeps until a sample is asked for."""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from funnel_benchmarks.machine import kernel_limit
from funnel_benchmarks.peers import peer_process
from funnel_benchmarks.results import LeftOut
from funnel_kernels.errors import FunnelError

# FUNNEL_CPU_ISA, below the greatest, -> the same limit for PyTorch's own kernels, for oneDNN, which OpenVINO has too,
# for OpenVINO's own kernels (in versions after 2026.4), and for MKL (on Intel's processors).
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OV_CPU_MAX_ISA", "MKL_ENABLE_INSTRUCTIONS")
LIMITS = {
    "avx2": ("avx2", "AVX2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512_CORE", "AVX512"),
    "avx512_vnni": ("avx512", "AVX512_CORE_VNNI", "AVX512_CORE_VNNI", "AVX512_E1"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512_CORE_BF16", "AVX512_E3"),
}


def limits() -> dict[str, str]:
    """The variables that limit a peer as FUNNEL_CPU_ISA limits the engine."""
    values = LIMITS.get(kernel_limit() or "")
    return dict(zip(VARIABLES, values, strict=True)) if values else {}


class Peer:
    """Runs `module.make(task)` in another process (see `peer_process`), from `with` to the end of its block.

    Attributes:
        facts: what the module says about itself, e.g. versions.
        result: the rows of all batches, one after another, [B, D].
    """

    def __init__(self, module: ModuleType, *, until: float = math.inf, **task: Any):
        """
        Args:
            until: when the process is ended, as `time.monotonic` counts.
            task: plain JSON with `batches`, which means what the module says.
        """
        self.module, self.until, self.task = module.__name__, until, task

    def __enter__(self) -> "Peer":
        """Waits until the peer has compiled and run.

        Raises:
            LeftOut: something that it needs is not installed, or time is up.
            FunnelError: it failed.
        """
        self.errors = tempfile.TemporaryFile()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.npy"
            command = [sys.executable, "-m", peer_process.__name__, self.module, str(file)]
            pipe, environment = subprocess.PIPE, os.environ | limits()
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment
            )
            self.timer = threading.Timer(min(self.until - time.monotonic(), threading.TIMEOUT_MAX), self.process.kill)
            self.timer.daemon = True
            self.timer.start()
            try:
                self.ask(json.dumps(self.task))
                self.facts: dict[str, Any] = json.loads(self.answer())
                if "left_out" in self.facts:
                    raise LeftOut(self.facts["left_out"])
                self.result = np.load(file)
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def sample(self, batch: int | None = None) -> float:
        """Seconds of one batch, by default of all, one after another. Raises `FunnelError` if the peer failed."""
        self.ask(json.dumps([batch] if batch is not None else list(range(len(self.task["batches"])))))
        return float(self.answer())

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which there is an answer to
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            if time.monotonic() >= self.until:
                raise LeftOut("not measured: out of time while it was compiling or running")
            self.errors.seek(0)
            words = self.errors.read().decode(errors="replace").strip()
            raise FunnelError(f"the peer {self.module} failed: {words[-400:]}")
        return line

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self.timer.cancel()
        self.process.kill()
        self.process.communicate()
        self.errors.close()
