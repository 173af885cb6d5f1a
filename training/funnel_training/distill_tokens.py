"""Self-distillation of every token: for taggers, and for encoders whose rows are used."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from funnel_engine.heads import HeadConfig, TokenLogits
from funnel_engine.inputs import Ragged
from funnel_engine.packing import Ints, Spans
from funnel_kernels import Target
from funnel_training.distill_loss import unit
from funnel_training.metrics import unit_vectors
from funnel_training.student import Packs, Student
from funnel_training.teacher import TaughtTexts
from funnel_training.trainer import Run, Settings

LEAST = 1e-12  # of the square of a row's length


@dataclasses.dataclass(frozen=True)
class TokenOutputs:
    """Every row of the encoder and, for a tagger, its logits beside it (a `heads.Head`)."""

    config: HeadConfig
    name: ClassVar[str] = "hidden_states"
    inputs_per_sequence: ClassVar[int] = 0

    def sequence_inputs(self, batch: Ragged, spans: Spans) -> tuple[Ints, ...]:
        return ()

    def __call__(self, params: Mapping[str, Any], rows: jax.Array, *inputs: jax.Array, target: Target) -> jax.Array:
        rows = rows.astype(jnp.float32)
        if self.config.task != "tag":
            return rows
        return jnp.concatenate([rows, TokenLogits(self.config)(params, rows, target=target)], axis=1)


def token_loss(
    student: jax.Array,  # [R, D + labels]
    teacher: jax.Array,  # [R, D + labels]
    counts: jax.Array,  # [R] bool: whether the row is a token
    width: int,  # D
) -> tuple[jax.Array, jax.Array]:  # float32 scalars
    """The mean over tokens of `|student - teacher|^2 / |teacher|^2`, and for a tagger the divergence of its labels.

    With rows of equal length the first term is `2 (1 - cosine)`; another length adds the square of its relative
    difference. Hidden states are compared in this way by TinyBERT (arXiv:1909.10351, squared error) and DistilBERT
    (arXiv:1910.01108, cosine). The second term, where there are labels, is the Kullback-Leibler divergence of the
    student's label probabilities from the teacher's (arXiv:1503.02531), at temperature 1.

    Returns:
        The loss, and the mean cosine of the rows.
    """
    number = jnp.maximum(counts.sum(), 1)
    rows, expected = student[:, :width], teacher[:, :width]
    losses = jnp.square(rows - expected).sum(1) / jnp.maximum(jnp.square(expected).sum(1), LEAST)
    if student.shape[1] > width:
        found, wanted = (jax.nn.log_softmax(x[:, width:]) for x in (student, teacher))
        losses += (jnp.exp(wanted) * (wanted - found)).sum(1)
    cosines = (unit(rows) * unit(expected)).sum(1)
    return jnp.where(counts, losses, 0.0).sum() / number, jnp.where(counts, cosines, 0.0).sum() / number


class TokenDistillation:
    """Trains the student's rows to be the teacher's, see `Objective`.

    Args:
        texts: with a row of the teacher for each token.
        classifier: of a tagger, the teacher's weights by name; else empty.
    """

    def __init__(self, student: Student, texts: TaughtTexts, classifier: Mapping[str, np.ndarray], settings: Settings):
        self.student, self.texts, self.classifier, self.settings = student, texts, classifier, settings
        self.places = texts.places

    def batch(self, step: int) -> tuple[Packs, np.ndarray]:
        packs = self.texts.draw(self.student, self.settings, step)
        return packs, self.targets(packs)

    @property
    def width(self) -> int:
        return self.texts.teacher.shape[1]

    def targets(self, packs: Packs) -> np.ndarray:
        """The teacher's outputs for each packed row, [P, R, D + labels]; 0 where there is no token."""
        real = packs.batch.levels[1].real
        numbers = packs.texts[packs.texts >= 0]  # pack by pack, in the order of the packed rows
        at = [np.arange(*self.texts.tokens.offsets[number : number + 2]) for number in numbers]
        rows = np.asarray(self.texts.teacher[np.concatenate(at)])
        if self.classifier:
            logits = rows @ self.classifier["classifier.weight"].T
            rows = np.concatenate([rows, logits + self.classifier.get("classifier.bias", np.float32(0))], axis=1)
        targets = np.zeros((*real.shape, rows.shape[1]), np.float32)
        targets[real] = rows
        return targets

    def loss(self, outputs: jax.Array, packs: Packs, targets: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        flat, expected = (array.reshape(-1, outputs.shape[-1]) for array in (outputs, targets))
        loss, cosine = token_loss(flat, expected, packs.batch.levels[1].real.reshape(-1), self.width)
        return loss, {"cosine": cosine}

    def evaluate(self, run: Run) -> dict[str, float]:
        """The mean cosine of held-out rows; of a tagger first the part of the tokens that keep the teacher's label."""
        width, texts = self.width, self.texts
        tokens = int(texts.tokens.lengths[texts.held_out].sum())
        cosines = same_labels = 0.0
        for packs in self.student.batches(texts.tokens, texts.held_out, self.settings.packs):
            real = packs.batch.levels[1].real
            found, expected = run(packs)[real], self.targets(packs)[real]
            cosines += float((unit_vectors("rows", found[:, :width]) * unit_vectors("rows", expected[:, :width])).sum())
            if self.classifier:
                same_labels += float((found[:, width:].argmax(1) == expected[:, width:].argmax(1)).sum())
        figures = {"held_out_cosine": cosines / tokens}
        return {"same_labels": same_labels / tokens, **figures} if self.classifier else figures
