"""What all tasks have in common: texts that a model embeds, and scores of the vectors."""

import abc
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from funnel_engine import Engine
from funnel_engine.config import Funnel
from funnel_engine.inputs import Ragged, TooLong
from funnel_engine.text import TextConfig
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.data_files import Row
from funnel_training.scores import Ints, Score
from funnel_training.statistics import LEAST_UNITS

SEED = 0


@dataclasses.dataclass(frozen=True)
class Side:
    """Texts that are embedded alike.

    Attributes:
        name: what they are, e.g. "queries".
        texts: without duplicates where that matters.
        places: where each text is from, for messages.
        prompt: the name of the prompt to put before them if the checkpoint has it; else its default prompt is.
    """

    name: str
    texts: Sequence[str]
    places: Sequence[str]
    prompt: str | None = None

    def prompt_name(self, text: TextConfig) -> str | None:
        """The name of the prompt that a checkpoint puts before these texts."""
        return self.prompt if self.prompt in text.prompts else text.default_prompt_name

    def take(self, index: Ints) -> "Side":
        """The texts with these indices."""
        texts, places = ([values[i] for i in index] for values in (self.texts, self.places))
        return Side(self.name, texts, places, self.prompt)

    def token_ids(self, engine: Engine, truncate: bool) -> Ragged:
        try:
            return engine.token_ids(list(self.texts), prompt_name=self.prompt_name(engine.text), truncate=truncate)
        except TooLong as error:
            raise InputError(
                f"{self.places[error.index]}: the text has {error.tokens} tokens, more than the limit of "
                f"{error.limit}; shorten it, or cut off the ends of such texts with truncate=True (--truncate)"
            ) from error
        except InputError as error:
            named = re.sub(r"^input (\d+)", lambda found: f"{self.places[int(found[1])]}: the text", str(error))
            raise InputError(named) from error


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Data, and how well a model does on it. A subclass reads one form of data.

    Attributes:
        files: the SHA-256 of each file that was read, by its name.
        duplicates: rows that were left out because an earlier row has the same texts.
        sides: the texts. If there are two sides, the first can stay unfunneled: queries, and documents in an index.
    """

    files: dict[str, str]
    duplicates: int
    sides: tuple[Side, ...]
    kind: ClassVar[str]
    unit: ClassVar[str]  # what the scores have one of each: "pairs", "queries"
    per_token: ClassVar[bool] = False  # whether a model must have a row for each token
    lines_per_unit: ClassVar[int] = 1  # of the data

    @property
    @abc.abstractmethod
    def units(self) -> int:
        """Their number."""

    @property
    def least_units(self) -> int:
        """The least number of units that can be scored."""
        return LEAST_UNITS

    def order(self, seed: int) -> Ints:
        """The units in random order, so that the first ones of them are a sample."""
        return np.random.default_rng(seed).permutation(self.units)

    def check_funnel(self, funnel: Funnel) -> None:
        """Raises `ConfigError` unless a funnel leaves the rows that the task needs."""
        for _, each in funnel.classes:
            if self.per_token and each.output_stride > 1:
                raise ConfigError(
                    f"funnel {each}: {self.kind} need a row for each token; add a recovery, as in {each}/mean_last"
                )

    @abc.abstractmethod
    def take(self, units: Ints, share: float) -> "Task":
        """The task of the units with these indices.

        Args:
            share: the part of the documents that stays where units rank documents, besides those that are relevant to
                these units. A larger share contains a smaller one.
        """

    def inputs(self, engine: Engine, truncate: bool) -> list[Any]:
        """The token ids of each side, which are the same for every funnel. Each has the `lengths` of its sequences.

        Raises:
            InputError: a text cannot be run.
            ConfigError: the model does not have the head for this task.
        """
        return [side.token_ids(engine, truncate) for side in self.sides]

    def run(self, engine: Engine, inputs: Any) -> Any:
        """What a model makes of the inputs of one side: vectors, unless a subclass says otherwise."""
        return engine.embed(inputs)

    def outputs(self, engine: Engine, inputs: list[Any]) -> list[Any]:
        """What a model makes of the inputs of every side."""
        return [self.run(engine, side) for side in inputs]

    @abc.abstractmethod
    def scores(self, outputs: list[Any], baseline: list[Any]) -> dict[str, Score]:
        """The scores of a model's outputs for each side, the most important one first.

        Args:
            baseline: the outputs of the unfunneled model.

        Raises:
            InputError: a vector is not finite, or a score is not defined.
        """


def without_duplicates(rows: Sequence[Row], *names: str) -> tuple[list[Row], int]:
    """The rows without those whose texts in the columns `names` an earlier row has, and the number left out."""
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        kept.setdefault(tuple(row.text(name) for name in names), row)
    return list(kept.values()), len(rows) - len(kept)


def distinct(texts: Sequence[str], places: Sequence[str], name: str, prompt: str | None) -> tuple[Side, np.ndarray]:
    """A side of the texts, each of them once, and for every given text its index there."""
    first: dict[str, str] = {}
    for text, place in zip(texts, places, strict=True):
        first.setdefault(text, place)
    numbers = {text: number for number, text in enumerate(first)}
    return Side(name, list(first), list(first.values()), prompt), np.array([numbers[text] for text in texts])


def sample(count: int, share: float) -> Ints:
    """The indices of a random share of things, at least one, ascending; a larger share contains a smaller one."""
    return np.sort(np.random.default_rng(SEED).permutation(count)[: max(1, round(share * count))])
