"""Settings: one declaration, three sources, and errors that name value, limit and remedy."""

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from funnel_engine import ConfigError, FunnelConfig
from funnel_serving import serve_command
from funnel_serving.settings import Settings

NAMES = [field.name for field in dataclasses.fields(Settings) if field.name != "checkpoint"]


def read(options=(), environment=(), content=None, tmp_path=None):
    file = None
    if content is not None:
        file = tmp_path / "serve.toml"
        file.write_text(content)
    return Settings.read(Path("model"), dict(options), dict(environment), file)


def test_an_option_counts_before_a_variable_and_a_variable_before_the_file(tmp_path):
    content = 'port = 1\nhost = "a"\nthreads = 3\ntruncate = true\nfunnel = "1:2"\nbody_seconds = 0.5\n'
    environment = {"FUNNEL_SERVE_PORT": "2", "FUNNEL_SERVE_HOST": "b", "HOME": "/"}
    settings = read({"--port": "3"}, environment, content, tmp_path)
    assert (settings.port, settings.host, settings.threads, settings.truncate) == (3, "b", 3, True)
    assert (settings.funnel, settings.body_seconds) == (FunnelConfig.after(1), 0.5)
    assert settings.max_batch_tokens == 16384


def test_every_source_has_every_setting(tmp_path):
    text = CliRunner().invoke(serve_command.serve, ["--help"]).output
    for name in NAMES:
        assert f"--{name.replace('_', '-')}" in text
        with pytest.raises(ConfigError, match=f"^FUNNEL_SERVE_{name.upper()}"):
            read({}, {f"FUNNEL_SERVE_{name.upper()}": "\x00"})
        with pytest.raises(ConfigError, match=rf"^{name} in .*serve\.toml"):
            read({}, {}, f"{name} = []", tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--port", "70000", "--port='70000' must be an integer from 0 to 65535"),
        ("--port", "-1", "--port='-1' must be an integer from 0"),
        ("--threads", "٣", "must be an integer from 1"),
        ("--max-body-bytes", "1e6", "must be an integer from 1"),
        ("--request-seconds", "nan", "--request-seconds='nan' must be a number of seconds from 0.001 to 86400"),
        ("--request-seconds", "0", "must be a number of seconds"),
        ("--warmup", "some", "--warmup='some' is unknown; choose one of none, small, all"),
        ("--dtype", "float16", "choose one of"),
        ("--truncate", "maybe", "must be true or false"),
        ("--host", " ", "must be a text of printable characters"),
        ("--funnel", "x", "--funnel: "),
    ],
)
def test_a_wrong_value_is_named_with_its_limit(option, value, message):
    with pytest.raises(ConfigError, match=message):
        read({option: value})


def test_keys_are_several_and_never_shown(tmp_path):
    for given in ("abcdefgh,ijklmnop", ["abcdefgh", "ijklmnop"]):
        settings = read({"--api-keys": given})
        assert settings.api_keys == ("abcdefgh", "ijklmnop")
        assert "abcdefgh" not in repr(settings)
    for wrong in ("short", "with spaces in it", "", ["abcdefgh", 3], "abcdefgh,", "schlüssel1"):
        with pytest.raises(ConfigError, match="at least 8 visible ASCII characters") as error:
            read({"--api-keys": wrong})
        assert not wrong or str(wrong) not in str(error.value)


def test_unknown_names_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown settings: prot\. Known: host, port"):
        read({}, {}, "prot = 3", tmp_path)
    with pytest.raises(ConfigError, match="unknown environment variables: FUNNEL_SERVE_PROT"):
        read({}, {"FUNNEL_SERVE_PROT": "1"})
    with pytest.raises(ConfigError, match="is not TOML"):
        read({}, {}, "port = ", tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Settings.read(Path("model"), {}, {}, tmp_path / "none.toml")


def test_the_command_says_how_to_install_what_is_missing(monkeypatch):
    monkeypatch.setattr(serve_command, "PACKAGES", ("orjson", "no_such_package"))
    with pytest.raises(ConfigError, match=r"no_such_package is not installed; .* 'funnel-engine\[serve\]'"):
        CliRunner().invoke(serve_command.serve, ["model"], catch_exceptions=False)
