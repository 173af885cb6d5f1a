"""How long the sequences of a benchmark are: one fixed length, lengths from a file, or draws from a preset.

A preset is the distribution of token counts of a well-known data set, as a piecewise-linear quantile function. **They
are estimates**: the word counts of the first four were measured on the data sets' own files and multiplied by typical
Gemma tokens per word; of `passage` only the mean and the maximum number of characters are known. Special tokens are
counted.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from funnel_benchmarks.results import Row
from funnel_engine.packing import Ints
from funnel_kernels.errors import InputError

LEVELS = (0.05, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)


class Preset(NamedTuple):
    """Token counts at each of `LEVELS`, and where they come from."""

    quantiles: tuple[int, ...]
    source: str


PRESETS = {
    "conll": Preset((4, 9, 15, 32, 46, 53, 65, 159), "CoNLL-2003 sentences, words x 1.4 + 1"),
    "sst2": Preset((8, 17, 24, 32, 39, 43, 51, 57), "SST-2 sentences, words x 1.2 + 1"),
    "qnli": Preset((25, 36, 44, 56, 69, 79, 106, 193), "QNLI question-sentence pairs, words x 1.2 + 2"),
    "agnews": Preset((22, 32, 39, 46, 52, 57, 79, 162), "AG News articles, words x 1.25 + 1"),
    "passage": Preset((45, 62, 76, 92, 110, 125, 175, 350), "MS MARCO passages, shape assumed around the known mean"),
}


def draw(what: str, sequences: int, seed: int) -> Ints:
    """Draws the lengths of `sequences` sequences, in tokens.

    Args:
        what: a number, which is the length of all of them; one of `PRESETS`; or a text file with one length a line,
            which is drawn from with replacement.
        seed: the same seed draws the same lengths.

    Returns:
        [sequences] int32, each at least 1.

    Raises:
        InputError: no such number of tokens, and neither a preset nor a readable file of positive integers.
    """
    if what.isdecimal():
        if len(what) > 9 or int(what) < 1:
            raise InputError(f"--lengths {what}: a sequence has 1 to 999999999 tokens")
        return np.full(sequences, int(what), np.int32)
    generator = np.random.default_rng(seed)
    if what in PRESETS:
        lengths = quantile(PRESETS[what], generator.random(sequences))
    else:
        lengths = generator.choice(read_lengths(Path(what)), sequences)
    return lengths.astype(np.int32)


def quantile(preset: Preset, level: np.ndarray) -> np.ndarray:
    """The preset's quantile function, rounded to whole tokens; below the first level its first line is carried on."""
    first, second = preset.quantiles[:2]
    lowest = first - LEVELS[0] * (second - first) / (LEVELS[1] - LEVELS[0])
    return np.maximum(np.rint(np.interp(level, (0.0, *LEVELS), (lowest, *preset.quantiles))), 1)


def describe(what: str) -> str:
    """Where the lengths come from, in words; of a file only its name."""
    if what.isdecimal():
        return "all equal"
    if what in PRESETS:
        return f"{what} (estimate: {PRESETS[what].source})"
    return f"file {Path(what).name}"


def length_facts(lengths: Ints) -> Row:
    """What a result file says about the lengths of sequences, in tokens."""
    return {
        "tokens": int(lengths.sum()),
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
    }


def read_lengths(path: Path) -> np.ndarray:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"lengths {str(path)!r} is neither a readable text file nor one of {', '.join(PRESETS)}"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.isdecimal() or len(line) > 9 or int(line) < 1:
            raise InputError(f"{path}: entry {number} is {line!r}; give one length in tokens (at least 1) a line")
    if not lines:
        raise InputError(f"{path} contains no lengths; write one length in tokens on each line")
    return np.array(lines, np.int64)
