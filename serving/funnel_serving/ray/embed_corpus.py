"""Embeds a corpus on the workers of a Ray cluster, so that every row is written exactly once.

The corpus is divided into chunks, always in the same way. A worker writes a chunk to a file under a temporary name, and
then renames it, so a file with its final name is complete. A worker, a node or this process can be killed at any time:
what is missing is computed again, by another worker or by the next run. A chunk that was computed twice has one file.
"""

import dataclasses
import importlib.metadata
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray

from funnel_engine.output_files import write_text
from funnel_kernels.errors import BackendUnavailable, ConfigError
from funnel_serving.engines import fingerprint
from funnel_serving.ray.chunk_writer import ChunkWriter, part_name
from funnel_serving.ray.corpus import Chunk, Columns, Corpus, scan
from funnel_training.run_folder import RunFolder

COMPLETE = "complete.json"  # is there when every part is
LOSSES = 3  # how many times each worker may be lost before the next chunk is finished


@dataclasses.dataclass(frozen=True)
class Job:
    """What is embedded, and how. The same job continues what an earlier run left; another one is refused.

    Attributes:
        corpus: a file, or a folder of files, that every worker sees at the same place.
        checkpoint: a folder that `convert` wrote; the same.
        output: the folder of the results; the same. It is made if it does not exist.
        columns: the names of the columns of the corpus.
        rows_per_chunk: rows of an output file.
        options: those of `EmbedBatches` that change a vector.
    """

    corpus: Path
    checkpoint: Path
    output: Path
    columns: Columns
    rows_per_chunk: int
    options: dict[str, Any]

    def facts(self, corpus: Corpus) -> dict[str, Any]:
        """All that the results depend on."""
        return {
            "engine": importlib.metadata.version("funnel-engine"),
            "checkpoint": fingerprint(self.checkpoint),
            "corpus": corpus.files,
            "id_column": self.columns.id,
            "text_column": self.columns.text,
            "rows_per_chunk": self.rows_per_chunk,
            **self.options,
        }


@dataclasses.dataclass(frozen=True)
class Workers:
    """How many workers there are, and what Ray reserves for each; None chooses one on each node, with all its CPUs."""

    count: int | None = None
    cpus: int | None = None
    gpus: float = 0


def embed_corpus(
    job: Job, workers: Workers, address: str | None, progress: Callable[[int, int], None]
) -> dict[str, int]:
    """Writes the parts that are missing. Returns the numbers of rows, of rows with an error, and of parts.

    Args:
        job: see `Job`.
        workers: see `Workers`.
        address: of the cluster; None takes the one of RAY_ADDRESS, or else starts one on this machine.
        progress: called with the numbers of finished chunks and of all chunks.

    Raises:
        FunnelError: the job cannot run, is another one than that of the output folder, or loses too many workers.
    """
    job = dataclasses.replace(
        job, corpus=job.corpus.resolve(), checkpoint=job.checkpoint.resolve(), output=job.output.resolve()
    )
    corpus = scan(job.corpus, job.columns, job.rows_per_chunk)
    open_output(job.output, job.facts(corpus))
    missing = [chunk for chunk in corpus.chunks if not (job.output / part_name(chunk)).exists()]
    finished, total = len(corpus.chunks) - len(missing), len(corpus.chunks)
    progress(finished, total)
    if missing:
        ray.init(address=address, log_to_driver=False, logging_level="error")
        try:
            for _ in write_chunks(job, missing, workers):
                finished += 1
                progress(finished, total)
        finally:
            ray.shutdown()
    return complete(job.output, corpus)


def open_output(output: Path, facts: dict[str, Any]) -> None:
    """Makes the output folder, or continues in it."""
    is_ours = (output / "run.json").exists()
    if output.exists() and not is_ours:
        raise ConfigError(f"{output} exists, but not as the output of embed-corpus; choose another output")
    RunFolder(output).open(facts, resume=is_ours)
    for partial in output.glob(".*.partial"):  # of workers that were killed
        partial.unlink(missing_ok=True)


def write_chunks(job: Job, chunks: Sequence[Chunk], workers: Workers) -> Iterator[Chunk]:
    """Gives chunks to workers, one at a time each, and yields those that are written.

    A lost worker is replaced, and its chunk goes to the next free one. A new worker gets chunks once it has started, so
    one that waits for a node does not hold any.
    """
    cpus, count = resources(workers)
    actor = ray.remote(ChunkWriter).options(num_cpus=cpus, num_gpus=workers.gpus)
    arguments = job.output, job.columns, job.checkpoint, fingerprint(job.checkpoint), job.options
    running: dict[Any, tuple[Any, Chunk | None]] = {}  # by the result of a call; no chunk while a worker starts

    def start_worker() -> None:
        worker = actor.remote(*arguments)
        running[worker.load.remote()] = (worker, None)

    count = min(count, len(chunks))
    for _ in range(count):
        start_worker()
    waiting, unfinished, losses = deque(chunks), len(chunks), 0
    idle: list[Any] = []
    while unfinished:
        while waiting and idle:
            worker, following = idle.pop(), waiting.popleft()
            running[worker.write.remote(following)] = (worker, following)
        (call,), _ = ray.wait(list(running), num_returns=1)
        worker, chunk = running.pop(call)
        try:
            ray.get(call)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:  # the worker is lost, with its process or its node
            ray.kill(worker)
            losses += 1
            if losses > LOSSES * count:
                raise BackendUnavailable(
                    f"{losses} workers were lost without a finished chunk between them, the last one with: "
                    f"{error!s:.300}. If memory is short, give each more of it (fewer workers, smaller chunks)"
                ) from error
            if chunk is not None:
                waiting.appendleft(chunk)
            start_worker()
        else:
            idle.append(worker)
            if chunk is not None:
                unfinished, losses = unfinished - 1, 0
                yield chunk


def resources(workers: Workers) -> tuple[int, int]:
    """CPUs for each worker, and the number of workers."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise BackendUnavailable("the Ray cluster has no node with CPUs; start one with `ray start`")
    cpus = workers.cpus or int(min(node["CPU"] for node in nodes))
    if cpus > max(node["CPU"] for node in nodes):
        raise ConfigError(f"a worker needs {cpus} CPUs, but the largest node has fewer; lower --cpus-per-worker")
    return cpus, workers.count or len(nodes)


def complete(output: Path, corpus: Corpus) -> dict[str, int]:
    """Counts the rows of all parts, and writes the counts to `COMPLETE`.

    Raises:
        BackendUnavailable: a part is missing here, though a worker wrote it.
    """
    rows = errors = 0
    for chunk in corpus.chunks:
        part = output / part_name(chunk)
        if not part.exists():
            raise BackendUnavailable(
                f"a worker wrote {part.name}, but it is not in {output} here; choose an output on a file system that "
                "all nodes share"
            )
        column = pq.read_table(part, columns=["error"]).column(0)
        rows, errors = rows + len(column), errors + len(column) - column.null_count
    counts = {"rows": rows, "errors": errors, "parts": len(corpus.chunks)}
    write_text(output / COMPLETE, json.dumps(counts, indent=2) + "\n")
    return counts
