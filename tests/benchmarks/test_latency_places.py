"""The `--layers` option."""

import pytest

from funnel_benchmarks.latency.command import even_layers, parse_layers
from funnel_kernels.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("2", (2,)),
        ("0,17", (0, 17)),
        ("2,4,6,...,16", (2, 4, 6, 8, 10, 12, 14, 16)),
        ("2,4,...,16", (2, 4, 6, 8, 10, 12, 14, 16)),
        (" 1, 4, ..., 10 ", (1, 4, 7, 10)),
        ("0,1,...,3,8,...,13", (0, 1, 2, 3, 8, 13)),
        ("14,2,8,2", (2, 8, 14)),
    ],
)
def test_lists_and_progressions(text, layers):
    assert parse_layers(text, num_layers=18) == layers


@pytest.mark.parametrize(
    "text",
    ["", "a", "2,,4", "-2", "2.5", "...", "2,...,16", "...,4", "2,4,...", "2,4,...,15", "4,2,...,0", "2,4,...,4"],
)
def test_what_cannot_be_read_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"2,4,\.\.\.,16"):
        parse_layers(text, num_layers=18)


def test_a_place_beyond_the_model_is_refused():
    with pytest.raises(ConfigError, match="after 18 layers, but the model has 18; the last place is after 17"):
        parse_layers("2,18", num_layers=18)


def test_every_even_place_is_the_default():
    assert even_layers(18) == (2, 4, 6, 8, 10, 12, 14, 16)
    assert even_layers(3) == (2,)
    with pytest.raises(ConfigError, match="2 layers"):
        even_layers(2)
