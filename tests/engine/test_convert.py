"""Converting: what stands under the destination's name is always complete, whatever happens on the way."""

import errno
import itertools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers

import hugging_face_models as models
from funnel_engine.checkpoints import convert as convert_module
from funnel_engine.checkpoints.convert import convert
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_engine.inspection import inspect_checkpoint
from funnel_kernels import CheckpointError, ConfigError
from tiny_models import make_tokenizer


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    """Two models of one architecture with different weights."""
    directory = tmp_path_factory.mktemp("sources")
    for name, seed in (("first", 1), ("second", 2)):
        models.build(transformers.GemmaModel, models.gemma(), seed=seed).save_pretrained(directory / name)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"seed{seed}"])
        tokenizer.save(str(directory / name / "tokenizer.json"))
    return directory / "first", directory / "second"


@pytest.fixture
def source(sources) -> Path:
    return sources[0]


def embedding(path: Path) -> np.ndarray:
    return np.array(read_checkpoint(path).weights["embedding"], np.float32)


def contents(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_float16_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match=r"float16.*overflows"):
        convert(source, tmp_path / "ours", dtype="float16")
    with pytest.raises(ConfigError, match="dtype='int4' is not supported here; choose one of float32, bfloat16, int8"):
        convert(source, tmp_path / "ours", dtype="int4")
    assert contents(tmp_path) == []


def test_existing_destination_is_refused(sources, tmp_path):
    first, second = sources
    convert(first, tmp_path / "ours")
    before = embedding(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"exists.*overwrite"):
        convert(second, tmp_path / "ours")
    np.testing.assert_array_equal(embedding(tmp_path / "ours"), before)


def test_overwrite(sources, tmp_path):
    first, second = sources
    convert(first, tmp_path / "ours")
    opened = read_checkpoint(tmp_path / "ours")  # as an engine that still runs on it would have
    convert(second, tmp_path / "ours", overwrite=True)
    convert(second, tmp_path / "fresh", overwrite=True)
    assert contents(tmp_path) == ["fresh", "ours"]
    np.testing.assert_array_equal(embedding(tmp_path / "ours"), embedding(tmp_path / "fresh"))
    old = np.array(opened.weights["embedding"], np.float32)
    assert not np.array_equal(old, embedding(tmp_path / "ours"))
    assert "seed2" in read_checkpoint(tmp_path / "ours").tokenizer_file.read_text()


def test_only_a_checkpoint_is_overwritten(source, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("home", "file"):
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            convert(source, tmp_path / name, overwrite=True)
    assert contents(tmp_path / "home") == ["thesis.txt"]


def test_source_and_destination_in_each_other(source, tmp_path):
    shutil.copytree(source, tmp_path / "models" / "gemma")
    inside = tmp_path / "models" / "gemma"
    for destination in (inside / "ours", inside, tmp_path / "models", inside / ".." / "gemma" / "ours"):
        with pytest.raises(CheckpointError, match="overlap"):
            convert(inside, destination, overwrite=True)
    assert contents(inside) == contents(source)


def test_destination_in_no_directory(source, tmp_path):
    with pytest.raises(CheckpointError, match="make it first"):
        convert(source, tmp_path / "none" / "ours")


@pytest.mark.parametrize("path", [None, 3, "a\0b", "x" * 300, "x/" * 3000, b"bytes"], ids=lambda path: f"{path!r:.12}")
def test_what_is_no_path(source, tmp_path, path):
    for call in (
        lambda: convert(path, tmp_path / "ours"),
        lambda: convert(source, path),
        lambda: inspect_checkpoint(path),
        lambda: read_checkpoint(path),
    ):
        try:
            facts = call()
        except CheckpointError as error:
            message = str(error)
        else:
            message = facts["problems"][0]
        assert "cannot be used as a path" in message
    assert contents(tmp_path) == []


def test_relative_paths(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source.parent)
    convert("first", "../ours")
    read_checkpoint("../ours")
    assert "first" in contents(source.parent)
    shutil.rmtree(source.parent.parent / "ours")


def test_too_little_room_is_known_before(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 7, 7))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB, but 0\.00 GB are free"):
        convert(source, tmp_path / "ours")
    assert contents(tmp_path) == []


