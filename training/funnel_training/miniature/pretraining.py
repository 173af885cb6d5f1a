"""Pre-training on masked tokens, with a funnel or without: an objective of the `Trainer` and a head for it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import optax

from funnel_engine import FunnelConfig, ModelConfig
from funnel_engine.heads import linear
from funnel_engine.inputs import Ragged, join
from funnel_engine.packing import Ints, Spans, spans
from funnel_kernels import Target
from funnel_training.miniature.model import MASK, random_weights, write_model
from funnel_training.run_folder import RunFolder
from funnel_training.student import Packs, Student
from funnel_training.trainer import Objective, Report, Run, Settings, Trainer, data_mesh

MASKED_SHARE = 0.2
CHUNK = 64  # tokens of a training text


@dataclasses.dataclass(frozen=True)
class MaskedTokenLogits:
    """Logits of all tokens at the masked rows. Their matrix is the embedding."""

    name: ClassVar[str] = "masked tokens"
    inputs_per_sequence: ClassVar[int] = 0

    def sequence_inputs(self, batch: Ragged, spans: Spans) -> tuple[Ints, ...]:
        return ()  # which rows are masked is random; `MaskedTokens.pack` adds them

    def __call__(
        self, params: Mapping[str, Any], rows: jax.Array, *inputs: jax.Array, target: Target
    ) -> jax.Array:  # [masked, vocabulary]
        (masked,) = inputs
        return linear(rows[masked].astype(np.float32), params["embedding"])


class MaskedTokens(Objective):
    """Trains the model to predict the masked tokens. The place of a chunk is its document."""

    def __init__(self, student: Student, training: Sequence[tuple[str, Ints]], held_out: Ints, seed: int):
        """
        Args:
            training: documents, by name, as chunks of their token ids, [chunks, CHUNK] each.
            held_out: chunks to evaluate on, [chunks, CHUNK]; what does not fill a pack is left out.
        """
        self.student, self.seed = student, seed
        self.places = [name for name, chunks in training for _ in chunks]
        self.chunks = np.concatenate([chunks for _, chunks in training])
        self.chunks_per_pack = student.rows // CHUNK
        packs = len(held_out) // self.chunks_per_pack
        generator = np.random.default_rng(0)  # the same masks in every run
        self.held_out = [
            self.pack(held_out[numbers], numbers, generator)
            for numbers in np.arange(packs * self.chunks_per_pack, dtype=np.int32).reshape(packs, -1)
        ]

    def batch(self, step: int) -> tuple[Packs, Ints]:
        generator = np.random.default_rng([self.seed, step])
        numbers = generator.choice(len(self.chunks), self.chunks_per_pack, replace=False).astype(np.int32)
        return self.pack(self.chunks[numbers], numbers, generator)

    def pack(self, chunks: Ints, numbers: Ints, generator: np.random.Generator) -> tuple[Packs, Ints]:
        """One pack of chunks with masks, and the tokens behind the masks."""
        masked, places = mask_tokens(chunks, generator)
        texts = join(list(masked))
        packs = self.student.pack(texts, [np.arange(len(chunks), dtype=np.int32)], 1)
        rows = spans(self.student.plan, texts.lengths, 1).first[:, None] + places
        named = np.full(packs.texts.shape, -1, np.int32)
        named[0, : len(numbers)] = numbers
        targets = np.take_along_axis(chunks, places, axis=1)
        return packs._replace(inputs=(rows.reshape(1, -1).astype(np.int32),), texts=named), targets.reshape(1, -1)

    def loss(self, outputs: jax.Array, packs: Packs, targets: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean(), {}

    def evaluate(self, run: Run) -> dict[str, float]:
        right = [run(packs).argmax(axis=-1) == targets for packs, targets in self.held_out]
        return {"accuracy": float(np.mean(right))}


def mask_tokens(chunks: Ints, generator: np.random.Generator) -> tuple[Ints, Ints]:
    """The chunks with the same number of random tokens in each replaced by masks, and where these are, ascending."""
    count = round(MASKED_SHARE * chunks.shape[1])
    order = generator.permuted(np.tile(np.arange(chunks.shape[1], dtype=np.int32), (len(chunks), 1)), axis=1)
    places = np.sort(order[:, :count], axis=1)
    masked = chunks.copy()
    np.put_along_axis(masked, places, MASK, axis=1)
    return masked, places


def cut_into_chunks(ids: Sequence[int]) -> Ints:
    """The tokens of a document as [chunks, CHUNK]; the end that does not fill a chunk is left out."""
    whole = len(ids) // CHUNK * CHUNK
    return np.array(ids[:whole], np.int32).reshape(-1, CHUNK)


def pretrain(
    folder: Path,
    config: ModelConfig,
    funnel: FunnelConfig,
    training: Sequence[tuple[str, Ints]],
    held_out: Ints,
    tokenizer: Path,
    settings: Settings,
    report: Report,
) -> dict[str, float]:
    """Trains a model from random weights and writes it to a folder; a run that was stopped is continued.

    With a funnel, its recovery gives every token a row, so that masked tokens are guessed from full-length rows.

    Returns:
        The figures on the held-out chunks, with the funnel.
    """
    run = RunFolder(folder.with_name(f"{folder.name}.training"))
    facts = {"funnel": str(funnel), "config": dataclasses.asdict(config), "settings": dataclasses.asdict(settings)}
    run.open(facts, resume=run.path.exists())
    student = Student(
        config,
        MaskedTokenLogits(),
        funnel,
        settings.train,
        settings.rows,
        settings.texts,
        settings.dtype,
        data_mesh(settings.packs),
    )
    objective = MaskedTokens(student, training, held_out, settings.seed)
    trainer = Trainer(student, objective, settings, run, random_weights(config, settings.seed), report)
    figures = trainer.run()
    write_model(folder, config, trainer.best_weights(), tokenizer)
    return figures
