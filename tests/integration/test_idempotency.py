"""Idempotency-Key on POSTs that create: one piece of work, one answer, no secret twice."""

import asyncio

import httpx
import pytest

from serve_app.adapters.redis_idempotency import RedisIdempotency
from serve_app.core.errors import StoreUnavailableError
from serve_app.ingress import idempotency
from serve_app.ports import ClaimState
from tests.integration.conftest import StoreBench
from tests.support.api import Api

KEY = {"Idempotency-Key": "order-1"}
WISH = {"name": "one", "scopes": ["read"]}


async def key_count(api: Api) -> int:
    return len((await api.http.get("/v1/keys")).json()["items"])


async def test_a_repeat_gets_the_first_answer_without_its_secret(api: Api) -> None:
    before = await key_count(api)
    first = await api.http.post("/v1/keys", json=WISH, headers=KEY)
    reordered = '{ "scopes":["read"], "name":"one" }'
    again = await api.http.post("/v1/keys", content=reordered, headers=KEY)
    assert (first.status_code, again.status_code) == (201, 201)
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    expected = first.json()
    secret = expected.pop("key")
    assert again.json() == {**expected, "secretShown": True}
    assert secret not in again.text
    assert await key_count(api) == before + 1


async def test_another_body_under_the_same_key_is_a_conflict(api: Api) -> None:
    await api.http.post("/v1/keys", json=WISH, headers=KEY)
    other = await api.http.post("/v1/keys", json={**WISH, "name": "two"}, headers=KEY)
    assert (other.status_code, other.json()["code"]) == (409, "IDEMPOTENCY_CONFLICT")


async def test_a_key_counts_within_its_route_and_its_workspace(api: Api) -> None:
    other = await api.new_workspace("second")
    made = [
        await api.http.post("/v1/keys", json=WISH, headers=KEY),
        await api.http.post("/v1/keys", json=WISH, headers={**KEY, **other}),
        await api.http.post("/v1/workspaces", json={"id": "third"}, headers=KEY),
    ]
    assert [answer.status_code for answer in made] == [201, 201, 201]
    assert not any("Idempotency-Replayed" in answer.headers for answer in made)


async def test_a_refusal_is_not_kept(api: Api) -> None:
    past = {**WISH, "expiresAt": "2001-01-01T00:00:00Z"}
    assert (await api.http.post("/v1/keys", json=past, headers=KEY)).status_code == 422
    assert (await api.http.post("/v1/keys", json=WISH, headers=KEY)).status_code == 201


async def test_two_at_once_make_one(api: Api) -> None:
    before = await key_count(api)
    answers = await asyncio.gather(
        *(api.http.post("/v1/keys", json=WISH, headers=KEY) for _ in range(8))
    )
    assert [answer.status_code for answer in answers] == [201] * 8
    assert sum("key" in answer.json() for answer in answers) == 1
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert await key_count(api) == before + 1


async def test_a_repeat_waits_so_long_and_no_longer(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "WAIT_S", 0.1)
    go_on = asyncio.Event()
    put = api.services.keys.put

    async def slow_put(*args: object) -> None:
        await go_on.wait()
        await put(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(api.services.keys, "put", slow_put)
    first = asyncio.ensure_future(api.http.post("/v1/keys", json=WISH, headers=KEY))
    while not api.services.loose_ends:
        await asyncio.sleep(0.005)
    early = await api.http.post("/v1/keys", json=WISH, headers=KEY)
    assert (early.status_code, early.json()["code"]) == (409, "IDEMPOTENCY_IN_PROGRESS")
    assert early.headers["Retry-After"] == "1"
    # The caller leaves; what it began is finished, and the repeat finds it.
    first.cancel()
    go_on.set()
    monkeypatch.setattr(idempotency, "WAIT_S", 30)
    again = await api.http.post("/v1/keys", json=WISH, headers=KEY)
    assert again.json()["secretShown"] is True


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_a_key_of_the_wrong_length_is_refused(api: Api, key: str) -> None:
    answer = await api.http.post("/v1/keys", json=WISH, headers={"Idempotency-Key": key})
    assert answer.status_code == 422


async def test_an_answer_that_cannot_be_kept_is_given_all_the_same(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*args: object) -> None:
        raise StoreUnavailableError("down")

    monkeypatch.setattr(api.services.idempotency, "finish", fail)
    answer: httpx.Response = await api.http.post("/v1/keys", json=WISH, headers=KEY)
    assert answer.status_code == 201
    assert answer.json()["key"]


async def test_a_claim_repeated_by_its_holder_is_still_its_own(bench: StoreBench) -> None:
    book, scope = RedisIdempotency(bench.calls), ("w", "/v1/keys", "k")
    for _ in range(2):  # as after a lost answer
        assert (await book.begin(scope, "h", "mine")).state is ClaimState.YOURS
    assert (await book.begin(scope, "h", "theirs")).state is ClaimState.BUSY
    await book.drop(scope, "theirs")
    await book.finish(scope, "theirs", b"stolen")
    assert (await book.begin(scope, "h", "theirs")).state is ClaimState.BUSY
    await book.finish(scope, "mine", b"answer")
    await book.drop(scope, "mine")
    assert (await book.begin(scope, "h", "theirs")).answer == b"answer"
    assert (await book.begin(scope, "other", "theirs")).state is ClaimState.CONFLICT
    [name] = await bench.keys("ip:{config}:once:*")
    assert 0 < await bench.client.pttl(name) <= 24 * 3600 * 1000


async def test_a_workspace_that_exists_gets_no_further_key(api: Api) -> None:
    other = await api.new_workspace("taken")
    assert (await api.http.post("/v1/workspaces", json={"id": "taken"})).status_code == 409
    listed = await api.http.get("/v1/keys", headers=other)
    assert len(listed.json()["items"]) == 1
