"""Definitions over HTTP, listing, and retries."""

from typing import Any

import httpx
import pytest

from tests.e2e.conftest import API_KEY, Service

PRICES = """
id: prices
description: Add up and label.
input: {type: object, required: [items], properties: {items: {type: array, items: {type: number}}}}
steps:
  - id: count
    transform: "{{ size(input.items) }}"
  - id: label
    when: "steps.count.output > 2"
    transform: {text: "{{ steps.count.output }} items"}
output: {count: "{{ steps.count.output }}", label: "{{ steps.label.output }}"}
"""
FAILING = {
    "steps": [
        {"id": "first", "echo": {"kept": "{{ input.n }}"}},
        {"id": "second", "needs": ["first"], "transform": "{{ 10 / input.n }}"},
    ]
}


@pytest.fixture
def http(service: Service) -> Any:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=30) as client:
        yield client


def put_yaml(http: httpx.Client, text: str) -> httpx.Response:
    kind = {"Content-Type": "application/yaml"}
    return http.put("/v1/workflows/prices", content=text, headers=kind)


def test_a_definition_lives_through_versions(http: httpx.Client) -> None:
    first = put_yaml(http, PRICES)
    assert (first.status_code, first.json()["version"]) == (201, 1)
    again = put_yaml(http, PRICES)
    assert (again.status_code, again.json()["version"]) == (200, 1)
    result = http.post("/v1/execute", json={"workflowId": "prices", "input": {"items": [1, 2, 3]}})
    assert result.json()["data"] == {"count": 3, "label": {"text": "3 items"}}
    few = http.post("/v1/execute", json={"workflowId": "prices", "input": {"items": [1]}}).json()
    assert few["data"] == {"count": 1, "label": None}
    steps = http.get(f"/v1/executions/{few['id']}").json()["steps"]
    assert [step["status"] for step in steps] == ["completed", "skipped"]

    second = put_yaml(http, PRICES.replace("> 2", "> 0"))
    assert (second.status_code, second.json()["version"]) == (200, 2)
    versions = http.get("/v1/workflows/prices/versions").json()["items"]
    assert [item["version"] for item in versions] == [2, 1]
    old = http.get("/v1/workflows/prices?version=1").json()
    assert old["steps"][1]["when"] == "steps.count.output > 2"
    assert put_yaml(http, PRICES.replace("> 2", "> 0")).json()["version"] == 2
    # What GET answers can be put back as it is.
    assert http.put("/v1/workflows/prices", json=old).json()["version"] == 3
    assert "prices" in [item["id"] for item in http.get("/v1/workflows").json()["items"]]
    assert http.delete("/v1/workflows/prices").status_code == 204
    assert http.get("/v1/workflows/prices").json()["code"] == "UNKNOWN_WORKFLOW"
    gone = http.post("/v1/execute", json={"workflowId": "prices", "input": {"items": []}})
    assert gone.json()["code"] == "UNKNOWN_WORKFLOW"


def test_a_shipped_definition_can_be_overridden(http: httpx.Client) -> None:
    shipped = http.get("/v1/workflows/test-echo").json()
    mine = {"steps": [{"id": "echo", "echo": {"mine": True}}]}
    assert http.put("/v1/workflows/test-echo", json=mine).json()["version"] > shipped["version"]
    body = {"workflowId": "test-echo", "input": {"x": 1}}
    assert eventually_data(http, body, {"mine": True}) == {"mine": True}
    assert http.delete("/v1/workflows/test-echo").status_code == 204
    assert eventually_data(http, body, {"x": 1}) == {"x": 1}


def eventually_data(http: httpx.Client, body: dict[str, Any], expected: object) -> object:
    """A new version counts within a second; each call is a look."""
    data: object = None
    for _ in range(300):
        data = http.post("/v1/execute", json=body).json()["data"]
        if data == expected:
            break
    return data


def test_validate_says_which_step_and_why(http: httpx.Client) -> None:
    wrong = {
        "steps": [
            {"id": "a", "transform": "{{ input. }}", "colour": "red"},
            {"id": "a", "echo": {"x": "{{ steps.later.output }}"}},
            {"id": "b", "map": {"over": "{{ input.list }}"}},
        ]
    }
    answer = http.post("/v1/workflows/wrong/validate", json=wrong).json()
    places = [".".join(map(str, error["loc"])) for error in answer["errors"]]
    assert answer["valid"] is False
    assert any(place.startswith("steps.0") for place in places)
    assert any(place.startswith("steps.1") for place in places)
    assert any(place.startswith("steps.2") for place in places)
    refused = http.put("/v1/workflows/wrong", json=wrong)
    assert (refused.status_code, refused.json()["code"]) == (422, "INVALID_WORKFLOW")
    assert len(refused.json()["errors"]) == len(answer["errors"])
    assert http.post("/v1/workflows/fine/validate", json=FAILING).json()["valid"] is True


def test_list_pages_newest_first(http: httpx.Client) -> None:
    http.put("/v1/workflows/listed", json={"steps": [{"id": "a", "echo": {}}]})
    body = {"workflowId": "listed", "input": {}}
    ids = [http.post("/v1/execute", json=body).json()["id"] for _ in range(7)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        params = {"workflowId": "listed", "limit": "3", **({"cursor": cursor} if cursor else {})}
        page = http.get("/v1/executions", params=params).json()
        seen += [item["id"] for item in page["items"]]
        assert all("data" not in item and "steps" not in item for item in page["items"])
        cursor = page["nextCursor"]
        if cursor is None:
            break
    assert sorted(seen) == sorted(ids)
    assert len(seen) == len(set(seen)) == 7
    completed = http.get("/v1/executions?workflowId=listed&status=completed").json()["items"]
    assert len(completed) == 7
    assert http.get("/v1/executions?workflowId=listed&status=failed").json()["items"] == []
    for bad in ("status=odd", "limit=0", "limit=x", "cursor=zzz"):
        assert http.get(f"/v1/executions?{bad}").status_code in (400, 422)


def test_retry_keeps_what_came_before(http: httpx.Client) -> None:
    http.put("/v1/workflows/failing", json=FAILING)
    failed = http.post("/v1/execute", json={"workflowId": "failing", "input": {"n": 0}}).json()
    assert (failed["status"], failed["errorCode"]) == ("failed", "STEP_FAILED")
    assert "second" in failed["error"]
    retried = http.post(f"/v1/executions/{failed['id']}/retry?fromStep=second")
    assert (retried.status_code, retried.json()["retryOf"]) == (202, failed["id"])
    with http.stream("GET", f"/v1/executions/{retried.json()['id']}/stream") as answer:
        events = [line for line in answer.iter_lines() if line.startswith("event: ")]
    assert events.count("event: step.started") == 1
    assert events[-1] == "event: execution.failed"
    record = http.get(f"/v1/executions/{retried.json()['id']}").json()
    assert record["retryOf"] == failed["id"]
    assert [(s["id"], s["status"]) for s in record["steps"]] == [
        ("first", "completed"),
        ("second", "failed"),
    ]
    unknown = http.post(f"/v1/executions/{failed['id']}/retry?fromStep=nope")
    assert unknown.status_code == 422
