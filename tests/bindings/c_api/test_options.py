"""What `funnel_open` takes and refuses: structs of other sizes, options in JSON, checkpoints, interpreters."""

import ctypes
import json
import os
import re
import shutil

import numpy as np
import pytest

from c_library import IDS, OFFSETS, Info, Options, Refused, refusal
from funnel_engine import Engine, FunnelConfig, c_host


def test_options_reach_the_engine(library, checkpoints):
    options = {
        "dtype": "bfloat16",
        "attention": "causal",
        "pooling": "last",
        "max_batch_tokens": 14,
        "backend": "xla",
        "verify": True,
        "funnel": {"strides": [1, 2], "pool": "mean", "positions": "last", "keep_last": True},
    }
    handle = library.open(checkpoints["plain"], json.dumps(options))
    funnel = FunnelConfig((1, 2), pool="mean", positions="last", keep_last=True)
    engine = Engine.load(checkpoints["plain"], **(options | {"funnel": funnel}))
    np.testing.assert_array_equal(library.embed(handle), engine.embed((IDS, OFFSETS)))
    info = Info(ctypes.sizeof(Info))
    library.call("get_info", handle, ctypes.byref(info))
    assert info.max_length == 14
    library.close(handle)


def test_a_funnel_may_be_a_short_form(library, checkpoints):
    handle = library.open(checkpoints["plain"], json.dumps({"max_batch_tokens": 16, "funnel": "1:2/mean"}))
    engine = Engine.load(checkpoints["plain"], funnel=FunnelConfig((1, 2), pool="mean"), max_batch_tokens=16)
    np.testing.assert_array_equal(library.embed(handle), engine.embed((IDS, OFFSETS)))
    library.close(handle)
    by_length = [[0, None], [4, "1:2/mean"]]
    for funnel in (by_length, "0=none+4=1:2/mean"):
        handle = library.open(checkpoints["plain"], json.dumps({"max_batch_tokens": 16, "funnel": funnel}))
        engine = Engine.load(checkpoints["plain"], funnel=by_length, max_batch_tokens=16)
        np.testing.assert_array_equal(library.embed(handle), engine.embed((IDS, OFFSETS)))
        library.close(handle)
    with refusal(r"CONFIG: funnel\[0\]=7 must be a pair"):
        library.open(checkpoints["plain"], json.dumps({"funnel": [7]}))
    with refusal("CONFIG: funnel '1-2': '1-2' must be LAYER:STRIDE"):
        library.open(checkpoints["plain"], json.dumps({"funnel": "1-2"}))


@pytest.mark.parametrize("size", [0, 8, 12, 23, 33, 40, 2**64 - 1])
def test_unknown_struct_sizes(library, plain, checkpoints, size):
    with refusal(rf"INVALID_ARGUMENT: funnel_options.struct_size is {size}, .* 32 here"):
        library.open(checkpoints["plain"], struct_size=size)
    info = Info(size, 5, 5, 5, 5, 5)
    with refusal(rf"INVALID_ARGUMENT: funnel_info.struct_size is {size}, "):
        library.call("get_info", plain, ctypes.byref(info))
    assert info.embedding_size == info.task == 5


def test_the_options_of_an_older_header_get_defaults(library, checkpoints):
    """What lies beyond their size is not read."""
    handle = library.open(checkpoints["plain"], struct_size=24, options="not JSON")
    library.close(handle)
    library.close(library.open(checkpoints["plain"], struct_size=16, options="not JSON", python=b"no Python"))
    library.close(library.open(checkpoints["plain"], options=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{", "CONFIG: options are not JSON"),
        ("", "CONFIG: options are not JSON: .*, or NULL for the defaults"),
        ('{"threads": ' + "[" * 100_000, "CONFIG: options are not JSON: maximum recursion depth"),
        ('{"threads": 1000000}', "CONFIG: threads=1000000 must be an integer from 1 to 1024"),
        ("[]", r"CONFIG: options must be a JSON object with some of funnel, backend, .*; it is \[\]"),
        ('{"beam": 4}', "CONFIG: options has the unknown name 'beam'; choose from funnel, backend, dtype"),
        ('{"path": "x"}', "CONFIG: options has the unknown name 'path'"),
        ('{"mesh": [2]}', "CONFIG: options has the unknown name 'mesh'"),
        ('{"funnel": 2}', "CONFIG: funnel must be a JSON object with some of strides, pool, .*; it is 2"),
        ('{"funnel": {"stride": 2}}', "CONFIG: funnel has the unknown name 'stride'; choose from strides, pool"),
        ('{"funnel": {"strides": [0]}}', r"CONFIG: strides\[0\]=0 must be"),
        ('{"max_batch_tokens": "many"}', "CONFIG: max_batch_tokens='many' must be"),
        ('{"dtype": "float16"}', "CONFIG: dtype 'float16' is refused"),
        ('{"backend": "abacus"}', "BACKEND_UNAVAILABLE: backend 'abacus' does not exist"),
    ],
)
def test_options_that_the_engine_refuses(library, checkpoints, options, message):
    with refusal(f"{message}"):
        library.open(checkpoints["plain"], options)


@pytest.mark.parametrize("name", c_host.ENGINE_OPTIONS)
@pytest.mark.parametrize("value", ["[1]", '{"a": 1}', "1.5", '""', "1e999", "-1", f"{'[' * 500}{']' * 500}"])
def test_options_of_the_wrong_type_are_not_internal_errors(library, checkpoints, name, value):
    with pytest.raises(Refused) as refused:
        library.open(checkpoints["plain"], f'{{"{name}": {value}}}')
    assert re.match("CONFIG|BACKEND_UNAVAILABLE", str(refused.value)), refused.value


@pytest.mark.parametrize("name", ["tpu", "triton"])
def test_a_backend_that_does_not_run_here(library, checkpoints, name):
    with refusal(f"BACKEND_UNAVAILABLE: .*{name}"):
        library.open(checkpoints["plain"], f'{{"backend": "{name}"}}')


def test_options_that_are_not_utf8(library, checkpoints):
    given = Options(ctypes.sizeof(Options), os.fsencode(checkpoints["plain"]), None, b'{"\xff": 1}')
    with refusal("CONFIG: options are not JSON: .*utf-8"):
        library.call("open", ctypes.byref(given), ctypes.byref(ctypes.c_void_p()))


def test_checkpoints_that_cannot_be_loaded(library, checkpoints, tmp_path):
    with refusal("CHECKPOINT: .*nowhere.* is not a checkpoint of this engine"):
        library.open(tmp_path / "nowhere")
    shutil.copytree(checkpoints["plain"], tmp_path / "cut")
    weights = tmp_path / "cut" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with refusal("CHECKPOINT: .*weights.safetensors is truncated"):
        library.open(tmp_path / "cut")


def test_a_host_that_runs_python_cannot_be_given_another(library, checkpoints):
    with refusal("INVALID_ARGUMENT: python is /usr/bin/python3, but .* was started by the host"):
        library.open(checkpoints["plain"], python=b"/usr/bin/python3")
