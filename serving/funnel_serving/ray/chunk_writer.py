"""What runs on the workers of `funnel embed-corpus`: embeds a chunk of a corpus and writes it to a file of its own."""

import uuid
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from funnel_engine.checkpoints.native import synchronize
from funnel_kernels.errors import CheckpointError
from funnel_serving.engines import fingerprint
from funnel_serving.ray.corpus import Chunk, Columns, read_chunk
from funnel_serving.ray.embed_batches import EmbedBatches


class ChunkWriter:
    """Writes parts of an output folder.

    Args:
        output: the folder.
        columns: the names of the columns of the corpus.
        checkpoint: the folder of the checkpoint, as this node sees it.
        sha256: the fingerprint that it must have.
        options: further arguments of `EmbedBatches`.
    """

    def __init__(self, output: Path, columns: Columns, checkpoint: Path, sha256: str, options: dict[str, Any]):
        self.output, self.columns, self.options = output, columns, options
        self.checkpoint, self.sha256 = checkpoint, sha256

    def load(self) -> None:
        """Loads the checkpoint. An exception of a constructor would look like the death of a worker."""
        self.embed = EmbedBatches(
            str(self.checkpoint), id_column=self.columns.id, text_column=self.columns.text, **self.options
        )
        if (found := fingerprint(self.checkpoint)) != self.sha256:
            raise CheckpointError(
                f"{self.checkpoint} is another checkpoint on a worker ({found:.12}) than where the command runs "
                f"({self.sha256:.12}); copy it to every node, or put it on a shared file system"
            )

    def write(self, chunk: Chunk) -> None:
        """Writes the part of a chunk; it is complete as soon as it has its name."""
        table = self.embed(read_chunk(chunk, self.columns))
        partial = self.output / f".{part_name(chunk)}.{uuid.uuid4().hex}.partial"
        try:
            pq.write_table(table, partial)
            synchronize(partial)
            partial.rename(self.output / part_name(chunk))
            synchronize(self.output)
        finally:
            partial.unlink(missing_ok=True)


def part_name(chunk: Chunk) -> str:
    return f"part-{chunk.number:08d}.parquet"
