"""The command line: what is printed where, and the exit codes, over a scripted server."""

import argparse
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from inferpipe import InferPipe, __version__, cli
from inferpipe.wire import encode_sse

RESULT = {"id": "e1", "status": "completed", "data": {"sentiment": "positive"}, "workflowId": "w",
          "workflowVersion": 1, "executionId": "e1"}  # fmt: skip


def stream_of(*events: tuple[str, dict[str, Any]]) -> bytes:
    return b"".join(
        encode_sse(name, json.dumps(data).encode(), seq)
        for seq, (name, data) in enumerate(events, start=1)
    )


def ending(status: str = "completed", **members: Any) -> tuple[str, dict[str, Any]]:
    return f"execution.{status}", {**RESULT, "status": status, **members}


class Interrupted(httpx.SyncByteStream):
    """A stream during which the user presses Ctrl-C."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __iter__(self) -> Iterator[bytes]:
        yield self.content
        raise KeyboardInterrupt


class Server:
    def __init__(self, stream: bytes | httpx.SyncByteStream = b"", **answers: Any) -> None:
        self.stream = stream
        self.answers: dict[str, httpx.Response | Exception] = answers
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.get(request.url.path.rpartition("/")[2])
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            return answer
        headers = {"content-type": "text/event-stream", "x-execution-id": "e1"}
        if isinstance(self.stream, bytes):
            return httpx.Response(200, headers=headers, content=self.stream)
        return httpx.Response(200, headers=headers, stream=self.stream)

    @property
    def paths(self) -> list[str]:
        return [request.url.path for request in self.requests]

    def main(self, *argv: str) -> int:
        def connect(_: argparse.Namespace) -> InferPipe:
            return InferPipe(transport=httpx.MockTransport(self), sleep=lambda _: None)

        return cli.main(argv, connect)


Output = pytest.CaptureFixture[str]
TEXT = [("chunk", {"data": text, "step": "s"}) for text in ("Hel", "lo")]


@pytest.mark.parametrize(
    ("data", "printed"),
    [
        ({"sentiment": "positive"}, '{"sentiment": "positive"}\n'),
        ("Grüße\n", "Grüße\n\n"),
        ([1, None], "[1, null]\n"),
        (None, "null\n"),
    ],
)
def test_run_prints_the_data_alone(capsys: Output, data: object, printed: str) -> None:
    server = Server(stream_of(*TEXT, ending(data=data)))
    assert server.main("run", "w", "--input", '{"text": "x"}') == 0
    assert capsys.readouterr() == (printed, "")
    assert json.loads(server.requests[0].content) == {"workflowId": "w", "input": {"text": "x"}}


def test_run_passes_timeout_and_metadata(capsys: Output) -> None:
    server = Server(stream_of(ending()))
    assert server.main("run", "w", "--timeout", "500", "--metadata", '{"k": 1}', "--json") == 0
    assert json.loads(server.requests[0].content) == {
        "workflowId": "w", "input": {}, "timeout": 500, "metadata": {"k": 1}
    }  # fmt: skip
    assert json.loads(capsys.readouterr().out)["usage"]["totalTokens"] == 0


def test_run_stream_prints_text_as_it_comes(capsys: Output) -> None:
    server = Server(stream_of(("execution.started", {}), *TEXT, ending(data="Hello")))
    assert server.main("run", "w", "--stream") == 0
    assert capsys.readouterr() == ("Hello\n", "")


def test_run_stream_without_text_prints_the_data(capsys: Output) -> None:
    assert Server(stream_of(ending())).main("run", "w", "--stream") == 0
    assert capsys.readouterr() == ('{"sentiment": "positive"}\n', "")


def test_run_stream_tells_of_a_retried_step_on_stderr(capsys: Output) -> None:
    events = [*TEXT, ("step.retrying", {}), ("gap", {}), *TEXT, ending()]
    assert Server(stream_of(*events)).main("run", "w", "--stream") == 0
    out, err = capsys.readouterr()
    assert out == "HelloHello\n"
    assert ["void" in err, "gap" in err, err.count("\n")] == [True, True, 2]


def test_run_stream_json_prints_a_line_per_event(capsys: Output) -> None:
    assert Server(stream_of(*TEXT, ending())).main("run", "w", "--stream", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["chunk", "chunk", "execution.completed"]
    assert [line["id"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize(("flags", "printed"), [((), "e1\n"), (("--json",), '{"id": "e1"')])
def test_run_async_prints_the_id(capsys: Output, flags: tuple[str, ...], printed: str) -> None:
    server = Server()
    server.answers["async"] = httpx.Response(202, json={"id": "e1", "status": "pending"})
    assert server.main("run", "w", "--async", *flags) == 0
    assert capsys.readouterr().out.startswith(printed)


def test_run_reads_input_from_a_file_or_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "input.json"
    path.write_text('{"from": "file"}')
    monkeypatch.setattr("sys.stdin", io.StringIO('{"from": "stdin"}'))
    for argument, source in ((f"@{path}", "file"), ("-", "stdin")):
        server = Server(stream_of(ending()))
        assert server.main("run", "w", "--input", argument) == 0
        assert json.loads(server.requests[0].content)["input"] == {"from": source}


@pytest.mark.parametrize("flags", [(), ("--stream",), ("--json",), ("--stream", "--json")])
@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_unsuccessful_execution_exits_with_1(
    capsys: Output, status: str, flags: tuple[str, ...]
) -> None:
    server = Server(stream_of(ending(status, error="model\ngone")))
    assert server.main("run", "w", *flags) == 1
    out, err = capsys.readouterr()
    assert err == f"inferpipe: execution e1 {status}: model gone\n"
    assert bool(out) == ("--json" in flags)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("run", "w", "--input", "[1]"), "--input must be a JSON object"),
        (("run", "w", "--input", "{"), "--input is not JSON"),
        (("run", "w", "--input", "@/nowhere/at/all"), "No such file"),
        (("run", "w", "--input", '{"x": NaN}'), "not JSON"),
        (("run", "w", "--metadata", "1"), "--metadata must be a JSON object"),
        (("run", "w", "--timeout", "0"), "timeout: Input should be greater than 0"),
        (("executions", "get", ""), "not an execution id"),
    ],
)
def test_wrong_value_exits_with_2_and_sends_nothing(
    capsys: Output, argv: tuple[str, ...], text: str
) -> None:
    server = Server()
    assert server.main(*argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert text in err
    assert not server.requests


@pytest.mark.parametrize(
    "argv", [(), ("run",), ("run", "w", "--stream", "--async"), ("run", "w", "--nope"),
             ("run", "w", "--timeout", "1s"), ("executions",), ("frobnicate",)]
)  # fmt: skip
def test_wrong_usage_exits_with_2(
    argv: tuple[str, ...], install: Callable[..., None], capsys: Output
) -> None:
    install(Entry("up", broken))
    with pytest.raises(SystemExit) as caught:
        Server().main(*argv)
    assert caught.value.code == 2
    assert "usage: inferpipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "hint"),
    [
        (httpx.ConnectError("refused"), "start the server with `inferpipe up`"),
        (httpx.ReadTimeout("silent"), "try again later"),
    ],
)
def test_unreachable_server_exits_with_3(capsys: Output, failure: Exception, hint: str) -> None:
    assert Server(health=failure).main("health") == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert hint in err


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "--api-key"), (403, "--workspace"), (404, "check the id"), (500, "500")],
)
def test_refusal_exits_with_4(capsys: Output, status: int, hint: str) -> None:
    body = {"title": "T", "status": status, "code": "C", "detail": "why"}
    assert Server(e1=httpx.Response(status, json=body)).main("executions", "get", "e1") == 4
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{status} C: why" in err
    assert hint in err


def test_unreadable_answer_exits_with_4(capsys: Output) -> None:
    assert Server(e1=httpx.Response(200, text="<html>")).main("executions", "get", "e1") == 4
    assert "is base_url an inferpipe server?" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--stream",)])
def test_interrupt_cancels_the_execution(capsys: Output, flags: tuple[str, ...]) -> None:
    cancelling = httpx.Response(202, json={"id": "e1", "status": "cancelling"})
    server = Server(Interrupted(stream_of(*TEXT)), cancel=cancelling)
    assert server.main("run", "w", *flags) == 130
    assert server.paths == ["/v1/execute/stream", "/v1/executions/e1/cancel"]
    assert "execution e1 is being cancelled\ninferpipe: interrupted" in capsys.readouterr().err


def test_interrupt_says_when_the_cancellation_fails(capsys: Output) -> None:
    body = {"title": "T", "status": 409, "code": "ALREADY_TERMINAL"}
    server = Server(Interrupted(b": hi\n\n"), cancel=httpx.Response(409, json=body))
    assert server.main("run", "w") == 130
    assert "e1 was not cancelled: 409 ALREADY_TERMINAL" in capsys.readouterr().err


def test_interrupt_before_the_id_is_known_only_exits(capsys: Output) -> None:
    class AtOnce(Server):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            raise KeyboardInterrupt

    server = AtOnce()
    assert server.main("run", "w") == 130
    assert server.paths == ["/v1/execute/stream"]
    assert capsys.readouterr().err == "inferpipe: interrupted\n"


def test_executions_get_and_cancel(capsys: Output) -> None:
    record = {**RESULT, "createdAt": "2026-11-21T05:24:00Z"}
    server = Server(e1=httpx.Response(200, json=record), cancel=httpx.Response(202, json={}))
    assert server.main("executions", "get", "e1") == 0
    assert json.loads(capsys.readouterr().out)["createdAt"] == "2026-11-21T05:24:00Z"
    assert server.main("executions", "cancel", "e1") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("status", "http", "code"), [("healthy", 200, 0), ("degraded", 503, 1)])
def test_health_prints_and_exits_by_it(capsys: Output, status: str, http: int, code: int) -> None:
    answer = httpx.Response(http, json={"status": status, "version": "1", "hosts": 1})
    assert Server(health=answer).main("health") == code
    assert json.loads(capsys.readouterr().out)["hosts"] == 1


def test_connection_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERPIPE_BASE_URL", "http://from.env")
    monkeypatch.setenv("INFERPIPE_API_KEY", "from-environment")
    parser, _ = cli.build_parser()
    args = parser.parse_args(["health", "--base-url", "http://given", "--workspace", "w1"])
    with cli.connect_from(args) as client:
        config = client._runner._config
        assert config.url("/v1/health") == "http://given/v1/health"
        assert config.headers["authorization"] == "Bearer from-environment"
        assert config.headers["x-workspace-id"] == "w1"


def test_wrong_base_url_exits_with_2(capsys: Output) -> None:
    assert cli.main(["health", "--base-url", "localhost:8000"]) == 2
    assert "base_url must start with http://" in capsys.readouterr().err


class Up:
    help = "start the cluster"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--port", type=int)

    def run(self, args: argparse.Namespace) -> int:
        return int(args.port)


class Entry:
    """Stands for an importlib.metadata.EntryPoint."""

    def __init__(self, name: str, load: Callable[[], object]) -> None:
        self.name = name
        self.load = load


def broken() -> object:
    raise ModuleNotFoundError("No module named 'ray'")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(*entries: Entry) -> None:
        monkeypatch.setattr(cli, "entry_points", lambda **_: list(entries))

    return install


def test_server_command_comes_from_its_entry_point(install: Callable[..., None]) -> None:
    install(Entry("up", Up), Entry("doctor", broken), Entry("run", broken))
    assert cli.main(["up", "--port", "7"]) == 7
    with pytest.raises(SystemExit):
        cli.main(["up", "--nope"])


@pytest.mark.parametrize("entries", [(), (Entry("up", broken),)])
def test_up_without_the_server_says_what_to_install(
    install: Callable[..., None], entries: tuple[Entry, ...], capsys: Output
) -> None:
    install(*entries)
    assert cli.main(["up", "--port", "7", "more"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'inferpipe[server]'" in err
    assert ("'ray'" in err) == bool(entries)


def test_help_lists_commands_and_exit_codes(install: Callable[..., None], capsys: Output) -> None:
    install(Entry("up", Up), Entry("doctor", broken))
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for text in ("start the cluster", "doctor", "executions", "exit codes", "130"):
        assert text in out


def test_own_commands_do_not_look_for_server_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(cli, "entry_points", broken)
    assert Server(stream_of(ending())).main("run", "w") == 0
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.endswith(f"inferpipe {__version__}\n")


def test_reader_of_stdout_that_leaves_cancels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            return sink.fileno()

    server = Server(stream_of(*TEXT, ending()), cancel=httpx.Response(202, json={}))
    with (tmp_path / "sink").open("w") as sink:
        monkeypatch.setattr("sys.stdout", Closed())
        assert server.main("run", "w", "--stream") == 130
    assert server.paths[-1] == "/v1/executions/e1/cancel"
