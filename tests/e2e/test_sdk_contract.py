"""The suite of the fake server, on the real one: what users test against is what they get."""

from collections.abc import Callable, Iterator

import pytest

from inferpipe import InferPipe
from tests.e2e.conftest import API_KEY, Service
from tests.support.sdk_contract import CHECKS, Workflows, shapes
from tests.unit.test_sdk_testing import IDS as FAKE_IDS
from tests.unit.test_sdk_testing import contract_server

# `contract-echo` is the check's own, so that its list holds nothing of other tests.
IDS = Workflows(
    "contract-echo", "chat-assistant", "contract-failing", "chat-assistant", "contract-waiting"
)
DEFINITIONS = {
    "contract-echo": {"steps": [{"id": "echo", "echo": {}}]},
    "contract-waiting": {
        "steps": [{"id": "ask", "approval": {"message": "May I?", "timeout": "5m"}}],
        "output": "{{ steps.ask.output.data }}",
    },
    "contract-failing": {"steps": [{"id": "broken", "transform": "{{ input.no.such.member }}"}]},
}


@pytest.fixture
def client(service: Service) -> Iterator[InferPipe]:
    with InferPipe(api_key=API_KEY, base_url=service.url) as opened:
        for workflow_id, definition in DEFINITIONS.items():
            opened.workflows.put(workflow_id, definition)
        yield opened


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_service_keeps_the_contract(
    client: InferPipe, check: Callable[[InferPipe, Workflows], None]
) -> None:
    check(client, IDS)


def test_streams_look_alike(client: InferPipe) -> None:
    with contract_server().client() as fake:
        assert shapes(fake, FAKE_IDS) == shapes(client, IDS)
