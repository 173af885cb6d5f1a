"""`funnel embed-corpus`: every row once, whatever is killed; and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="ray is not installed")
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from click.testing import CliRunner
from ray.cluster_utils import Cluster

from funnel_engine import CheckpointError, ConfigError, Engine, FunnelConfig, InputError
from funnel_serving.engines import fingerprint
from funnel_serving.ray import chunk_writer, embed_corpus
from funnel_serving.ray.chunk_writer import ChunkWriter
from funnel_serving.ray.corpus import Columns, read_chunk, scan
from funnel_serving.ray.embed_batches import EmbedBatches
from funnel_serving.ray.embed_corpus import Job, Workers
from funnel_serving.ray.embed_corpus_command import embed_corpus as command
from sentence_models import WORDS

COLUMNS = Columns("id", "text")
ROWS, ROWS_PER_CHUNK, PARTS = 240, 2, 120  # many small chunks, so that something can be killed in between


def texts(count, seed=0):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(2, 40))) for _ in range(count)]


TEXTS = texts(ROWS)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of Parquet in several row groups, and of JSONL."""
    folder, half = tmp_path_factory.mktemp("corpus"), ROWS // 2
    names = [f"row {index}" for index in range(ROWS)]
    table = pa.table({"other": range(half), "text": TEXTS[:half], "id": names[:half]})
    pq.write_table(table, folder / "first.parquet", row_group_size=30)
    rows = [{"id": name, "text": text} for name, text in zip(names[half:], TEXTS[half:], strict=True)]
    write_jsonl(folder / "second.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def cluster():
    """Three nodes of one CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def job(corpus, checkpoint, output, **options):
    return Job(corpus, checkpoint, output, COLUMNS, ROWS_PER_CHUNK, options)


def run(job, address=None, progress=lambda finished, total: None):
    return embed_corpus.embed_corpus(job, Workers(count=3, cpus=1), address, progress)


def output_of(folder):
    parts = sorted(folder.glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts])


def check_output(folder, checkpoint):
    """Every row is there once, in the order of the corpus, with the engine's vector."""
    table = output_of(folder)
    assert table.column("id").to_pylist() == [f"row {index}" for index in range(ROWS)]
    assert table.column("error").null_count == ROWS
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    vectors = np.array(table.column("embedding").to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, Engine.load(checkpoint).embed(TEXTS), atol=2e-5)
    assert not list(folder.glob(".*"))
    counts = json.loads((folder / "complete.json").read_text("utf-8"))
    assert counts == {"rows": ROWS, "errors": 0, "parts": PARTS}


def workers():
    """The processes of workers that embed."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::ChunkWriter"):
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def test_killed_workers_and_a_killed_node_lose_and_duplicate_nothing(cluster, corpus, checkpoint, tmp_path):
    cluster, nodes = cluster

    def kill(finished, total):
        if finished in (4, 20):
            os.kill(workers()[0], signal.SIGKILL)
        if finished == 10:
            cluster.remove_node(nodes[0], allow_graceful=False)

    assert run(job(corpus, checkpoint, tmp_path / "out"), cluster.address, kill)["rows"] == ROWS
    check_output(tmp_path / "out", checkpoint)


def test_a_killed_driver_goes_on_where_it_was(cluster, corpus, checkpoint, tmp_path):
    cluster, _ = cluster
    output = tmp_path / "out"
    options = f"--checkpoint {checkpoint} --output {output} --rows-per-chunk {ROWS_PER_CHUNK}"
    arguments = [
        str(corpus),
        *options.split(),
        "--address",
        cluster.address,
        "--workers",
        "1",
        "--cpus-per-worker",
        "1",
    ]
    start = f"from {command.callback.__module__} import embed_corpus; embed_corpus()"
    process = subprocess.Popen([sys.executable, "-c", start, *arguments])
    while len(list(output.glob("part-*"))) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    first = {part: part.stat().st_ino for part in output.glob("part-*")}
    assert 5 <= len(first) < PARTS
    (output / ".part-00000100.parquet.0123.partial").write_bytes(b"half")
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert f"Wrote {ROWS} rows to {PARTS} files" in result.output
    check_output(output, checkpoint)
    again = {part: part.stat().st_ino for part in output.glob("part-*")}
    assert sum(again[part] == first[part] for part in first) >= len(first) - 1
    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert {part: part.stat().st_ino for part in output.glob("part-*")} == again, "a finished job was run again"


def test_a_mistake_ends_the_job_with_its_own_error(cluster, corpus, checkpoint, tmp_path):
    cluster, _ = cluster
    with pytest.raises(InputError, match="prompt_name='answer' is unknown"):
        run(job(corpus, checkpoint, tmp_path / "out", prompt_name="answer"), cluster.address)


def test_ray_data_runs_it_with_the_threads_and_devices_of_its_worker(cluster, corpus, checkpoint):
    cluster, _ = cluster
    ray.init(address=cluster.address, log_to_driver=False)

    class Observed(EmbedBatches):
        def __call__(self, batch):
            import jax

            table = super().__call__(batch)
            facts = f"{self.engine.devices.target.threads} {os.environ['JAX_PLATFORMS']} {jax.default_backend()}"
            return table.append_column("facts", pa.array([facts] * len(table)))

    try:
        data = ray.data.read_parquet(str(corpus / "first.parquet")).map_batches(
            Observed,
            fn_constructor_kwargs={"checkpoint": str(checkpoint)},
            batch_format="pyarrow",
            batch_size=50,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        rows = {row["id"]: row for row in data.take_all()}
    finally:
        ray.shutdown()
    assert len(rows) == ROWS // 2
    vectors = [rows[f"row {index}"]["embedding"] for index in range(ROWS // 2)]
    np.testing.assert_allclose(vectors, Engine.load(checkpoint).embed(TEXTS[: ROWS // 2]), atol=2e-5)
    assert {row["facts"] for row in rows.values()} == {"1 cpu cpu"}


# ------------------------------------------------------------------------------------------------- without Ray


@pytest.fixture
def written_here(monkeypatch):
    """Chunks are written by this process, and not by workers."""

    def write_chunks(job, chunks, workers):
        writer = ChunkWriter(job.output, job.columns, job.checkpoint, fingerprint(job.checkpoint), job.options)
        writer.load()
        for chunk in chunks:
            writer.write(chunk)
            yield chunk

    monkeypatch.setattr(embed_corpus, "write_chunks", write_chunks)
    monkeypatch.setattr(ray, "init", lambda **_: None)


@pytest.fixture
def finished(written_here, checkpoint, tmp_path):
    """A function that runs a job of 20 rows."""
    small = write_jsonl(tmp_path / "small.jsonl", [{"id": index, "text": TEXTS[index]} for index in range(20)])

    def finish(**options):
        return run(job(small, checkpoint, tmp_path / "out", **options))

    finish.corpus, finish.output = small, tmp_path / "out"
    return finish


def test_a_row_that_cannot_be_embedded_does_not_end_the_job(written_here, checkpoint, tmp_path):
    rows = [{"id": index, "text": text} for index, text in enumerate(TEXTS[:10])]
    rows[3]["text"], rows[5]["text"], rows[9]["text"] = "", None, "small " * 20_000
    corpus = write_jsonl(tmp_path / "rows.jsonl", rows)
    counts = run(job(corpus, checkpoint, tmp_path / "out", truncate_dim=8, funnel="1:2/mean"))
    assert counts == {"rows": 10, "errors": 3, "parts": 5}
    table = output_of(tmp_path / "out").to_pydict()
    assert [index for index, vector in enumerate(table["embedding"]) if None in vector] == [3, 5, 9]
    assert table["embedding"][3] == [None] * 8
    assert table["error"][3].startswith("the text is an empty text")
    assert table["error"][5] == "the text is missing"
    assert "more than the limit" in table["error"][9]
    engine = Engine.load(checkpoint, funnel=FunnelConfig.parse("1:2/mean"))
    np.testing.assert_allclose(table["embedding"][4], engine.embed(TEXTS[4], truncate_dim=8)[0], atol=1e-5)


def test_another_job_in_the_same_output_is_refused(finished):
    assert finished(truncate=True) == {"rows": 20, "errors": 0, "parts": 10}
    with pytest.raises(ConfigError, match="had another truncate: truncate was True, now it is False"):
        finished(truncate=False)
    with finished.corpus.open("a", encoding="utf-8") as file:
        file.write('{"id": 20, "text": "more"}\n')
    with pytest.raises(ConfigError, match="had another corpus"):
        finished(truncate=True)


def test_a_folder_of_something_else_is_not_touched(finished):
    finished.output.mkdir()
    (finished.output / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not as the output of embed-corpus"):
        finished()
    assert [file.name for file in finished.output.iterdir()] == ["notes.txt"]


def test_another_checkpoint_on_a_worker_is_refused(finished, monkeypatch):
    monkeypatch.setattr(chunk_writer, "fingerprint", lambda path: "0" * 64)
    with pytest.raises(CheckpointError, match="is another checkpoint on a worker"):
        finished()


def test_chunks_divide_the_corpus_and_are_read_alone(corpus):
    found = scan(corpus, COLUMNS, 7)
    assert found.rows == ROWS
    assert [chunk.number for chunk in found.chunks] == list(range(36))
    tables = [read_chunk(chunk, COLUMNS) for chunk in found.chunks]
    assert [text for table in tables for text in table.column("text").to_pylist()] == TEXTS
    assert found == scan(corpus, COLUMNS, 7)


GOOD = '{"id": "a", "text": "x"}\n'
MISTAKES = {
    "a duplicate": (GOOD + '{"id": "b", "text": "y"}\n' + GOOD, "line 3: id 'a' is also that of .*line 1"),
    "a missing id": (GOOD + '{"id": null, "text": "y"}', "line 2: id is None"),
    "no id": (GOOD + '{"text": "y"}', "line 2, must be a JSON object with id and text"),
    "two kinds of ids": (GOOD + '{"id": 1, "text": "y"}', "all must be texts, or all integers"),
    "no JSON": (GOOD + "text", "line 2, is not JSON"),
    "a list": ("[1]", "line 1, must be a JSON object"),
    "no rows": ("\n\n", "has no rows"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_corpus_is_named(mistake, tmp_path):
    content, message = MISTAKES[mistake]
    file = tmp_path / "rows.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        scan(file, COLUMNS, 8)


def test_a_mistake_in_a_parquet_file_is_named(tmp_path):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": [1, 2, None], "text": ["a", "b", "c"]}), file)
    with pytest.raises(InputError, match=r"rows.parquet, row 3: id is None"):
        scan(file, COLUMNS, 8)
    with pytest.raises(InputError, match="has the columns id, text, but not body"):
        scan(file, Columns("id", "body"), 8)
    file.write_bytes(b"not Parquet")
    with pytest.raises(InputError, match="is not Parquet"):
        scan(file, COLUMNS, 8)
    with pytest.raises(InputError, match="is no corpus"):
        scan(tmp_path / "rows.csv", COLUMNS, 8)
