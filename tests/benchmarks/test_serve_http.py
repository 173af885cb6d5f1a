"""`funnel bench serve --http` over real sockets with a tiny model; the client against a server that misbehaves.

Nothing here asserts a time.
"""

import asyncio
import contextlib
import copy
import importlib.util
import json
import socket
import sys
import threading

import numpy as np
import pytest
from click.testing import CliRunner

from funnel_benchmarks.results import figures, read_results
from funnel_benchmarks.serve import command, http_suite
from funnel_benchmarks.serve.connections import NO_REPLY
from funnel_benchmarks.serve.http_suite import FORMS, SHARES, Suite, describe_replies
from funnel_benchmarks.serve.load import Load, Replies
from funnel_benchmarks.serve.server_process import Server
from funnel_benchmarks.suite import row_line
from funnel_kernels.errors import ConfigError, FunnelError, InputError
from tiny_peers import MODELS

COUNT = 24
FUNNEL = "2:1 after 1"
SERVERS = ("no funnel", FUNNEL, "sentence-transformers behind FastAPI")


def invoke(*arguments: object):
    return CliRunner().invoke(command.serve, ["--http", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The content of a result file, and what the command printed; then again, resumed."""
    folder = tmp_path_factory.mktemp("http")
    (folder / "mine.txt").write_text("3\n5\n9\n")
    arguments = ["--depth", 2, "--lengths", folder / "mine.txt", "--requests", COUNT, "--max-batch-tokens", 16]
    arguments += ["--json", folder / "out.json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "model_fields", lambda preset, depth: MODELS["embeddinggemma"])
        patch.setattr(http_suite, "REPEATS", 1)
        patch.setattr(http_suite, "SEARCH_STEPS", 2)
        patch.setattr(
            http_suite, "find_spec", lambda name: None if name == "fastapi" else importlib.util.find_spec(name)
        )
        first = invoke(*arguments)
        assert first.exit_code == 0, first.output
        content = read_results(folder / "out.json")
        patch.setattr(http_suite, "Server", None)  # resuming starts none
        again = invoke(*arguments, "--resume")
    assert again.exit_code == 0, again.output
    assert str(folder) not in (folder / "out.json").read_text()
    return content, first.output, read_results(folder / "out.json")


def rows_with(content, field):
    return [row for row in content["rows"] if field in row]


def test_a_run_writes_every_cell_and_prints_a_line_for_each(run):
    content, output, _ = run
    assert (content["suite"], content["complete"], content["errors"]) == ("serve-http", True, [])
    assert [(row["server"], row["form"]) for row in rows_with(content, "form")] == [
        (server, form.name) for server in SERVERS[:2] for form in FORMS
    ]
    assert [row["server"] for row in rows_with(content, "overhead")] == list(SERVERS[:2])
    assert [(row["server"], row["share"]) for row in rows_with(content, "share")] == [
        (server, share) for server in SERVERS[:2] for share in SHARES
    ]
    for row in content["rows"]:
        assert f"\n{row['cell']}: " in output


def test_the_peer_is_left_out_with_the_reason_where_it_is_not_installed(run):
    left_out = [entry for entry in run[0]["left_out"] if SERVERS[2] in entry["cell"]]
    assert len(left_out) == 1 + len(FORMS) + len(SHARES) + 1
    assert left_out[0]["reason"] == "fastapi is not installed: pip install 'funnel-engine[peers]'"


def test_capacity_and_overhead_have_the_server_and_the_engine_side_by_side(run):
    for row in rows_with(run[0], "engine_seconds"):
        assert len(row["seconds"]["samples"]) == len(row["engine_seconds"]["samples"]) == 2
    for row in rows_with(run[0], "form"):
        assert row["texts"] == COUNT
        assert row["texts_per_second"] == pytest.approx(COUNT / row["seconds"]["median"], rel=1e-4)
        assert row["engine_texts_per_second"] == pytest.approx(COUNT / row["engine_seconds"]["median"], rel=1e-4)
    for row in rows_with(run[0], "overhead"):
        difference = row["seconds"]["median"] - row["engine_seconds"]["median"]
        assert row["overhead"] == pytest.approx(difference, abs=1e-5)


def test_requests_arrive_at_shares_of_the_capacity_with_single_texts(run):
    for row in rows_with(run[0], "share"):
        (single,) = [
            other
            for other in rows_with(run[0], "form")
            if (other["server"], other["form"]) == (row["server"], FORMS[2].name)
        ]
        assert row["arrivals_per_second"] == pytest.approx(row["share"] / 100 * single["texts_per_second"], rel=1e-4)
        assert row["statuses"] == {"200": COUNT}  # the queue has room for all
        assert row["latency"]["samples"] == sorted(row["latency"]["samples"])
        assert len(row["latency"]["samples"]) == COUNT
        assert row["p50"] <= row["p90"] <= row["p99"]
        assert 0 <= row["client"]["lag_p50"] <= row["client"]["lag_p99"] <= row["client"]["lag_most"]
        assert 0 < row["memory"]["now"] <= row["memory"]["most"]
        assert "refusals" not in row


def test_the_highest_rate_is_the_last_that_kept_to_the_p99_of_no_funnel(run):
    (reference,) = [row for row in rows_with(run[0], "share") if (row["server"], row["share"]) == ("no funnel", 80)]
    searched = rows_with(run[0], "limit")
    searched += [entry for entry in run[0]["left_out"] if entry["cell"] == f"mine.txt: {FUNNEL}, highest rate"]
    assert len(searched) == 1
    for row in rows_with(run[0], "limit"):
        assert row["limit"] == pytest.approx(reference["p99"])
        assert row["baseline_arrivals_per_second"] == reference["arrivals_per_second"]
        assert len(row["tried"]) == 2
        kept = [
            each["arrivals_per_second"] for each in row["tried"] if each["p99"] <= row["limit"] and not each["lost"]
        ]
        assert row["arrivals_per_second"] == max(kept)


def test_options_say_what_the_server_was_set_to(run):
    options = run[0]["options"]
    assert options["settings"] == {
        "host": "127.0.0.1",
        "port": 0,
        "backend": "auto",
        "warmup": "all",
        "max_batch_tokens": 16,
        "max_waiting_requests": 128,
        "max_waiting_rows": 2**19,
        "request_seconds": 60.0,
    }
    assert (options["requests"], options["funnel"]["name"], options["shares"]) == (COUNT, FUNNEL, list(SHARES))


def test_resuming_measures_no_row_again(run):
    assert run[2]["rows"] == run[0]["rows"]


def test_the_section_has_a_table_for_each_kind_of_row(run):
    content = copy.deepcopy(run[0])
    (row,) = [row for row in rows_with(content, "share") if (row["server"], row["share"]) == (FUNNEL, 150)]
    row["statuses"], row["refusals"] = {"200": 20, "429": 3, "no reply": 1}, {"p50": 0.001, "p99": 0.002, "most": 0.003}
    said = Suite.section(content)
    capacity, overhead, arriving, _ = said.tables
    assert [len(table.rows) for table in (capacity, overhead, arriving)] == [6, 2, 8]
    cells = dict(zip([head[0] for head in arriving.heads], arriving.cells[-1], strict=True))
    assert (cells["statuses"].text, cells["errors"].text) == ("20 x 200, 3 x 429, 1 x no reply", "1")
    assert cells["refusals"].text == "2.00"  # the second of both, p99
    first = capacity.rows[0]
    assert capacity.cells[0][4].value == pytest.approx(
        first["texts_per_second"] / first["engine_texts_per_second"], rel=1e-4
    )
    assert "on the same cores as the server" in said.facts["Client"]
    assert f"a short request takes {1e3 * overhead.rows[0]['overhead']:.2f} ms more" in said.summary
    (panel,) = said.plots[0].panels
    assert [series.label for series in panel.series][:2] == ["no funnel, p50", "no funnel, p99"]
    assert "statuses 20 x 200" in row_line(Suite.section, content, row)
    empty = Suite.section(content | {"rows": []})
    assert (empty.summary, empty.plots, empty.filled) == ("Nothing was measured.", [], [])


def test_every_figure_is_of_seconds(run):
    names = {name for row in run[0]["rows"] for name, _ in figures(row)}
    assert names == {"seconds", "engine_seconds", "latency"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--preset", "gemma-9"], ConfigError, "choose one of gemma-2b"),
        (["--preset", "t5gemma-2b"], ConfigError, "t5gemma-2b"),
        (["--max-waiting-requests", "63"], ConfigError, "less than the 64 requests"),
        (["--max-batch-tokens", "100"], InputError, "a batch holds only 100; raise --max-batch-tokens"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(monkeypatch, arguments, error, message):
    monkeypatch.setattr(http_suite, "write_random_model", None)
    result = invoke(*arguments)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_a_server_that_ends_says_why():
    with pytest.raises(FunnelError, match=r"the server ended: .*no such luck"):
        Server([sys.executable, "-c", "raise SystemExit('no such luck')"])


class ScriptedServer:
    """Answers requests by their first text: "ok", "busy" (429), "close" (200, then it hangs up), "gone" (no reply)."""

    def __init__(self):
        self.bodies, self.connections = [], 0

    async def answer(self, reader, writer):
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                size = int(head.partition("content-length: ")[2].partition("\r\n")[0])
                self.bodies.append(json.loads(await reader.readexactly(size)))
                what = self.bodies[-1]["inputs"][0]
                if what == "gone":
                    break
                status = "429 Too Many Requests" if what == "busy" else "200 OK"
                hang_up = "connection: close\r\n" if what == "close" else ""
                writer.write(f"HTTP/1.1 {status}\r\n{hang_up}content-length: 2\r\n\r\n[]".encode())
                if what == "close":
                    break
        writer.close()

    @contextlib.contextmanager
    def serving(self):
        """The client of this server."""
        loop, listener = asyncio.new_event_loop(), socket.create_server(("127.0.0.1", 0))
        server = loop.run_until_complete(asyncio.start_server(self.answer, sock=listener))
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        load = Load(listener.getsockname()[1])
        try:
            yield load
        finally:
            load.close()
            loop.call_soon_threadsafe(server.close)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


def test_an_open_loop_notes_what_becomes_of_each_request():
    script = ["ok", "busy", "close", "gone", "ok", "busy"]
    server = ScriptedServer()
    with server.serving() as load:
        replies = load.opened([[what] for what in script], np.linspace(0, 0.25, len(script)))
    assert replies.statuses.tolist() == [200, 429, 200, NO_REPLY, 200, 429]
    assert [body["inputs"] for body in server.bodies] == [[what] for what in script]
    assert server.connections == 3  # one until "close", one until "gone", one for the rest
    assert (replies.lags >= 0).all()
    assert (replies.latencies >= replies.lags).all()
    assert replies.seconds >= 0.25
    assert replies.cpu_seconds > 0


def test_a_closed_loop_uses_one_connection_for_each_client_and_every_request_once():
    server = ScriptedServer()
    with server.serving() as load:
        replies = load.closed([["ok", str(number)] for number in range(20)], clients=3)
        assert server.connections == 3
        assert sorted(int(body["inputs"][1]) for body in server.bodies) == list(range(20))
        assert replies.statuses.tolist() == [200] * 20
        with pytest.raises(FunnelError, match=r"1 of 2 requests were not answered with 200 but \{429\}"):
            load.closed([["ok"], ["busy"]], clients=1)


def test_latencies_are_of_results_and_refusals_of_429s():
    """Latency counts from the arrival; a refusal from sending."""
    replies = Replies(
        statuses=np.array([200, 429, 200, NO_REPLY]),
        latencies=np.array([0.4, 0.15, 0.2, 9.0]),
        lags=np.array([0.0, 0.1, 0.02, 0.0]),
        seconds=2.0,
        cpu_seconds=0.5,
    )
    row = describe_replies(replies)
    assert row["statuses"] == {"no reply": 1, "200": 2, "429": 1}
    assert row["results_per_second"] == 1.0
    assert row["latency"]["samples"] == [0.2, 0.4]
    assert row["p50"] == pytest.approx(0.3)
    assert row["refusals"]["most"] == pytest.approx(0.05)
    assert row["client"] == pytest.approx({"lag_p50": 0.01, "lag_p99": 0.0976, "lag_most": 0.1, "busy": 0.25})
