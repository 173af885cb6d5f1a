"""llama.cpp as a peer, on the CPU: one call of its C API for each batch, mean pooling.

Tokens lie end to end there too: a batch is not padded.
"""

import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from funnel_benchmarks.peers.gguf_file import write_gguf
from funnel_kernels.errors import InputError


def make(task: dict[str, Any]) -> tuple[Callable[[int], np.ndarray], dict[str, Any]]:
    """The call that embeds one of the task's batches, [count, D] float32; see the package about the task.

    Raises:
        ConfigError: llama.cpp has no such encoder.
        InputError: llama.cpp refuses the model, or the size of a batch.
    """
    library: Any = importlib.import_module("llama_cpp")
    os.environ["GGML_NO_BACKTRACE"] = "1"  # so that its last words are what went wrong
    library.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:  # a mapped file stays after its name
        file = Path(folder) / "model.gguf"
        write_gguf(Path(task["checkpoint"]), file, task["dtype"])
        model = library.llama_model_load_from_file(bytes(file), library.llama_model_default_params())
    if not model:
        raise InputError(f"llama.cpp cannot load the GGUF file of {task['checkpoint']}; it says why above")
    sequences = task["sequences"]
    batches = [(numbers, make_batch(library, [sequences[number] for number in numbers])) for numbers in task["batches"]]
    context = make_context(library, model, batches, task["cores"])
    width, memory = library.llama_model_n_embd(model), library.llama_get_memory(context)

    def embed(part: int) -> np.ndarray:
        numbers, batch = batches[part]
        if memory:  # "gemma" keeps keys and values, as a decoder does
            library.llama_memory_clear(memory, False)
        if status := library.llama_decode(context, batch):
            raise InputError(f"llama.cpp answers a batch of {batch.n_tokens} tokens with status {status}")
        rows = [library.llama_get_embeddings_seq(context, place) for place in range(len(numbers))]
        return np.stack([np.ctypeslib.as_array(row, (width,)) for row in rows])  # copies: the next call reuses them

    version = library.__version__
    return embed, {"llama-cpp-python": version, "dtype": task["dtype"], "threads": task["cores"]}


def make_batch(library: Any, sequences: list[list[int]]) -> Any:
    """A `llama_batch`: the sequences end to end, every token with its place, its sequence, and a row of output."""
    tokens = [(token, place, row) for row, ids in enumerate(sequences) for place, token in enumerate(ids)]
    batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, (token, place, row) in enumerate(tokens):
        batch.token[index], batch.pos[index] = token, place
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
        batch.logits[index] = 1
    return batch


def make_context(library: Any, model: Any, batches: list[tuple[list[int], Any]], cores: int) -> Any:
    """A `llama_context` for the largest of the batches; without causality a batch is computed in one piece."""
    tokens, sequences = max(batch.n_tokens for _, batch in batches), max(len(numbers) for numbers, _ in batches)
    options = library.llama_context_default_params()
    # A multiple of the sequences: otherwise llama.cpp plans pooling for more rows than it plans outputs, and aborts.
    options.n_ctx = options.n_batch = options.n_ubatch = -(-tokens // sequences) * sequences
    options.n_seq_max = sequences
    options.n_threads = options.n_threads_batch = cores
    options.embeddings, options.pooling_type = True, library.LLAMA_POOLING_TYPE_MEAN
    options.kv_unified = True  # all sequences of a batch share the context's tokens
    context = library.llama_init_from_model(model, options)
    if not context:
        raise InputError(
            f"llama.cpp cannot make a context for {sequences} sequences of {tokens} tokens in one batch; it says why "
            "above. Make the batches smaller"
        )
    return context