def test_disk_full_while_writing(sources, tmp_path):
    """The kernel refuses every byte beyond 10,000 of a file, as a full disk would; then there is room again."""
    first, second = sources
    convert(first, tmp_path / "ours")
    before = embedding(tmp_path / "ours")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        for destination in (tmp_path / "new", tmp_path / "ours"):
            with pytest.raises(CheckpointError, match=r"cannot write .*Free some space"):
                convert(second, destination, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == ["ours"]
    np.testing.assert_array_equal(embedding(tmp_path / "ours"), before)
    convert(second, tmp_path / "ours", overwrite=True)
    assert not np.array_equal(embedding(tmp_path / "ours"), before)


@pytest.mark.parametrize(("call", "error"), [("mkdir", errno.EROFS), ("fsync", errno.ENOSPC), ("rename", errno.EIO)])
def test_failing_disk(source, tmp_path, monkeypatch, call, error):
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=os.strerror(error)):
            convert(source, tmp_path / "ours")
    assert contents(tmp_path) == []


def test_old_checkpoint_comes_back_if_the_new_one_cannot_be_renamed(sources, tmp_path, monkeypatch):
    first, second = sources
    convert(first, tmp_path / "ours")
    before = embedding(tmp_path / "ours")
    rename = os.rename

    def fail_on_new(old: Path, new: Path) -> None:
        if Path(old).name == "new":
            raise OSError(errno.EIO, "broken disk")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail_on_new)
    with pytest.raises(CheckpointError, match="broken disk"):
        convert(second, tmp_path / "ours", overwrite=True)
    assert contents(tmp_path) == ["ours"]
    np.testing.assert_array_equal(embedding(tmp_path / "ours"), before)


def test_two_conversions_to_one_place(sources, tmp_path, monkeypatch):
    """The one that is ready first stays; the other says what happened."""
    first, second = sources
    write = convert_module.write_checkpoint

    def write_while_another_comes_first(*arguments, **options) -> None:
        monkeypatch.setattr(convert_module, "write_checkpoint", write)
        write(*arguments, **options)
        convert(first, tmp_path / "ours")

    monkeypatch.setattr(convert_module, "write_checkpoint", write_while_another_comes_first)
    with pytest.raises(CheckpointError, match="made by another conversion in the meantime"):
        convert(second, tmp_path / "ours")
    assert contents(tmp_path) == ["ours"]
    assert "seed1" in read_checkpoint(tmp_path / "ours").tokenizer_file.read_text()


def test_interrupt_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "publish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "ours")
    assert contents(tmp_path) == []


def test_running_conversion_is_left_alone(source, tmp_path):
    """Only a directory that no living process holds is removed, and only of the same destination."""
    dead, other = tmp_path / ".ours.converting-dead", tmp_path / ".theirs.converting-dead"
    dead.mkdir()
    other.mkdir()
    with convert_module.staging_directory(tmp_path / "ours") as running:
        (running / "half").write_text("half")
        convert(source, tmp_path / "ours")
        assert not dead.exists()
        assert contents(running) == ["half"]
    assert contents(tmp_path) == [other.name, "ours"]


def test_the_old_checkpoint_comes_back_after_a_kill_between_the_renames(sources, tmp_path, monkeypatch):
    """Whatever becomes of the next conversion."""
    first, second = sources
    convert(first, tmp_path / "ours")
    left = tmp_path / ".ours.converting-dead"
    left.mkdir()
    (tmp_path / "ours").rename(left / "old")
    shutil.copytree(left / "old", left / "new")
    with pytest.raises(CheckpointError, match=r"ours exists.*overwrite"):
        convert(second, tmp_path / "ours")
    assert contents(tmp_path) == ["ours"]
    assert "seed1" in read_checkpoint(tmp_path / "ours", verify=True).tokenizer_file.read_text()


