"""Length presets against the table that they are made from, and files of lengths."""

import numpy as np
import pytest

from funnel_benchmarks.lengths import PRESETS, describe, draw
from funnel_kernels.errors import InputError

DRAWS = 200_000
# 5th, 25th, 50th, 75th, 90th, 95th and 99th percentile, and the maximum
TABLE = {
    "conll": (4, 9, 15, 32, 46, 53, 65, 159),
    "sst2": (8, 17, 24, 32, 39, 43, 51, 57),
    "qnli": (25, 36, 44, 56, 69, 79, 106, 193),
    "agnews": (22, 32, 39, 46, 52, 57, 79, 162),
    "passage": (45, 62, 76, 92, 110, 125, 175, 350),
}


def test_there_are_these_presets():
    assert PRESETS.keys() == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_a_large_draw_has_the_quantiles_of_the_table(name):
    lengths = draw(name, DRAWS, seed=3)
    assert lengths.dtype == np.int32
    assert lengths.shape == (DRAWS,)
    drawn = np.quantile(lengths, (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99))
    np.testing.assert_allclose(drawn, TABLE[name][:-1], atol=1)
    assert TABLE[name][-1] - 3 <= lengths.max() <= TABLE[name][-1]
    assert 1 <= lengths.min() < TABLE[name][0]


def test_lengths_between_two_quantiles_are_spread_evenly():
    lengths = draw("passage", DRAWS, seed=4)
    between = lengths[(lengths >= 92) & (lengths < 110)]  # 75th to 90th percentile
    assert abs(np.median(between) - 100.5) <= 1


def test_the_seed_decides():
    np.testing.assert_array_equal(draw("conll", 50, seed=1), draw("conll", 50, seed=1))
    assert (draw("conll", 50, seed=1) != draw("conll", 50, seed=2)).any()


def test_presets_say_that_they_are_estimates():
    assert all("estimate" in describe(name) for name in PRESETS)


def test_a_file_is_drawn_from(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("7\n31\n\n2\n")
    lengths = draw(str(file), 300, seed=0)
    assert lengths.dtype == np.int32
    assert sorted(set(lengths.tolist())) == [2, 7, 31]
    assert describe(str(file)) == "file mine.txt"  # not its path


@pytest.mark.parametrize("content", ["", "12\nx\n", "12\n0\n", "-3\n", "2.5\n", f"{2**31}\n"])
def test_a_file_that_holds_no_lengths_is_refused(tmp_path, content):
    file = tmp_path / "lengths.txt"
    file.write_text(content)
    with pytest.raises(InputError, match="length"):
        draw(str(file), 4, seed=0)


def test_neither_preset_nor_file_names_the_presets():
    with pytest.raises(InputError, match="conll, sst2, qnli, agnews, passage"):
        draw("imdb", 4, seed=0)


def test_a_binary_file_is_refused(tmp_path):
    file = tmp_path / "lengths.bin"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="readable text"):
        draw(str(file), 4, seed=0)


def test_a_number_is_the_length_of_all():
    assert draw("8192", 3, 0).tolist() == [8192] * 3
    assert describe("8192") == "all equal"
    for wrong in ("0", "1" * 10):
        with pytest.raises(InputError, match=f"--lengths {wrong}: a sequence has 1 to 999999999 tokens"):
            draw(wrong, 3, 0)
