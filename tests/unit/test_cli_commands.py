"""The commands that manage: what each sends and prints; completions, keys from files, progress."""

import argparse
import io
import json
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from inferpipe import cli
from inferpipe._arguments import GROUPS, build_parser
from inferpipe._completion import SHELLS, levels, script_for
from inferpipe._exit_codes import MEANINGS
from inferpipe.testing import FakeServer
from tests.unit.test_sdk_resources import AT, DELIVERY, KEY, RECORD, WEBHOOK, WORKFLOW

Output = pytest.CaptureFixture[str]
YAML = "steps: [{id: echo, echo: {}}]"


class Shell:
    """A shell of a fake server: runs a command line, keeps what was asked."""

    def __init__(self) -> None:
        self.fake = FakeServer()
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.fake(request)

    def main(self, *argv: str) -> int:
        transport = httpx.MockTransport(self)
        return cli.main(argv, lambda _: self.fake.client(transport=transport))


def page(*items: object) -> dict[str, object]:
    return {"items": items, "nextCursor": None}


USAGE_PRINTED = """\
day	requests	prompt_tokens	completion_tokens	total_tokens
2026-11-21	2	0	0	3
total	0	0	0	0
"""
Case = tuple[str, str, object, str | None, str]
COMMANDS: list[Case] = [
    ("executions list --status failed --limit 5", "GET /v1/executions", page(RECORD),
     f"e1\tcompleted\ttest-echo\t{AT}\t-\n", ""),
    ("executions retry e1 --from-step s", "POST /v1/executions/e1/retry",
     {"id": "e2", "status": "pending"}, "e2\n", ""),
    ("executions signal e1 go --data {\"a\":1}", "POST /v1/executions/e1/signal", {}, "",
     '{"name": "go", "data": {"a": 1}}'),
    ("workflows list", "GET /v1/workflows", page(WORKFLOW), f"w\t3\t{AT}\n", ""),
    ("workflows versions w", "GET /v1/workflows/w/versions", page(WORKFLOW), f"w\t3\t{AT}\n", ""),
    ("workflows put w FILE", "PUT /v1/workflows/w", WORKFLOW, "w version 3\n", YAML),
    ("workflows validate w FILE", "POST /v1/workflows/w/validate", {"valid": True}, "", YAML),
    ("workflows delete w", "DELETE /v1/workflows/w", None, "", ""),
    ("keys list", "GET /v1/keys", page(KEY), "k\tn\tread\tip_\t-\n", ""),
    ("keys create n --scope read --scope admin", "POST /v1/keys", KEY, "s\n",
     '{"name": "n", "scopes": ["read", "admin"]}'),
    ("keys create n", "POST /v1/keys", KEY, "s\n", '{"name": "n", "scopes": ["execute"]}'),
    ("keys revoke k", "DELETE /v1/keys/k", None, "", ""),
    ("webhooks list", "GET /v1/webhooks", page(WEBHOOK), "h\thttps://x\t*\t-\tyes\t-\n", ""),
    ("webhooks create https://x --event workflow.failed", "POST /v1/webhooks", WEBHOOK,
     "whsec_1\n", '{"url": "https://x", "events": ["workflow.failed"]}'),
    ("webhooks test h", "POST /v1/webhooks/h/test", DELIVERY, None, ""),
    ("webhooks deliveries h", "GET /v1/webhooks/h/deliveries", page(DELIVERY),
     f"d\tevt_1\t-\tfailed\t{AT}\n", ""),
    ("webhooks replay h --status dead", "POST /v1/webhooks/h/replay",
     {"replayed": 2, "isComplete": False}, "2 deliveries are sent again, not all: run this again\n",
     '{"status": "dead"}'),
    ("webhooks delete h", "DELETE /v1/webhooks/h", None, "", ""),
    ("usage --group-by day --from 2026-11-21", "GET /v1/usage",
     {"items": [{"day": "2026-11-21", "requests": 2, "totalTokens": 3}], "totals": {}},
     USAGE_PRINTED, ""),
]  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case[0])
def test_command_sends_and_prints(case: Case, capsys: Output, tmp_path: Path) -> None:
    line, call, answer, printed, body = case
    shell = Shell()
    shell.fake.script(call, answer)
    file = tmp_path / "workflow.yaml"
    file.write_text(YAML)
    assert shell.main(*(str(file) if word == "FILE" else word for word in line.split())) == 0
    assert capsys.readouterr().out == printed or printed is None
    assert shell.requests[-1].content.decode() == body


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case[0])
def test_every_command_takes_json_and_prints_lines_of_it(
    case: Case, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, call, answer, _, _ = case
    shell = Shell()
    shell.fake.script(call, answer)
    monkeypatch.setattr("sys.stdin", io.StringIO(YAML))
    assert shell.main(*line.replace("FILE", "-").split(), "--json") == 0
    for printed in capsys.readouterr().out.splitlines():
        assert isinstance(json.loads(printed), dict)


def test_every_action_of_a_group_is_in_the_table_or_elsewhere() -> None:
    actions = {f"{name} {one.name}" for name, (_, group) in GROUPS.items() for one in group}
    seen = {" ".join(line.split()[:2]) for line, *_ in COMMANDS}
    elsewhere = {"executions get", "executions cancel", "executions follow", "workflows get"}
    assert actions == (seen - {"usage --group-by"}) | elsewhere


def test_list_stops_at_its_limit(capsys: Output) -> None:
    shell = Shell()
    shell.fake.completes("w")
    with shell.fake.client() as client:
        for _ in range(5):
            client.execute("w", {})
    assert shell.main("executions", "list", "--limit", "2") == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert len(shell.requests) == 1
    assert shell.requests[0].url.params["limit"] == "2"


def test_follow_prints_text_and_goes_on_after_a_cursor(capsys: Output) -> None:
    shell = Shell()
    shell.fake.completes("w", chunks=["Hel", "lo"])
    with shell.fake.client() as client:
        started = client.execute_async("w", {})
    assert shell.main("executions", "follow", started.id) == 0
    assert capsys.readouterr().out == "Hello\n"
    assert shell.main("executions", "follow", started.id, "--after", "3", "--json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["id"] for event in events] == [4, 5, 6]
    assert shell.main("executions", "get", started.id) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "completed"


def test_interrupted_follow_leaves_the_execution_alone(capsys: Output) -> None:
    shell = Shell()
    shell.fake.holds("w", chunks=["so far"])

    def press(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/stream"):
            raise KeyboardInterrupt
        return shell.fake(request)

    with shell.fake.client() as client:
        started = client.execute_async("w", {})
        transport = httpx.MockTransport(press)
        argv = ["executions", "follow", started.id]
        assert cli.main(argv, lambda _: shell.fake.client(transport=transport)) == 130
        assert client.get_execution(started.id).status == "running"
    assert f"inferpipe executions cancel {started.id}" in capsys.readouterr().err


def test_invalid_definition_exits_with_1_and_names_the_place(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell()
    verdict = {"valid": False, "errors": [{"loc": ["steps", 0], "msg": "no type"}]}
    shell.fake.script("POST /v1/workflows/w/validate", verdict)
    monkeypatch.setattr("sys.stdin", io.StringIO(YAML))
    assert shell.main("workflows", "validate", "w", "-") == 1
    assert capsys.readouterr().out == "steps.0: no type\n"


def test_key_whose_answer_was_lost_is_revoked(capsys: Output) -> None:
    shell = Shell()
    shell.fake.script("POST /v1/keys", {**KEY, "key": None})
    shell.fake.script("DELETE /v1/keys/k", None)
    assert shell.main("keys", "create", "n") == 1
    out, err = capsys.readouterr()
    assert (out, "run this again" in err) == ("", True)
    assert [request.method for request in shell.requests] == ["POST", "DELETE"]


@pytest.mark.parametrize(
    "argv",
    [
        ("executions", "list", "--limit", "0"),
        ("executions", "list", "--status", "done"),
        ("executions", "signal", "e1"),
        ("executions", "signal", "e1", "go", "--data", "{"),
        ("executions", "get", "e1", "--api-key", "sk"),  # a key is never an argument
        ("executions", "list", "--lim", "3"),  # nor is an option cut short
        ("keys", "create", "n", "--scope", "root"),
        ("keys", "create", "n", "--expires-in", "soon"),
        ("usage", "--from", "yesterday"),
        ("workflows", "put", "w", "/nowhere/at/all"),
        ("completion", "tcsh"),
    ],
)
def test_wrong_usage_exits_with_2_and_sends_nothing(argv: tuple[str, ...], capsys: Output) -> None:
    shell = Shell()
    try:
        code = shell.main(*argv)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    assert code == 2
    assert capsys.readouterr().out == ""
    assert not shell.requests


def parsed(*words: str) -> argparse.Namespace:
    parser, _ = build_parser()
    return parser.parse_args(words)


def test_key_comes_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERPIPE_API_KEY", "from-environment")
    path = tmp_path / "key"
    path.write_text("from-file-0123456\n")
    with cli.connect_from(parsed("health", "--api-key-file", str(path))) as client:
        assert client._runner._config.headers["authorization"] == "Bearer from-file-0123456"


@pytest.mark.parametrize("content", [None, " \n", b"\xff"])
def test_key_file_that_is_none_exits_with_2(
    tmp_path: Path, capsys: Output, content: str | bytes | None
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert cli.main(["health", "--api-key-file", str(path)]) == 2
    assert "--api-key-file" in capsys.readouterr().err


def test_environment_is_an_argument_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERPIPE_STAGING_BASE_URL", "http://staging")
    with cli.connect_from(parsed("health", "--environment", "staging")) as client:
        assert client.base_url == "http://staging"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_to_a_person_and_taken_away(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    shell = Shell()
    shell.fake.completes("w", {"n": 1}, chunks=["x"])
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert shell.main("run", "w") == 0
    assert "step.started step" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert capsys.readouterr().out == '{"n": 1}\n'


def test_no_progress_where_nobody_watches(capsys: Output) -> None:
    shell = Shell()
    shell.fake.fails("w", "broke")
    assert shell.main("run", "w") == 1
    assert capsys.readouterr().err == "inferpipe: execution exe_fake1 failed: broke\n"


def complete(shell: str, script: str, *words: str) -> list[str]:
    """What the shell offers for the last word."""
    if shell == "bash":
        line = " ".join(f"'{word}'" for word in ("inferpipe", *words))
        ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _inferpipe; echo ${{COMPREPLY[@]}}"
        argv = ["bash", "--norc", "-c", f"{script}\n{ask}"]
    elif shell == "zsh":
        # Outside its line editor zsh has no compadd: this one prints what is offered.
        stubs = "compdef() { : }; compadd() { shift; print -l -- $@ }; _files() { : }"
        line = " ".join(f"'{word}'" for word in ("inferpipe", *words))
        ask = f"words=({line}); CURRENT={len(words) + 1}; _inferpipe"
        argv = ["zsh", "-f", "-c", f"{stubs}\n{script}\n{ask}"]
    else:
        argv = ["fish", "--no-config", "-c", f"{script}\ncomplete -C 'inferpipe {' '.join(words)}'"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20)
    lines = done.stdout.splitlines() if shell == "fish" else done.stdout.split()
    offered = [line.partition("\t")[0] for line in lines]
    return [word for word in offered if word.startswith(words[-1])]  # zsh's own matcher does it


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("exec",), {"executions"}),
        (("executions", "re"), {"retry"}),
        (("executions", "list", "--stat"), {"--status"}),
        (("executions", "list", "--status", "f"), {"failed"}),
        (("keys", "create", "mine", "--scope", ""), {"read", "execute", "admin"}),
        (("completion", "z"), {"zsh"}),
        (("run", "workflows", "--str"), {"--stream"}),  # a value that looks like a command
    ],
)
def test_shell_completes(shell: str, words: tuple[str, ...], offered: set[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    parser, _ = build_parser()
    assert set(complete(shell, script_for(shell, parser), *words)) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_names_everything_and_is_read_by_its_shell(shell: str, capsys: Output) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    parser, _ = build_parser()
    for level in levels(parser):
        for name in (*level.words, *level.options):
            assert (name.lstrip("-") if shell == "fish" else name) in script
    assert "--port" in script or "-l port" in script  # the server's commands too
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=20)


def test_exit_codes_have_one_meaning_each() -> None:
    assert sorted(MEANINGS) == [0, 1, 2, 3, 4, 130]
    assert len(set(MEANINGS.values())) == len(MEANINGS)


def test_a_key_never_shows_in_an_error(capsys: Output, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("a\nsecret-with-a-line-break")
    assert cli.main(["health", "--api-key-file", str(path)]) == 2
    assert "secret" not in capsys.readouterr().err
