"""What is served: requests of one sequence each, and the times at which they arrive."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from funnel_benchmarks.inputs import random_inputs
from funnel_benchmarks.lengths import PRESETS, describe, draw, length_facts
from funnel_benchmarks.results import Row
from funnel_engine import FunnelConfig
from funnel_engine.checks import check_positive
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.packing import Ints, make_plan
from funnel_kernels.errors import ConfigError, InputError

# Of independent random numbers: lengths, ids and times of arrival have nothing to do with each other.
LENGTHS_SEED, IDS_SEED, ARRIVALS_SEED = 0, 1, 2


def poisson_arrivals(rate: float, count: int, seed: int = ARRIVALS_SEED) -> np.ndarray:
    """The first `count` arrivals of a Poisson process.

    Gaps are independent and exponential with mean 1 / rate, which makes the number of arrivals in any window of t
    seconds a Poisson variable of mean and variance rate * t.

    Args:
        rate: arrivals a second.
        seed: the same seed gives the same arrivals, at another rate only stretched.

    Returns:
        [count] float64, seconds after the beginning, rising.
    """
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


@dataclasses.dataclass(frozen=True)
class Requests:
    """Requests in the order in which they arrive, with random token ids.

    Attributes:
        source: what their lengths are drawn from: a preset's name or a file, see `lengths.draw`.
        count: how many there are.
        vocabulary: ids lie below it.

    Raises:
        ConfigError: a count below 1.
        InputError: no such preset or file.
    """

    source: str
    count: int
    vocabulary: int

    def __post_init__(self) -> None:
        check_positive("requests", self.count)
        _ = self.lengths

    @property
    def name(self) -> str:
        """Of a file the name without its folders, which are nobody's business."""
        return self.source if self.source in PRESETS else Path(self.source).name

    @functools.cached_property
    def lengths(self) -> Ints:
        """[count] int32, in tokens."""
        return draw(self.source, self.count, LENGTHS_SEED)

    @functools.cached_property
    def inputs(self) -> tuple[Ints, Ints]:
        """Ids [tokens] and offsets [count + 1]: request `i` is `ids[offsets[i]:offsets[i + 1]]`."""
        return random_inputs(self.vocabulary, self.lengths, IDS_SEED)

    def take(self, first: int, stop: int) -> tuple[Ints, Ints]:
        """Requests `first ... stop - 1` as an engine takes them: ids and offsets."""
        ids, offsets = self.inputs
        taken = offsets[first : stop + 1]
        return ids[taken[0] : taken[-1]], taken - taken[0]

    def facts(self) -> Row:
        """For the head of a result file."""
        return {"name": self.name, "source": describe(self.source), **length_facts(self.lengths)}


def check_requests(
    kinds: Sequence[Requests], model: str, config: EncoderConfig, funnel: FunnelConfig, max_batch_tokens: int
) -> None:
    """Checks that every request can be served.

    Args:
        model: its name, for messages.

    Raises:
        ConfigError: two kinds have one name.
        InputError: the model or a batch is too small for a request.
    """
    names = [kind.name for kind in kinds]
    for kind in kinds:
        if names.count(kind.name) > 1:
            raise ConfigError(f"lengths {kind.name!r} are given twice; name each only once")
        longest = kind.lengths.max()
        if longest > config.max_positions:
            raise InputError(
                f"lengths {kind.name!r} have a request of {longest} tokens, more than the {config.max_positions} that "
                f"{model} was made for; take shorter ones"
            )
        if make_plan(config, funnel).rows_needed(kind.lengths).max() > max_batch_tokens:
            raise InputError(
                f"lengths {kind.name!r} have a request of {longest} tokens, but a batch holds only {max_batch_tokens}; "
                "raise --max-batch-tokens"
            )