# A process that converts again and again, each time in a child that is killed at a later file operation, until one
# child comes through. After each it prints what a reader finds, and whether converting again succeeds.
KILLED = """
import os, signal, sys
from pathlib import Path
from funnel_engine.checkpoints.convert import convert
from funnel_engine.checkpoints.native import read_checkpoint
from funnel_kernels import CheckpointError

first, second, place = map(Path, sys.argv[1:4])
overwrite = sys.argv[4] == "overwrite"
destination = place / "ours"

def seed(path):
    try:
        return "second" if "seed2" in read_checkpoint(path, verify=True).tokenizer_file.read_text() else "first"
    except CheckpointError:
        return "none"

def watched(path):
    return path.startswith((str(place), str(second)))

def run_and_die(moment):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        if event.startswith(("open", "os.", "shutil.")) and arguments and watched(str(arguments[0])):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    convert(second, destination, overwrite=overwrite)
    os._exit(0)

moment = 0
while True:
    moment += 1
    if overwrite:
        convert(first, destination, overwrite=True)
    child = os.fork()
    if child == 0:
        run_and_die(moment)
    _, status = os.waitpid(child, 0)
    found = seed(destination)
    exists = destination.exists()
    convert(second, destination, overwrite=True)
    names = ",".join(sorted(path.name for path in place.iterdir()))
    print(os.WTERMSIG(status), exists, found, seed(destination), names, sep="|", flush=True)
    if status == 0:
        break
    if not overwrite:
        import shutil
        shutil.rmtree(destination)
"""


@pytest.mark.parametrize("mode", ["new", "overwrite"])
def test_killed_at_any_moment(sources, tmp_path, mode):
    first, second = sources
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(first), str(second), str(tmp_path), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    *killed, last = [line.split("|") for line in done.stdout.splitlines()]
    assert last == ["0", "True", "second", "second", "ours"]
    assert len(killed) > 40  # between any two tensors, too
    whole = {"new": {"second"}, "overwrite": {"first", "second"}}[mode]
    for signal, exists, found, again, names in killed:
        assert signal == "9"
        assert found in whole if exists == "True" else found == "none"
        assert (again, names) == ("second", "ours")
    assert {found for _, _, found, _, _ in killed} == whole | {"none"}


def test_progress_on_a_terminal_only(source, tmp_path, capsys, monkeypatch):
    convert(source, tmp_path / "ours")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    convert(source, tmp_path / "again")
    output = capsys.readouterr()
    assert output.out == ""
    assert "Converting to bfloat16" in output.err


def test_manifest_is_written_last(source, tmp_path, monkeypatch):
    """A directory without it is no checkpoint, so a copy that was cut short cannot be taken for one."""
    before = []

    def note(path: Path, text: str) -> None:
        before.extend(contents(path.parent))
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_text", note)
    with pytest.raises(CheckpointError, match="full"):
        convert(source, tmp_path / "ours")
    assert before == ["tokenizer.json", "weights.safetensors"]


# A process that converts and prints the most memory that it ever held, before and after, in bytes.
MEASURED = """
import resource, sys
from funnel_engine import convert

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
convert(sys.argv[1], sys.argv[2])
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_holds_pieces_not_tensors(tmp_path):
    """An embedding table of 320 MB costs the process less than 40 MB beyond what it needs to start.

    The file is all holes, so that it takes no room on the disk; nobody looks at its values.
    """
    source = tmp_path / "source"
    config = models.gemma(vocab_size=320_000, hidden_size=250, num_attention_heads=2, num_key_value_heads=1)
    config.save_pretrained(source)
    fields = json.loads((source / "config.json").read_text()) | {"architectures": ["GemmaModel"]}
    (source / "config.json").write_text(json.dumps(fields))
    shapes = {name: tuple(value.shape) for name, value in transformers.GemmaModel(config).state_dict().items()}
    ends = itertools.accumulate(4 * math.prod(shape) for shape in shapes.values())
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [end - 4 * math.prod(shape), end]}
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + sum(4 * math.prod(shape) for shape in shapes.values()))
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(source), str(tmp_path / "ours")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before < 40e6


@pytest.mark.parametrize("flag", ["overwrite", "allow_nonfinite"])
def test_a_flag_is_true_or_false(tmp_path, flag):
    with pytest.raises(ConfigError, match=f"{flag}='no' must be True or False"):
        convert(tmp_path / "source", tmp_path / "ours", **{flag: "no"})
