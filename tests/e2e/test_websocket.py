"""Direct inference through the real service: HAProxy, Ray Serve, the router, vLLM with SmolLM2."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.e2e.conftest import API_KEY, Service

MODEL = "SmolLM2-135M-Instruct"
PATIENCE_S = 60


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=30) as client:
        yield client


@contextmanager
def socket(url: str, key: str = API_KEY) -> Iterator[ClientConnection]:
    with connect(url, additional_headers={"Authorization": f"Bearer {key}"}) as connection:
        yield connection


def any_host(service: Service) -> str:
    return f"ws://127.0.0.1:{service.port}/v1/ws"


def ask(connection: ClientConnection, prompt: str, request_id: str = "", **more: object) -> None:
    message: dict[str, Any] = {"type": "inference", "request": {"prompt": prompt, **more}}
    connection.send(json.dumps({**message, "request_id": request_id} if request_id else message))


def next_message(connection: ClientConnection) -> dict[str, Any]:
    return dict(json.loads(connection.recv(timeout=PATIENCE_S)))


def to_end(connection: ClientConnection) -> tuple[str, dict[str, Any]]:
    text = ""
    while (message := next_message(connection))["type"] == "stream_chunk":
        text += message["content"]
    return text, message


def hosts(http: httpx.Client) -> list[dict[str, Any]]:
    return list(http.get("/v1/hosts").json()["hosts"])


def wait_until(http: httpx.Client, *, is_busy: bool) -> None:
    """Until the hosts work, or work no more; reports come twice a second."""
    give_up = time.monotonic() + PATIENCE_S
    while any(host["load"] or host["queuedTokens"] for host in hosts(http)) != is_busy:
        assert time.monotonic() < give_up, hosts(http)
        time.sleep(0.1)


def test_a_host_can_be_found_and_talked_to(service: Service, http: httpx.Client) -> None:
    chosen = http.post("/v1/hosts/select", json={"model": MODEL}).json()
    assert (chosen["status"], chosen["models"]) == ("ready", [MODEL])
    with socket(f"{chosen['apiUrl']}/v1/ws") as connection:
        assert [ext.name for ext in connection.protocol.extensions] == ["permessage-deflate"]
        ask(connection, "What is the capital of France?", temperature=0, max_tokens=20)
        text, end = to_end(connection)
    assert "Paris" in text
    assert end["finish_reason"] == "stop"
    assert end["usage"]["prompt_tokens"] > 5
    assert end["usage"]["completion_tokens"] > 3


def test_a_host_that_is_not_there_takes_nothing(service: Service) -> None:
    with socket(f"ws://127.0.0.1:{service.port}/hosts/nobody/v1/ws") as connection:
        ask(connection, "hi")
        assert to_end(connection)[1]["error"]["code"] == "NO_HOSTS_AVAILABLE"
    with socket(any_host(service)) as connection:
        ask(connection, "hi", model="no-such-model")
        assert to_end(connection)[1]["error"]["code"] == "MODEL_NOT_AVAILABLE"
        ask(connection, "word " * 20_000)
        assert to_end(connection)[1]["error"]["code"] == "INVALID_PROMPT"


def test_a_wrong_key_is_told_so_and_closed(service: Service) -> None:
    with socket(any_host(service), "ip_nobody-knows-this-key") as connection:
        assert next_message(connection)["error"]["code"] == "UNAUTHORIZED"
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=PATIENCE_S)
        assert connection.close_code == 1008


def test_many_requests_share_a_socket_and_one_of_them_is_cancelled(
    service: Service, http: httpx.Client
) -> None:
    ids = [f"r{index}" for index in range(8)]
    with socket(any_host(service)) as connection:
        for request_id in ids:
            ask(connection, "Tell me a long story.", request_id, temperature=0, max_tokens=24)
        ask(connection, "Tell me a very long story.", "endless", max_tokens=400, temperature=0)
        texts, ends = dict.fromkeys([*ids, "endless"], ""), {}
        while len(ends) < len(texts):
            message = next_message(connection)
            request_id = message["request_id"]
            if message["type"] == "stream_end":
                ends[request_id] = message["finish_reason"]
                continue
            texts[request_id] += message["content"]
            if request_id == "endless":
                connection.send(json.dumps({"type": "cancel", "request_id": "endless"}))
    assert ends.pop("endless") == "cancelled"
    assert set(ends.values()) == {"length"}
    assert all(text for text in texts.values())
    wait_until(http, is_busy=False)


def test_leaving_ends_the_work_in_the_engine(service: Service, http: httpx.Client) -> None:
    with socket(any_host(service)) as connection:
        ask(connection, "Tell me a very long story.", max_tokens=1500, temperature=0)
        assert next_message(connection)["type"] == "stream_chunk"
        wait_until(http, is_busy=True)
        left_at = time.monotonic()
    wait_until(http, is_busy=False)
    assert time.monotonic() - left_at < 20  # 1500 tokens take half a minute here, and more


def test_a_session_remembers_until_it_ends(service: Service, http: httpx.Client) -> None:
    wish = {"model": MODEL, "system": "You answer in one short sentence."}
    session = http.post("/v1/sessions", json=wish).json()["id"]
    with socket(any_host(service)) as connection:
        for prompt in (
            "What is the capital of France?",
            "And of Italy?",
            "Which two cities did you name?",
        ):
            ask(connection, prompt, session_id=session, temperature=0, max_tokens=30)
            text, end = to_end(connection)
            assert end["type"] == "stream_end", end
    assert "Paris" in text
    assert "Rome" in text
    said = http.get(f"/v1/sessions/{session}/messages").json()["items"]
    assert [item["role"] for item in said] == ["system", *["user", "assistant"] * 3]
    assert said[-1]["content"] == text
    assert http.delete(f"/v1/sessions/{session}").status_code == 204
    with socket(any_host(service)) as connection:
        ask(connection, "Still there?", session_id=session)
        assert to_end(connection)[1]["error"]["code"] == "UNKNOWN_SESSION"


def test_a_turn_finds_the_turns_before_it_in_the_cache(
    service: Service, http: httpx.Client
) -> None:
    session = http.post("/v1/sessions", json={"model": MODEL}).json()["id"]
    cached, prompts = [], []
    with socket(any_host(service)) as connection:
        for number in range(4):
            # Longer than a block of the CPU engine's cache, 128 tokens.
            prompt = f"Item {number}: " + "one more word " * 50
            ask(connection, prompt, session_id=session, temperature=0, max_tokens=4)
            usage = to_end(connection)[1]["usage"]
            cached.append(usage["cached_tokens"])
            prompts.append(usage["prompt_tokens"])
    assert cached[0] < cached[1] < cached[2] < cached[3]
    for before, found in zip(prompts, cached[1:], strict=False):
        assert before - 128 <= found
