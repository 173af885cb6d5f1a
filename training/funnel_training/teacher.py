"""What a teacher computes for the texts, on the disk: once for all runs with the same teacher and texts."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from funnel_engine.checkpoints.native import synchronize
from funnel_engine.inputs import Ragged
from funnel_engine.output_files import write_text
from funnel_engine.packing import Ints
from funnel_kernels.errors import ConfigError, InputError
from funnel_training.student import Packs, Student
from funnel_training.trainer import Settings

TOKENS_AT_ONCE = 2**14  # their outputs are in memory at once
FACTS, ROWS = "teacher.json", "rows.float32"


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """A folder with the teacher's rows (rows.float32) and what they depend on (teacher.json, which is written last)."""

    path: Path
    facts: dict[str, Any]

    def check(self) -> bool:
        """Whether the rows are there.

        Raises:
            ConfigError: the folder is of another teacher or of other texts, or has something else.
        """
        if not (self.path / FACTS).exists():
            others = {file.name for file in self.path.glob("[!.]*")} - {ROWS}
            if others or (self.path.exists() and not self.path.is_dir()):
                raise ConfigError(f"{self.path} exists and is not a teacher's cache; choose another folder for it")
            return False
        try:
            found = json.loads((self.path / FACTS).read_text(encoding="utf-8"))
            other = [name for name, value in self.facts.items() if found.get(name) != value]
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{self.path / FACTS} cannot be read ({error}); remove {self.path}") from error
        if other:
            name = other[0]
            raise ConfigError(
                f"the teacher's cache {self.path} has another {' and another '.join(other)}: {name} is "
                f"{found.get(name)!r:.80}, but this run has {self.facts[name]!r:.80}; give another folder, or remove it"
            )
        return True

    def write(self, parts: Iterable[np.ndarray]) -> None:
        """Writes the rows, [N, D], which come in parts.

        Raises:
            InputError: they cannot be written, e.g. because the disk is full.
        """
        partial = self.path / f".rows-{os.getpid()}.partial"
        try:
            self.path.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                for part in parts:
                    file.write(np.ascontiguousarray(part, np.float32).data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path / ROWS)
            write_text(self.path / FACTS, json.dumps(self.facts, indent=2) + "\n")
            synchronize(self.path)
        except OSError as error:
            raise InputError(
                f"cannot write the teacher's cache {self.path}: {error.strerror or error}; free some space, or choose "
                "another folder"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def read(self, count: int, width: int) -> np.ndarray:
        """The rows, [count, width] float32, mapped into memory: only what is used is read.

        Raises:
            InputError: the file is damaged.
        """
        file = self.path / ROWS
        try:
            rows = np.memmap(file, np.float32, "r").reshape(count, width)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} is damaged ({error}); remove {self.path}, and it will be written again"
            ) from error
        return rows


@dataclasses.dataclass(frozen=True)
class TaughtTexts:
    """Texts, and what the teacher computes for them.

    Attributes:
        places: where each text is from, for messages.
        tokens: their token ids.
        teacher: a row for each text, or for each token of all texts, [N, D] float32.
        held_out, training: the numbers of the texts that are held out of training, and of the others.
    """

    places: Sequence[str]
    tokens: Ragged
    teacher: np.ndarray
    held_out: Ints
    training: Ints

    def draw(self, student: Student, settings: Settings, step: int) -> Packs:
        """The texts of a step, which depend on the seed and the step alone."""
        order = np.random.default_rng([settings.seed, step]).permutation(self.training)
        return student.pack(self.tokens, student.fill(self.tokens, order, settings.packs), settings.packs)


def in_parts(texts: Ragged) -> Iterator[Ragged]:
    """All texts in order, in parts of about `TOKENS_AT_ONCE` tokens."""
    part = texts.offsets[:-1] // TOKENS_AT_ONCE
    for numbers in np.split(np.arange(len(part), dtype=np.int32), np.flatnonzero(np.diff(part)) + 1):
        yield texts.take(numbers)


def hash_texts(texts: Ragged) -> str:
    """SHA-256 of the token ids and of where the texts begin."""
    digest = hashlib.sha256(np.ascontiguousarray(texts.offsets, "<i8").data)
    digest.update(np.ascontiguousarray(texts.ids, "<i4").data)
    return digest.hexdigest()
