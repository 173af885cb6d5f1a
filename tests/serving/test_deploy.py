"""The deployment files name ports, paths, options and variables that the server has, and leave it the time it needs."""

import dataclasses
import re
import tomllib

import pytest
import yaml

from c_library import ROOT
from funnel_serving.app import HEALTH
from funnel_serving.settings import Settings, variable_name

DEPLOY = ROOT / "serving" / "deploy"
VARIABLES = {variable_name(field.name): field for field in dataclasses.fields(Settings)}
VARIABLE = re.compile(r"FUNNEL_SERVE_[A-Z_]+")
CHECKPOINT = ROOT / "checkpoint"


def text(name):
    return (DEPLOY / name).read_text(encoding="utf-8")


def environment():
    """The variables of serve.env, as systemd and Docker read them."""
    lines = [line for line in text("serve.env").splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def kubernetes():
    return {part["kind"]: part for part in yaml.safe_load_all(text("kubernetes.yaml"))}


@pytest.mark.parametrize("file", sorted(DEPLOY.iterdir()), ids=lambda file: file.name)
def test_every_variable_is_one_of_the_server(file):
    found = set(VARIABLE.findall(file.read_text(encoding="utf-8")))
    assert found <= set(VARIABLES)


def test_samples_are_settings():
    from_file = Settings.read(CHECKPOINT, {}, {}, DEPLOY / "serve.toml")
    from_variables = Settings.read(CHECKPOINT, {}, environment())
    assert str(from_file.funnel) == "6:2/mean"
    assert dataclasses.replace(from_file, funnel=None) == from_variables
    given = tomllib.loads(text("serve.toml"))
    changed = {"model_name", "funnel"}
    assert {name: value for name, value in given.items() if name not in changed} == {
        field.name: field.default for field in dataclasses.fields(Settings) if field.name in given.keys() - changed
    }, "the sample shows the defaults"


def test_kubernetes_asks_the_servers_paths_and_gives_it_time(kubernetes):
    settings = Settings.read(CHECKPOINT, {}, kubernetes["ConfigMap"]["data"])
    pod = kubernetes["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == settings.port
    assert kubernetes["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    for probe, path in (("readinessProbe", "/health/ready"), ("livenessProbe", "/health/live")):
        assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
        assert path in HEALTH
    *_, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    needed = int(pause) + settings.grace_seconds + settings.drain_seconds
    assert pod["terminationGracePeriodSeconds"] >= needed + 10
    assert str(settings.threads) == container["resources"]["requests"]["cpu"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert f'"serve", "{mounts[0]}"' in text("Dockerfile")


def test_systemd_gives_the_server_time():
    unit = dict(line.split("=", 1) for line in text("funnel-serve.service").splitlines() if re.match(r"\w+=", line))
    settings = Settings.read(CHECKPOINT, {}, environment())
    assert int(unit["TimeoutStopSec"]) >= settings.grace_seconds + settings.drain_seconds + 10
    assert re.search(r"bin/funnel serve /\S+$", unit["ExecStart"])


def test_the_image_listens_where_it_says():
    lines = text("Dockerfile")
    assert f"EXPOSE {Settings(checkpoint=CHECKPOINT).port}\n" in lines
    assert 'ENTRYPOINT ["funnel", "serve", "/checkpoint"]' in lines
    for extra in re.findall(r"\[([a-z,]+)\]\"", lines):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        assert set(extra.split(",")) <= set(extras)
