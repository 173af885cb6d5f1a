"""What all suites' commands share, where it does more than hand on: places of funnels, and the end of a run."""

import dataclasses

import pytest
from matplotlib.figure import Figure

from funnel_benchmarks.latency.command import REPEATS
from funnel_benchmarks.peers.command import peers
from funnel_benchmarks.results import ENOUGH_SAMPLES, Results
from funnel_benchmarks.suite_command import end, funnel_place, write_plot
from funnel_kernels.errors import FunnelError
from tiny_models import CONFIG


def results_of(file, *measures):
    results = Results(file, suite="latency", options={}, machine={})
    results.measure_all([(f"cell {number}", measure) for number, measure in enumerate(measures)])
    return results


def row():
    return {"height": 3.0}


def failing():
    raise FunnelError("too hot")


@pytest.mark.parametrize(("given", "layers", "place"), [(None, 24, 4), (None, 3, 1), (0, 24, 0), (5, 6, 5)])
def test_a_funnel_comes_after_a_sixth_of_the_layers_unless_told_otherwise(given, layers, place):
    assert funnel_place(given, dataclasses.replace(CONFIG, layer_types=("full",) * layers)) == place


def test_a_run_ends_with_the_name_of_its_file(tmp_path, capsys):
    end(results_of(tmp_path / "out.json", row))
    assert capsys.readouterr().out.splitlines()[-1] == f"figures {tmp_path / 'out.json'}"


def test_an_older_file_that_stays_is_none_of_the_run_s(tmp_path, capsys):
    file = tmp_path / "out.json"
    file.write_text("old")
    with pytest.raises(SystemExit) as status:
        end(results_of(file, failing))
    assert status.value.code == 1
    assert file.read_text() == "old"
    assert str(file) not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        end(results_of(file, failing, row))
    assert str(file) in capsys.readouterr().out


def test_a_plot_is_of_all_results_in_the_format_of_its_name(tmp_path, capsys):
    drawn = []

    def draw(content, look):
        drawn.append(content["rows"])
        return Figure()

    for ending, begins in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        results = results_of(None, row)
        write_plot(results, tmp_path / f"out{ending}", draw)
        assert drawn.pop() == results.rows
        assert (tmp_path / f"out{ending}").read_bytes().startswith(begins)
        assert f"plot    {tmp_path / f'out{ending}'}\n" in capsys.readouterr().out


def test_suites_take_enough_samples_by_themselves():
    """A B B A gives two of each side. The sweep's `--quick` says that it takes fewer."""
    (repeats,) = [each for each in peers.params if each.name == "repeats"]
    assert 2 * min(repeats.default, REPEATS) >= ENOUGH_SAMPLES
