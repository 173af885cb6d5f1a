"""The page at /: who gets it, what its numbers are, and the vectors without a funnel; then in a browser."""

import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.testclient import TestClient

from funnel_engine import FunnelConfig
from funnel_engine.text import JsonTokenizer
from funnel_serving import page
from funnel_serving.app import App
from funnel_serving.health import Health
from funnel_serving.metrics import Metrics
from funnel_serving.page import HTML, SCRIPT, STYLE, source
from funnel_serving.server import Server
from funnel_serving.service import Service
from funnel_serving.settings import Settings
from running_server import client, running, wait_for
from serving_apps import listening
from tiny_models import TEXT, make_engine, make_tokenizer

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
POLICY = page.HEADERS["content-security-policy"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
KEY = "a-key-of-this-server"
TEXTS = {"inputs": {"source_sentence": "a small funnel pools pairs", "sentences": ["tokens of a funnel", "a"]}}


def make_tiny(folder: Path, funnel: FunnelConfig):
    file = folder / "tokenizer.json"
    make_tokenizer().save(str(file))
    return make_engine(tokenizer=JsonTokenizer(file), text=TEXT, max_batch_tokens=16, funnel=funnel)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = make_tiny(tmp_path_factory.mktemp("tokenizer"), FunnelConfig.after(1))
    engine.warmup(progress=False)
    return engine


@pytest.fixture(scope="module")
def server(engine):
    with running(engine) as server:
        yield server


@pytest.fixture(scope="module")
def without_funnel(engine):
    return engine.with_funnel(FunnelConfig()).embed([TEXTS["inputs"]["source_sentence"], *TEXTS["inputs"]["sentences"]])


def loading(**options) -> Service:
    """A service whose model is not loaded yet."""
    return Service(Settings(checkpoint=Path("tiny"), **options), Metrics(), Health())


class Attributes(HTMLParser):
    """All attributes of the tags of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found += attrs


def test_a_browser_gets_the_page_and_other_clients_the_alias(server):
    with client(server) as asking:
        reply = asking.get("/", headers=BROWSER)
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert reply.text == HTML
        assert asking.get("/").status_code == 405
        assert (
            asking.post("/", json={"inputs": "a"}, headers=BROWSER).json()
            == asking.post("/embed", json={"inputs": "a"}).json()
        )


def test_its_policy_lets_nothing_run_but_its_own_style_and_script(server):
    with client(server) as asking:
        policy = asking.get("/", headers=BROWSER).headers["content-security-policy"]
    sources = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert sources["default-src"] == sources["frame-ancestors"] == "'none'"
    assert (sources["style-src"], sources["script-src"]) == (source(STYLE), source(SCRIPT))
    (script,), (style,) = (re.findall(f"<{tag}>(.*?)</{tag}>", HTML, re.S) for tag in ("script", "style"))
    assert (source(script), source(style)) == (sources["script-src"], sources["style-src"])
    attributes = Attributes(HTML).found
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("style", "src", "action")]
    assert [value for name, value in attributes if name == "href"] == ["data:,"]
    assert "://" not in SCRIPT + STYLE


def test_the_snapshot_has_the_engines_own_facts_and_the_counters(server, engine):
    with client(server) as asking:
        before = asking.get("/page.json").json()
        for _ in range(3):
            asking.post("/embed", json={"inputs": ["a small funnel", "tokens"]})
        asking.post("/embed", json={"inputs": []})
        after = asking.get("/page.json").json()
    assert after["status"] == {"status": "ready"}
    model = after["model"]
    assert model["funnel"] == str(engine.funnel)
    assert model["backends"] == engine.backends()
    assert "attention" in model["backends"]
    for name in ("model", "funnel", "head", "devices", "buckets"):
        assert model["facts"][name] == engine.facts()[name]
    assert model["limits"]["input"].startswith(f"{engine.max_length} tokens")
    old, new = before["numbers"], after["numbers"]
    grown = {name: new[name] - old[name] for name in ("requests", "failures", "sequences", "tokens")}
    assert grown == {"requests": 3, "failures": 1, "sequences": 6, "tokens": 3 * 6}
    assert new["seconds"] > old["seconds"]
    for part, counts in new["latency"].items():
        assert len(counts) == len(new["bounds"]) + 1
        assert counts[-1] - old["latency"][part][-1] == 3
        assert counts == sorted(counts)


def test_vectors_without_a_funnel_are_those_of_the_same_weights(server, engine, without_funnel):
    with client(server) as asking:
        found = asking.post("/page/similarity", json=TEXTS).json()
        funneled = asking.post("/similarity", json=TEXTS).json()
    np.testing.assert_allclose(found, without_funnel[1:] @ without_funnel[0], atol=1e-5)
    assert np.abs(np.array(found) - funneled).max() > 1e-3


def test_what_is_compiled_for_the_comparison_is_not_counted_as_too_much(engine):
    with running(engine) as server, client(server) as asking:
        assert asking.post("/page/similarity", json=TEXTS).status_code == 200
        assert asking.get("/page.json").json()["numbers"]["compilations_after_warmup"] == 0
        assert server.service._unfunneled._unfunneled.stats()["compilations"] > 0


def test_the_comparison_takes_one_call_at_a_time_and_keeps_the_deadline(engine):
    gate = threading.Event()
    with running(engine, request_seconds=0.5) as server, client(server) as asking:
        service = server.service
        embed = service._unfunneled._embed
        service._unfunneled._embed = lambda texts: gate.wait(60) and embed(texts)
        late = asking.post("/page/similarity", json=TEXTS)
        busy = asking.post("/page/similarity", json=TEXTS)
        gate.set()
        assert (late.status_code, busy.status_code, busy.headers["retry-after"]) == (504, 429, "1")
        service._unfunneled._embed = embed
        service._unfunneled._running.result(60)
        wait_for(lambda: asking.post("/page/similarity", json=TEXTS).status_code == 200)


def test_long_texts_are_cut_and_wrong_ones_are_refused(server):
    with client(server) as asking:
        long = {"inputs": {"source_sentence": "a " * 100, "sentences": ["a " * 50]}}
        np.testing.assert_allclose(asking.post("/page/similarity", json=long).json(), [1.0], atol=1e-5)
        for body in ({}, {"inputs": "a"}, {"inputs": {"source_sentence": "a", "sentences": []}}):
            assert asking.post("/page/similarity", json=body).status_code in (400, 422)


def test_it_says_why_there_is_nothing_to_compare(engine, tmp_path):
    for served, options, reason in (
        (engine, {"compare_funnel": False}, "--no-compare-funnel"),
        (make_tiny(tmp_path, FunnelConfig()), {}, "without a funnel"),
    ):
        with running(served, **options) as server, client(server) as asking:
            assert reason in asking.get("/page.json").json()["model"]["no_comparison"]
            refused = asking.post("/page/similarity", json=TEXTS)
            assert refused.status_code == 424
            assert reason in refused.json()["error"]


def test_while_it_loads_the_page_is_there_and_knows_the_progress():
    service = loading()
    asking = TestClient(App(service))
    assert asking.get("/", headers=BROWSER).text == HTML
    service.health.state, service.health.compiled, service.health.programs = "compiling", 3, 8
    snapshot = asking.get("/page.json").json()
    assert snapshot["status"] == {"status": "compiling", "compiled": 3, "programs": 8}
    assert snapshot["model"] is None
    assert asking.post("/page/similarity", json=TEXTS).status_code == 503


def test_with_keys_only_the_empty_page_is_open():
    asking = TestClient(App(loading(api_keys=(KEY,))))
    assert asking.get("/", headers=BROWSER).status_code == 200
    assert asking.post("/", json={"inputs": "a"}, headers=BROWSER).status_code == 401
    assert asking.get("/page.json").status_code == 401
    assert asking.post("/page/similarity", json=TEXTS).status_code == 401
    assert asking.get("/page.json", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.fixture
def browse(tmp_path, monkeypatch):
    """A function that opens the page of a server in a browser, and lets a person act on it.

    It returns the page after some seconds, and the lines of the console.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")

    def browse(server: Server, person: str = "", width: int = 1280) -> tuple[str, list[str]]:
        script = f"{SCRIPT}\nsetTimeout(() => {{ {person} }}, 3000);"
        monkeypatch.setattr(page, "HTML", HTML.replace(SCRIPT, script))
        policy = POLICY.replace(source(SCRIPT), source(script))
        monkeypatch.setitem(page.HEADERS, "content-security-policy", policy)
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--window-size={width},900",
            "--virtual-time-budget=9000",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
        )
        command, home = [browser, *options, f"http://127.0.0.1:{server.port}/"], {"HOME": str(tmp_path)}
        run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, env=home)
        return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]

    return browse


