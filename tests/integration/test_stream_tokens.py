"""Stream tokens over HTTP: a stream without a header, and nothing else."""

import logging

import pytest

from tests.support.api import Api

ECHO = {"workflowId": "test-echo", "input": {"a": 1}}


async def test_a_token_opens_one_stream_without_a_header(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ids = [(await api.http.post("/v1/execute", json=ECHO)).json()["id"] for _ in range(2)]
    path = f"/v1/executions/{ids[0]}/stream"
    made = await api.http.post("/v1/stream-tokens", json={"resource": path, "ttl": 60})
    assert made.status_code == 201
    token = made.json()["token"]
    assert made.json()["expiresAt"].endswith("Z")
    del api.http.headers["Authorization"]
    opened = await api.http.get(path, params={"token": token})
    assert opened.status_code == 200
    assert "execution.completed" in opened.text
    for elsewhere in (f"/v1/executions/{ids[1]}/stream", f"/v1/executions/{ids[0]}", "/v1/keys"):
        refused = await api.http.get(elsewhere, params={"token": token})
        assert (refused.status_code, refused.json()["code"]) == (401, "UNAUTHORIZED"), elsewhere
    own = [record for record in caplog.records if not record.name.startswith("httpx")]
    assert token not in "".join(str(vars(record)) for record in own)


async def test_a_token_shows_nothing_of_another_workspace(api: Api) -> None:
    execution_id = (await api.http.post("/v1/execute", json=ECHO)).json()["id"]
    path = f"/v1/executions/{execution_id}/stream"
    other = await api.new_workspace("second")
    made = await api.http.post("/v1/stream-tokens", json={"resource": path}, headers=other)
    del api.http.headers["Authorization"]
    answer = await api.http.get(path, params={"token": made.json()["token"]})
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("wish", "status"),
    [
        ({"resource": "/v1/keys"}, 422),
        ({"resource": "/stream/user/u", "ttl": 3601}, 422),
        ({"resource": "/stream/user/u", "ttl": 0}, 422),
        ({"resource": "/stream/user/u", "ttl": 3600}, 201),
        ({"resource": "/v1/ws"}, 403),
    ],
)
async def test_a_reader_gets_tokens_to_read(api: Api, wish: dict[str, object], status: int) -> None:
    reader = await api.new_key("read")
    answer = await api.http.post("/v1/stream-tokens", json=wish, headers=reader)
    assert answer.status_code == status
