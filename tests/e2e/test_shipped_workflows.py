"""Each shipped workflow on the real model: its answer has the contract's shape, and some sense."""

from typing import Any

import httpx
import pytest

from tests.e2e.conftest import API_KEY, Service

TOWER = (
    "The Eiffel Tower is a wrought-iron lattice tower in Paris, France. It was built by the "
    "company of Gustave Eiffel from 1887 to 1889 as the centerpiece of the 1889 World's Fair. "
    "Although first criticised by some of France's leading artists, it has become a global "
    "cultural icon. Nearly six million people visited it in 2022."
)
INVOICE = (
    "Invoice 4711. Acme GmbH, Berlin, bills Example Ltd for consulting in March: 12 hours at "
    "90 EUR, total 1080 EUR plus 19 % VAT. Payment is due within 14 days by bank transfer."
)


@pytest.fixture
def http(service: Service) -> Any:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client:
        yield client


def data_of(http: httpx.Client, workflow_id: str, given: dict[str, Any]) -> Any:
    answer = http.post("/v1/execute", json={"workflowId": workflow_id, "input": given})
    result = answer.json()
    assert result["status"] == "completed", result
    assert result["usage"]["completionTokens"] > 0
    return result["data"]


@pytest.mark.parametrize(
    ("content", "approved"),
    [
        ("You are scum and I will beat you.", False),
        ("Kill yourself, you moron.", False),
        ("We visited the museum and saw old paintings.", True),
        ("Our team won the match yesterday!", True),
    ],
)
def test_moderation_tells_abuse_from_small_talk(
    http: httpx.Client, content: str, approved: bool
) -> None:
    data = data_of(http, "content-moderation", {"content": content, "contentId": "c1"})
    assert data["approved"] is approved
    assert data["reason"]
    assert data["contentId"] == "c1"


def test_moderation_names_no_content_id_when_none_was_given(http: httpx.Client) -> None:
    data = data_of(http, "content-moderation", {"content": "The soup was warm.", "userId": "u1"})
    assert set(data) == {"approved", "reason"}


def test_translation_leaves_english(http: httpx.Client) -> None:
    given = {"text": "Hello, how are you?", "targetLanguage": "Spanish"}
    data = data_of(http, "translation", given)
    assert set(data) == {"translation"}
    assert "cómo estás" in data["translation"].lower()


def test_marketing_copy_speaks_of_the_product(http: httpx.Client) -> None:
    given = {"productId": "Garden chair", "description": "Made of oak, stackable, weatherproof."}
    data = data_of(http, "marketing-copy-generator", given)
    assert set(data) == {"copy"}
    assert len(data["copy"]) > 40
    assert any(word in data["copy"].lower() for word in ("chair", "oak", "garden"))


def test_enhancement_mends_spelling(http: httpx.Client) -> None:
    given = {"content": "teh meeting is tommorow at 3, pls come its importnt"}
    data = data_of(http, "content-enhancement", given)
    assert set(data) == {"content"}
    assert "The meeting" in data["content"]
    assert "tommorow" not in data["content"]


@pytest.mark.parametrize("workflow_id", ["document-analysis", "document-processing"])
def test_document_analysis_summarises_and_names_keywords(
    http: httpx.Client, workflow_id: str
) -> None:
    given = {"document": TOWER, "metadata": {"source": "guide"}}
    data = data_of(http, workflow_id, given)
    assert set(data) == {"summary", "keywords", "metadata"}
    assert "Eiffel" in data["summary"]
    assert any("Eiffel" in keyword for keyword in data["keywords"])
    assert len(set(data["keywords"])) == len(data["keywords"])
    assert data["metadata"] == {"source": "guide"}


def test_document_analysis_ends_on_a_text_the_model_is_bad_at(http: httpx.Client) -> None:
    data = data_of(http, "document-analysis", {"document": INVOICE})
    assert data["summary"]
    assert 1 <= len(data["keywords"]) <= 6
