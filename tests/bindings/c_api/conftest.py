"""The C API, built, installed and moved once, and the checkpoints that its tests open."""

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

import tiny_models
from c_library import PROGRAMS, ROOT, Library, configure, run
from funnel_engine import Engine, FunnelConfig, FunnelTransformerConfig, HeadConfig
from funnel_engine.checkpoints.native import write_checkpoint
from funnel_engine.checkpoints.source import SourceModel
from funnel_engine.funnel_transformer_config import EncoderConfig
from funnel_engine.text import TextConfig
from funnel_engine.weights import random_weights

SERVER = ROOT / "examples" / "cpp_server"
HEADS = {
    "plain": HeadConfig(),
    "classifier": HeadConfig(task="classify", labels=("no", "yes", "maybe")),
    "tagger": HeadConfig(task="tag", labels=("O", "B", "I", "E"), classifier_bias=True),
}


TYPED = FunnelTransformerConfig(
    vocab_size=101,
    hidden_size=24,
    intermediate_size=40,
    num_heads=4,
    head_dim=8,
    block_sizes=(1, 1),
    block_repeats=(1, 1),
    decoder_layers=1,
    max_positions=64,
)  # its tokens have types
ANSWERS = HeadConfig(task="answer", labels=("start", "end"), classifier_bias=True)
TEXT = TextConfig(begin=2, prompts={"query": "pools ", "größe": "small "}, default_prompt_name="query")


def write_model(
    directory: Path,
    head: HeadConfig,
    text: TextConfig = TextConfig(),
    config: EncoderConfig = tiny_models.CONFIG,
    funnel: FunnelConfig = FunnelConfig(),  # noqa: B008
) -> None:
    """A checkpoint of a tiny model with random weights, and a tokenizer if there is anything to say about texts."""
    weights = {
        name: (SimpleNamespace(tensor=SimpleNamespace(path=directory / "none"), pieces=lambda array=array: [array]),)
        for name, array in random_weights(config, head, "float32", seed=7).items()
    }
    tokenizer = None
    if text != TextConfig():
        tokenizer = directory.with_suffix(".json")
        tiny_models.make_tokenizer().save(str(tokenizer))
    source = SourceModel("funnel", config, head, weights, {}, text, tokenizer, directory, funnel)
    write_checkpoint(directory, source, "float32")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    for name, head in HEADS.items():
        write_model(directory / name, head)
    write_model(directory / "texts", HeadConfig(), TEXT)
    blocks = TYPED.funnel(pool="mean", pool_query_only=True)
    write_model(directory / "answers", ANSWERS, config=TYPED, funnel=blocks)
    return {name: directory / name for name in (*HEADS, "texts", "answers")}


@pytest.fixture(scope="session")
def engines(checkpoints) -> dict[str, Engine]:
    return {name: Engine.load(path, max_batch_tokens=16) for name, path in checkpoints.items()}


class Built(NamedTuple):
    prefix: Path  # where libfunnel is installed, moved after the installation
    programs: Path
    server: Path
    call_time: Path


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def compile_once(compiled) -> Iterator[None]:
    """The processes that are started here share what they compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Built:
    """The library, the programs and the example server. Warnings are errors."""
    directory = tmp_path_factory.mktemp("build")
    library = configure(ROOT / "bindings" / "c_api", directory / "library", f"-DPython_EXECUTABLE={sys.executable}")
    run("cmake", "--build", library, "--target", "funnel", "funnel_call_time")
    run("cmake", "--install", library, "--prefix", directory / "first")
    prefix = directory / "installed"
    (directory / "first").rename(prefix)
    found = f"-DCMAKE_PREFIX_PATH={prefix}"
    example = re.search(r"```c\n(.*?)```", (ROOT / "docs" / "c-api.md").read_text(encoding="utf-8"), re.DOTALL)
    (directory / "documented.c").write_text(example[1])
    names = f"-DDOCUMENTED={directory / 'documented.c'}", f"-DSERVER={SERVER}", f"-DPython_EXECUTABLE={sys.executable}"
    programs = configure(PROGRAMS, directory / "programs", found, *names)
    run("cmake", "--build", programs)
    server = configure(SERVER, directory / "server", found)
    run("cmake", "--build", server)
    return Built(prefix, programs, server / "funnel_server", library / "funnel_call_time")


@pytest.fixture(scope="session")
def library(built) -> Library:
    return Library(built.prefix / "lib" / "libfunnel.so")


@pytest.fixture(scope="session")
def plain(library, checkpoints) -> ctypes.c_void_p:
    return library.open(checkpoints["plain"])


@pytest.fixture(scope="session")
def texts(library, checkpoints) -> ctypes.c_void_p:
    return library.open(checkpoints["texts"])


@pytest.fixture(scope="session")
def classifier(library, checkpoints) -> ctypes.c_void_p:
    return library.open(checkpoints["classifier"])


@pytest.fixture(scope="session")
def tagger(library, checkpoints) -> ctypes.c_void_p:
    return library.open(checkpoints["tagger"])


@pytest.fixture(scope="session")
def answers(library, checkpoints) -> ctypes.c_void_p:
    return library.open(checkpoints["answers"])
