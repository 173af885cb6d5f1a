"""The other process of a `Peer`: `python -m funnel_benchmarks.peers.peer_process MODULE RESULT`.

MODULE has `make(task) -> (call, facts)`; the first line of the input is the task as JSON. `call(i)` computes the rows
[count, D] of batch `i` of `task["batches"]`. Each batch runs twice, which compiles it, and the rows of all, batch after
batch, are saved as RESULT. The first line of the output is then `facts` as JSON, or `left_out`, what is not installed.
Every further line of the input is a JSON list of batches to compute, and is answered with the seconds that they took.

This file imports nothing that computes: what runs here is the peer alone.
"""

import importlib
import json
import os
import sys
import time

import numpy as np

PEERS = "pip install 'funnel-engine[peers]'"
# What the extra does not bring, because it is not there as a wheel.
COMMANDS = {
    "llama_cpp": "pip install llama-cpp-python, which compiles llama.cpp",
    "flash_attn": "pip install flash-attn, which compiles its kernels",
    "PyTorch for CUDA": "see pytorch.org for the wheel of this driver",
}


def main() -> None:
    module, result_file = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    task = json.loads(sys.stdin.readline())
    try:
        call, facts = importlib.import_module(module).make(task)
    except ModuleNotFoundError as error:
        print(json.dumps({"left_out": not_installed(error.name or "")}), file=answers)
        return
    for part in range(len(task["batches"])):
        call(part)
    np.save(result_file, np.concatenate([call(part) for part in range(len(task["batches"]))]))
    print(json.dumps(facts), file=answers)
    for line in sys.stdin:
        parts = json.loads(line)
        start = time.perf_counter()
        for part in parts:
            call(part)
        print(time.perf_counter() - start, file=answers)


def not_installed(package: str) -> str:
    """What is missing, and the command that brings it, in one line."""
    return f"{package} is not installed: {COMMANDS.get(package, PEERS)}"


if __name__ == "__main__":
    main()
