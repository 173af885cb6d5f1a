"""Which places of the funnel are measured: the `--layers` option."""

from funnel_kernels.errors import ConfigError

DOTS = "..."


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Reads e.g. "2,8,14" or "2,4,...,16", where the dots carry the last step on up to the next number.

    Args:
        num_layers: of the model; a funnel comes after 0 ... num_layers - 1 of them.

    Returns:
        The numbers in rising order, each once.

    Raises:
        ConfigError: not such a list, or a number that the model does not have.
    """
    words = [word.strip() for word in text.split(",")]
    layers: list[int] = []
    for index, word in enumerate(words):
        if word == DOTS:
            continue
        if not word.isdecimal() or len(word) > 9:
            raise ConfigError(f"--layers {text!r}: {word!r} is not a number of layers; write e.g. 2,8,14 or 2,4,...,16")
        if int(word) >= num_layers:
            raise ConfigError(
                f"--layers {text!r} asks for a funnel after {int(word)} layers, but the model has {num_layers}; "
                f"the last place is after {num_layers - 1}"
            )
        if index and words[index - 1] == DOTS:
            layers += carry_on(text, layers, int(word))
        layers.append(int(word))
    if words[-1] == DOTS:
        raise ConfigError(f"--layers {text!r} ends in dots; write the last number after them, as in 2,4,...,16")
    return tuple(sorted(set(layers)))


def carry_on(text: str, layers: list[int], end: int) -> range:
    """The numbers that dots between `layers` and `end` stand for."""
    step = layers[-1] - layers[-2] if len(layers) > 1 else 0
    if step <= 0 or end <= layers[-1] or (end - layers[-1]) % step:
        raise ConfigError(
            f"--layers {text!r}: the dots need two rising numbers before them and one after them in the same steps, "
            "as in 2,4,...,16"
        )
    return range(layers[-1] + step, end, step)


def even_layers(num_layers: int) -> tuple[int, ...]:
    """Every even place from 2 on, as in Figure 4 of arXiv:2504.02877.

    Raises:
        ConfigError: the model has too few layers for one.
    """
    if num_layers < 3:
        raise ConfigError(f"a model of {num_layers} layers has no even place for a funnel from 2 on; give --layers")
    return tuple(range(2, num_layers, 2))
