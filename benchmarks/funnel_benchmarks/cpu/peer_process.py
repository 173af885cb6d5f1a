"""The other process of a `Peer`: `python -m funnel_benchmarks.cpu.peer_process MODULE TASK RESULT`.

MODULE has `make(task) -> (call, to_array, facts)`; TASK is JSON. `call` runs twice, which compiles it, and `to_array`
of what it returned is saved as RESULT. The first line of the output is then `facts` as JSON, or `left_out`, what is not
installed. Every line of the input asks for one more call, and is answered with its seconds.

This file imports nothing that computes: what runs here is the peer alone.
"""

import importlib
import json
import os
import sys
import time

import numpy as np


def main() -> None:
    module, task, result_file = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        call, to_array, facts = importlib.import_module(module).make(json.loads(task))
    except ModuleNotFoundError as error:
        print(json.dumps({"left_out": f"{error.name} is not installed"}), file=answers)
        return
    call()
    np.save(result_file, to_array(call()))
    print(json.dumps(facts), file=answers)
    for _ in sys.stdin:
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start, file=answers)


if __name__ == "__main__":
    main()
