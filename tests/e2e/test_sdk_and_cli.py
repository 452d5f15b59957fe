"""The SDK and the command against the running service, as a user has them."""

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator

import httpx
import jsonschema_rs
import pytest

from inferpipe import (
    AsyncInferPipe,
    ConflictError,
    ExecutionFailedError,
    InferPipe,
    NotFoundError,
    PermissionDeniedError,
)
from tests.e2e.conftest import API_KEY, Service
from tests.support.receiver import receiver, status

FRANCE = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}
SENTIMENT = {
    "type": "object",
    "required": ["sentiment", "confidence"],
    "properties": {
        "sentiment": {"enum": ["positive", "negative", "neutral"]},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
    },
}


@pytest.fixture
def client(service: Service) -> Iterator[InferPipe]:
    with InferPipe(api_key=API_KEY, base_url=service.url) as opened:
        yield opened


def test_execute_and_get(client: InferPipe) -> None:
    result = client.execute("test-echo", {"message": "hello world"})
    assert result.data == {"message": "hello world"}
    info = client.execute_async("test-echo", {"n": 1}, metadata={"mine": True})
    record = client.get_execution(info.id)
    assert record.metadata == {"mine": True}
    assert client.health().status == "healthy"


def test_a_stream_answers_paris_token_by_token(client: InferPipe) -> None:
    with client.execute_stream("chat-assistant", FRANCE) as stream:
        chunks = [chunk.data for chunk in stream]
    assert "Paris" in "".join(chunks)
    assert len(chunks) > 2
    assert stream.result.usage.completion_tokens >= len(chunks) - 1
    assert stream.result.data == "".join(chunks)


def test_many_async_streams_at_once(service: Service) -> None:
    async def run() -> list[str]:
        async with AsyncInferPipe(api_key=API_KEY, base_url=service.url) as client:

            async def one() -> str:
                async with client.execute_stream("chat-assistant", FRANCE) as stream:
                    return "".join([chunk.data async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(16)))

    answers = asyncio.run(run())
    assert all("Paris" in answer for answer in answers)


def test_errors_have_their_class(client: InferPipe) -> None:
    with pytest.raises(NotFoundError) as refusal:
        client.execute("no-such-workflow", {})
    assert refusal.value.code == "UNKNOWN_WORKFLOW"
    with pytest.raises(ExecutionFailedError) as failure:
        client.execute("chat-assistant", FRANCE, timeout_ms=1)
    assert failure.value.result.error_code == "TIMEOUT"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("I love it, it is wonderful!", "positive"), ("This is terrible and broken.", "negative")],
)
def test_sentiment_satisfies_its_schema(client: InferPipe, text: str, expected: str) -> None:
    data = client.execute("sentiment-analysis", {"text": text}).data
    assert jsonschema_rs.is_valid(SENTIMENT, data)
    assert data["sentiment"] == expected


def test_extraction_satisfies_the_callers_schema(client: InferPipe) -> None:
    schema = {
        "type": "object",
        "required": ["name", "city"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "city": {"type": "string", "maxLength": 40},
        },
    }
    document = "Maria Silva lives in Lisbon and works as an engineer."
    data = client.execute("data-extraction", {"document": document, "schema": schema}).data
    assert jsonschema_rs.is_valid(schema, data["extractedData"])


def test_a_schema_that_is_none_fails_in_words(client: InferPipe) -> None:
    with pytest.raises(ExecutionFailedError) as failure:
        client.execute("data-extraction", {"document": "x", "schema": {"type": "nonsense"}})
    assert failure.value.result.error_code == "STEP_FAILED"
    assert len(str(failure.value.result.error)) > 10


