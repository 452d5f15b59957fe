"""`inferpipe doctor`: what runs, what is wrong, what to do.

Owns the client's own checks and how findings are shown; the server's checks come by the entry-point
group `inferpipe.doctor`, so that this needs no server package. Invariant: it changes nothing, and
shows no secret.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from itertools import chain
from typing import Literal, Protocol

from inferpipe import __version__
from inferpipe._exit_codes import FAILED, OK
from inferpipe._terminal import Progress, print_value, write
from inferpipe.client import InferPipe
from inferpipe.errors import ApiStatusError, InferPipeError
from inferpipe.wire import HealthStatus

DOCTOR_GROUP = "inferpipe.doctor"
INSTALL_HINT = "pip install 'inferpipe[server,cpu]'"

Verdict = Literal["ok", "warning", "problem"]
MARKS = {"ok": "ok", "warning": "warn", "problem": "PROBLEM"}


class Finding(Protocol):
    """What a check found; `remedy` says what to do, empty where nothing is to be done."""

    @property
    def name(self) -> str:
        """Of the check."""
        ...

    @property
    def verdict(self) -> Verdict:
        """How bad it is."""
        ...

    @property
    def detail(self) -> str:
        """What is there."""
        ...

    @property
    def remedy(self) -> str:
        """What to do."""
        ...


@dataclass(frozen=True, slots=True)
class ClientFinding:
    """A finding of the client's own checks."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""


ServerChecks = Callable[[bool], Iterable[Finding]]
"""What an entry point of the group `inferpipe.doctor` names; the argument is `is_quick`."""


def examine(client: InferPipe, args: argparse.Namespace) -> int:
    """Run all checks, show each as it is known; 1 where there is a problem."""
    progress = Progress()
    found: list[Finding] = []
    progress.show("looking ...")
    for finding in chain(_client_findings(client), _server_findings(is_quick=args.quick)):
        progress.clear()
        found.append(finding)
        if not args.json:
            write(_line(finding))
        progress.show("looking ...")
    progress.clear()
    if args.json:
        print_value([_members(finding) for finding in found])
    return FAILED if any(finding.verdict == "problem" for finding in found) else OK


def _client_findings(client: InferPipe) -> Iterator[ClientFinding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield ClientFinding("client", "ok", f"inferpipe {__version__} on Python {version}")
    try:
        health = client.health()
    except InferPipeError as error:
        remedy = "start it with `inferpipe up`, or set --base-url or INFERPIPE_BASE_URL"
        yield ClientFinding("service", "problem", f"{client.base_url}: {error}", remedy)
        return
    yield _service_finding(client, health)
    for name, service in sorted(health.services.items()):
        yield _part_finding(name, service)
    yield _skew_finding(health)
    yield _key_finding(client)


def _service_finding(client: InferPipe, health: HealthStatus) -> ClientFinding:
    detail = f"{client.base_url} is {health.status}"
    if health.status == "healthy":
        return ClientFinding("service", "ok", detail)
    if health.status == "starting":
        return ClientFinding(
            "service", "warning", detail, "wait: an engine starts in half a minute"
        )
    return ClientFinding("service", "problem", detail, "see the parts below, and the logs")


def _part_finding(name: str, service: object) -> ClientFinding:
    members = service if isinstance(service, dict) else {"status": service}
    status = str(members.get("status"))
    shown = ", ".join(f"{key} {value}" for key, value in members.items() if key != "status")
    detail = f"{status}: {shown}" if shown else status
    verdict: Verdict = "problem" if status in {"down", "failed"} else "ok"
    remedy = "look into its log in the data directory" if verdict == "problem" else ""
    return ClientFinding(f"service: {name}", verdict, detail, remedy)


def _skew_finding(health: HealthStatus) -> ClientFinding:
    detail = f"the service is {health.version}, this client {__version__}"
    if health.version == __version__:
        return ClientFinding("versions", "ok", detail)
    return ClientFinding("versions", "warning", detail, f"pip install inferpipe=={health.version}")


def _key_finding(client: InferPipe) -> ClientFinding:
    try:
        next(client.executions.list(page_size=1), None)
    except ApiStatusError as error:
        remedy = "set INFERPIPE_API_KEY to a key of this service; `inferpipe up` prints the first"
        return ClientFinding("key", "problem", str(error), remedy)
    except InferPipeError as error:
        return ClientFinding("key", "problem", str(error), "look at the service")
    return ClientFinding("key", "ok", "accepted" if client.has_key else "none is needed here")


def _server_findings(*, is_quick: bool) -> Iterator[Finding]:
    entries = list(entry_points(group=DOCTOR_GROUP))
    if not entries:
        remedy = f"to run one: {INSTALL_HINT}"
        yield ClientFinding("server packages", "ok", "no server is installed here", remedy)
    for entry in entries:
        try:
            checks: ServerChecks = entry.load()
        except ImportError as error:
            remedy = f"to run a server here: {INSTALL_HINT}"
            yield ClientFinding("server packages", "warning", f"not complete ({error})", remedy)
        else:
            yield from checks(is_quick)


def _line(finding: Finding) -> str:
    first = f"{MARKS[finding.verdict]:<8}{finding.name}: {' '.join(finding.detail.split())}\n"
    return first + (f"{'':<8}-> {finding.remedy}\n" if finding.remedy else "")


def _members(finding: Finding) -> dict[str, str]:
    return {
        "name": finding.name,
        "verdict": finding.verdict,
        "detail": finding.detail,
        "remedy": finding.remedy,
    }
