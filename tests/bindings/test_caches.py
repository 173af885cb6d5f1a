"""The sizes of caches, which tiles follow: as Linux says them, and what is taken where it does not."""

import pytest

import funnel_native

KB, MB = 2**10, 2**20
FALLBACK = {"core": MB, "shared": 32 * MB}


@pytest.fixture
def sizes(tmp_path):
    """What is read where Linux has caches [(level, type, size), ...]."""

    def read(*caches: tuple[str, str, str]) -> dict[str, int]:
        for index, facts in enumerate(caches):
            folder = tmp_path / f"index{index}"
            folder.mkdir()
            for name, fact in zip(("level", "type", "size"), facts, strict=True):
                (folder / name).write_text(f"{fact}\n")
        return funnel_native.handlers().caches(str(tmp_path))

    return read


@pytest.mark.parametrize(("core", "shared"), [("512K", "4096K"), ("1280K", "30720K"), ("2048K", "65536K")])
def test_the_caches_of_a_machine(sizes, core, shared):
    found = sizes(("1", "Data", "32K"), ("1", "Instruction", "48K"), ("2", "Unified", core), ("3", "Unified", shared))
    assert found == {"core": int(core[:-1]) * KB, "shared": int(shared[:-1]) * KB}


def test_a_machine_that_says_nothing(sizes):
    assert sizes() == FALLBACK


def test_a_machine_without_a_shared_cache(sizes):
    assert sizes(("1", "Data", "32K"), ("2", "Unified", "512K")) == {"core": 512 * KB, "shared": 32 * MB}


@pytest.mark.parametrize("size", ["", "K", "0K", "-512K", "2048", "2M", "two", "99999999999999999999K", "\0\xff"])
def test_sizes_that_are_none(sizes, size):
    assert sizes(("2", "Unified", size), ("3", "Unified", size)) == FALLBACK


def test_caches_that_are_none_of_these(sizes):
    assert sizes(("2", "Instruction", "512K"), ("4", "Unified", "8192K"), ("two", "Unified", "512K")) == FALLBACK


def test_sizes_that_no_processor_has_are_brought_into_range(sizes):
    assert sizes(("2", "Unified", "16K"), ("3", "Unified", "16K")) == {"core": 512 * KB, "shared": 4 * MB}


def test_sizes_of_caches_of_all_cores_are_brought_into_range(sizes):
    found = sizes(("2", "Unified", "9000000000000000000K"), ("3", "Unified", "1048576K"))
    assert found == {"core": 2 * MB, "shared": 64 * MB}


def test_this_machine():
    found = funnel_native.handlers().caches()
    assert 512 * KB <= found["core"] <= 2 * MB
    assert 4 * MB <= found["shared"] <= 64 * MB