def test_executions_are_listed_followed_retried(client: InferPipe) -> None:
    started = [client.execute_async("test-echo", {"n": n}).id for n in range(3)]
    for one in started:
        assert client.executions.follow(one).wait().status == "completed"
    listed = client.executions.list(workflow_id="test-echo", page_size=2)
    found = [record.id for record in itertools.islice(listed, 3)]
    assert set(found) == set(started)
    again = client.executions.retry(started[0])
    assert again.retry_of == started[0]
    events = list(client.executions.follow(again.id).events())
    assert events[-1].type == "execution.completed"
    last = events[-1].id
    assert client.executions.follow(again.id, after=last).wait().data == {"n": 0}
    with pytest.raises(ConflictError):
        client.executions.cancel(again.id)


def test_definitions_and_keys_are_managed(client: InferPipe, service: Service) -> None:
    text = "steps: [{id: greet, transform: {text: 'Hello {{ input.name }}'}}]"
    assert client.workflows.put("sdk-greeting", text).version == 1
    assert client.workflows.put("sdk-greeting", {"steps": [{"id": "e", "echo": {}}]}).version == 2
    assert [one.version for one in client.workflows.versions("sdk-greeting")] == [2, 1]
    assert client.workflows.get("sdk-greeting", version=1).model_extra is not None
    assert {"sdk-greeting", "test-echo"} <= {one.id for one in client.workflows.list()}
    verdict = client.workflows.validate("sdk-greeting", {"steps": [{"id": "x", "fly": {}}]})
    assert not verdict.valid
    assert verdict.errors
    client.workflows.delete("sdk-greeting")
    with pytest.raises(NotFoundError):
        client.execute("sdk-greeting", {})

    made = client.keys.create("reader", ["read"])
    with InferPipe(made.key, base_url=service.url) as reader:
        assert next(reader.executions.list()).id
        with pytest.raises(PermissionDeniedError):
            reader.execute("test-echo", {})
    assert made.id in {one.id for one in client.keys.list()}
    client.keys.revoke(made.id)


async def test_webhooks_are_managed_and_replayed(service: Service) -> None:
    async with (
        AsyncInferPipe(API_KEY, base_url=service.url) as client,
        receiver(status(200)) as there,
    ):
        made = await client.webhooks.create(there.url, ["*"], description="mine")
        assert made.secret is not None
        changed = await client.webhooks.update(made.id, {"description": None})
        assert (changed.description, changed.secret) == (None, None)
        tested = await client.webhooks.test(made.id)
        async with asyncio.timeout(30):
            await there.wait_for(1)
            while (await client.webhooks.delivery(tested.id)).status != "delivered":
                await asyncio.sleep(0.05)
            (found,) = [one async for one in client.webhooks.deliveries(made.id)]
            assert (found.id, found.event_type) == (tested.id, "webhook.test")
            assert (await client.webhooks.replay(made.id)).replayed == 1
            await there.wait_for(2)
        assert (await client.webhooks.rotate_secret(made.id, overlap_ms=0)).secret != made.secret
        await client.webhooks.delete(made.id)
        with pytest.raises(NotFoundError):
            await client.webhooks.get(made.id)


def test_tokens_and_usage(client: InferPipe, service: Service) -> None:
    started = client.execute_async("test-echo", {})
    path = f"/v1/executions/{started.id}/stream"
    token = client.stream_tokens.create(path, ttl_s=60).token
    answer = httpx.get(f"{service.url}{path}", params={"token": token}, timeout=10)
    assert "execution.completed" in answer.text
    item = client.usage(group_by="workflow").items[0]
    assert item.workflow
    assert item.requests


def run_cli(service: Service, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "inferpipe.cli", *words, "--base-url", service.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"INFERPIPE_API_KEY": API_KEY, "PATH": "/usr/bin:/bin"},
    )


def test_cli_runs_a_workflow(service: Service) -> None:
    done = run_cli(service, "run", "sentiment-analysis", "--input", '{"text": "I love it"}')
    assert done.returncode == 0, done.stderr
    assert jsonschema_rs.is_valid(SENTIMENT, json.loads(done.stdout))


def test_cli_streams_an_answer(service: Service) -> None:
    done = run_cli(service, "run", "chat-assistant", "--stream", "--input", json.dumps(FRANCE))
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
