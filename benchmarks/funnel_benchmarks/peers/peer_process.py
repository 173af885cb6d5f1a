"""The other process of a `Peer`: `python -m funnel_benchmarks.peers.peer_process MODULE RESULT`.

MODULE has `make(task) -> (call, to_array, facts)`; the first line of the input is the task as JSON. `call` runs twice,
which compiles it, and `to_array` of what it returned is saved as RESULT. The first line of the output is then `facts`
as JSON, or `left_out`, what is not installed. Every further line of the input asks for one more call, and is answered
with its seconds.

This file imports nothing that computes: what runs here is the peer alone.
"""

import importlib
import json
import os
import sys
import time

import numpy as np

# What the extra does not bring, because it is not there as a wheel.
COMMANDS = {"llama_cpp": "pip install llama-cpp-python, which compiles llama.cpp"}


def main() -> None:
    module, result_file = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        call, to_array, facts = importlib.import_module(module).make(json.loads(sys.stdin.readline()))
    except ModuleNotFoundError as error:
        print(json.dumps({"left_out": not_installed(error)}), file=answers)
        return
    call()
    np.save(result_file, to_array(call()))
    print(json.dumps(facts), file=answers)
    for _ in sys.stdin:
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start, file=answers)


def not_installed(error: ModuleNotFoundError) -> str:
    """What is missing, and the command that brings it, in one line."""
    command = COMMANDS.get(error.name or "", "pip install 'funnel-engine[peers]'")
    return f"{error.name} is not installed: {command}"


if __name__ == "__main__":
    main()