def shown(html: str, name: str) -> str:
    """The text inside the element of this id."""
    (found,) = re.findall(rf'<(\w+) id="{name}"[^>]*>(.*?)</\1>', html, re.S)
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", found[1]))


@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_the_model_and_its_numbers(server, engine, browse, width):
    with client(server) as asking:
        for _ in range(5):
            asking.post("/embed", json={"inputs": ["a small funnel", "tokens"]})
    measure = "document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;"
    html, console = browse(server, measure, width)
    assert console == []
    assert int(re.findall(r'data-overflow="(-?\d+)"', html)[0]) <= 0
    assert (shown(html, "name"), shown(html, "state")) == ("tiny", "ready")
    assert str(engine.funnel) in shown(html, "funnel")
    for name, backend in engine.backends().items():
        assert f"{name} {backend.split(';')[0]}" in shown(html, "backends")
    assert " ms" in shown(html, "latency")
    assert re.search(r"^\d+ requests since the start$", shown(html, "latency-of"))
    assert "rows in the queue 0" in shown(html, "tiles")


def test_a_browser_compares_two_texts(server, browse):
    with client(server) as asking:
        cosines = [asking.post(path, json=TEXTS).json()[0] for path in ("/similarity", "/page/similarity")]
    texts = (TEXTS["inputs"]["source_sentence"], TEXTS["inputs"]["sentences"][0])
    fill = "".join(f'at("{name}").value = "{text}";' for name, text in zip(("first", "second"), texts, strict=True))
    html, console = browse(server, fill + 'at("texts").requestSubmit();')
    assert console == []
    funneled, other = re.findall(r"cosine (-?[\d.]+)", shown(html, "cosines"))
    np.testing.assert_allclose([float(funneled), float(other)], cosines, atol=1e-4)


def test_a_browser_asks_for_the_key_and_sends_it(engine, browse):
    with running(engine, api_keys=(KEY,)) as server:
        html, _ = browse(server)
        assert shown(html, "state") == "needs a key"
        assert '<form id="key-form" class="panel">' in html
        assert '<main id="shown" hidden="">' in html
        html, _ = browse(server, f'at("key").value = " {KEY} "; at("key-form").requestSubmit();')
        assert '<form id="key-form" class="panel" hidden="">' in html
        assert shown(html, "state") == "ready"


def test_a_browser_shows_how_far_the_model_is_loaded(browse):
    service = loading()
    service.health.state, service.health.compiled, service.health.programs = "compiling", 3, 8
    with listening(App(service)) as address:
        html, console = browse(SimpleNamespace(port=address.rpartition(":")[2]))
    assert console == []
    assert shown(html, "state") == "compiling: 3 of 8 programs"
    assert re.search(r'<progress id="progress" aria-label="[^"]*" max="8" value="3">', html)
