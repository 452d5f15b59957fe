"""Who hears of what, what is signed how, and what an owner may put in."""

import base64
import json
from dataclasses import replace
from itertools import product

import pytest
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from serve_app.adapters.aesgcm_vault import AesGcmVault
from serve_app.adapters.system import SystemClock, SystemEntropy
from serve_app.core.errors import InvalidRequestError, SealBrokenError
from serve_app.core.execution import Execution, Status, new_execution
from serve_app.core.webhooks import (
    EVENT_OF,
    HEADERS_MAX,
    Secret,
    Webhook,
    WebhookSecrets,
    check_events,
    check_headers,
    delivery_id,
    event,
    event_id,
    new_secret,
    queue_partition,
    signed_headers,
    webhook_id,
)
from serve_app.services.endings import Endings
from serve_app.services.webhooks import WebhookKeeper
from tests.support.workflows import CREATED

ENTROPY = SystemEntropy()
HOOK = Webhook("whk_03abc", "default", "https://x.example/", ("*",), ("async",), 1, "")
NOW_MS = SystemClock().now_ms()


def an_end(status: Status = Status.COMPLETED, **created: object) -> Execution:
    new = new_execution("exe_01xyz", replace(CREATED, **created))
    return replace(new, status=status, completed_at_ms=1_763_700_000_123, data={"a": 1})


@pytest.mark.parametrize(("status", "name"), list(product(EVENT_OF, EVENT_OF.values())))
def test_an_endpoint_hears_the_events_it_names(status: Status, name: str) -> None:
    assert replace(HOOK, events=(name,)).hears(an_end(status)) == (EVENT_OF[status] == name)
    assert HOOK.hears(an_end(status))


@pytest.mark.parametrize(("mode", "heard"), list(product(["async", "sync", "stream"], repeat=2)))
def test_an_endpoint_hears_the_modes_it_names(mode: str, heard: str) -> None:
    assert replace(HOOK, modes=(heard,)).hears(an_end(mode=mode)) == (mode == heard)


def test_an_endpoint_may_be_for_one_workflow_and_off() -> None:
    assert replace(HOOK, workflow_id=CREATED.workflow_id).hears(an_end())
    assert not replace(HOOK, workflow_id="other").hears(an_end())
    assert not replace(HOOK, enabled=False).hears(an_end())


def test_ids_are_derived_and_name_their_partition() -> None:
    assert event_id("exe_0aXYZ") == "evt_0aXYZ"
    one = delivery_id("whk_03abc", "evt_1")
    assert one == delivery_id("whk_03abc", "evt_1") != delivery_id("whk_03abd", "evt_1")
    assert queue_partition(one, 16) == queue_partition(webhook_id(3, "t"), 16) == 3
    for bad in ("", "whk_", "whk_0", "whk_zz1", "exe_03abc", "whk_10abc", "whk_-1abc", "dlv_+1a"):
        assert queue_partition(bad, 16) is None


def test_a_secret_holds_256_bits_and_is_standard_base64() -> None:
    secret = new_secret(ENTROPY.token(), ENTROPY.token())
    assert secret.startswith("whsec_")
    assert len(base64.b64decode(secret[6:], validate=True)) == 32


def test_both_verifiers_accept_and_each_refuses_what_was_changed() -> None:
    secret, other = (new_secret(ENTROPY.token(), ENTROPY.token()) for _ in range(2))
    body = json.dumps({"x": "ü"}).encode()
    headers = signed_headers("evt_1", body, [secret], NOW_MS)
    assert Verifier(secret).verify(body, headers) == {"x": "ü"}
    old = signed_headers("evt_1", body, [secret], NOW_MS - 600_000)
    for verifier, payload, sent in (
        (Verifier(other), body, headers),
        (Verifier(secret), body + b" ", headers),
        (Verifier(secret), body, {**headers, "webhook-id": "evt_2"}),
        (Verifier(secret), body, old),
    ):
        with pytest.raises(WebhookVerificationError):
            verifier.verify(payload, sent)


def test_during_an_overlap_both_secrets_sign_and_the_guide_s_header_keeps_the_old() -> None:
    first, second = (new_secret(ENTROPY.token(), ENTROPY.token()) for _ in range(2))
    kept = WebhookSecrets((Secret(first),)).rotated(second, NOW_MS, 1000)
    assert kept.live(NOW_MS) == (second, first)
    assert kept.live(NOW_MS + 1000) == (second,)
    headers = signed_headers("evt_1", b"{}", kept.live(NOW_MS), NOW_MS)
    for secret in (first, second):
        Verifier(secret).verify(b"{}", headers)
    alone = signed_headers("evt_1", b"{}", [first], NOW_MS)
    assert headers["x-inferpipe-signature"] == alone["x-inferpipe-signature"]


def test_a_rotation_without_overlap_or_within_one_ends_the_older_secret() -> None:
    kept = WebhookSecrets((Secret("a"),)).rotated("b", 0, 1000)
    assert kept.rotated("c", 10, 0).live(10) == ("c",)
    assert kept.rotated("c", 10, 1000).live(10) == ("c", "b")


@pytest.mark.parametrize("name", ["", "execution.completed", "workflow.*", "WORKFLOW.COMPLETED"])
def test_an_unknown_event_is_refused_with_its_place(name: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_events(["workflow.failed", name])
    assert refused.value.problems[0].loc == ("body", "events", 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", "x"),
        ("a b", "x"),
        ("a:b", "x"),
        ("a\r\nb", "x"),
        ("ä", "x"),
        ("x" * 101, "x"),
        ("Host", "x"),
        ("Connection", "close"),
        ("Transfer-Encoding", "chunked"),
        ("content-length", "1"),
        ("Upgrade", "h2c"),
        ("Proxy-Authorization", "x"),
        ("X-InferPipe-Signature", "x"),
        ("x-inferpipe-anything", "x"),
        ("Webhook-Id", "x"),
        ("ok", "a\r\nb: c"),
        ("ok", "a\nb"),
        ("ok", "a\x00"),
        ("ok", " a"),
        ("ok", "ä"),
        ("ok", "x" * 1025),
    ],
)
def test_a_header_that_could_do_harm_is_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidRequestError):
        check_headers({name: value})


def test_plain_headers_are_taken_up_to_the_bound() -> None:
    assert check_headers({"Authorization": "Bearer x", "X-T": ""}) == {
        "authorization": "Bearer x",
        "x-t": "",
    }
    check_headers({f"h{n}": "" for n in range(HEADERS_MAX)})
    with pytest.raises(InvalidRequestError):
        check_headers({f"h{n}": "" for n in range(HEADERS_MAX + 1)})


def test_what_is_sealed_opens_only_in_its_place() -> None:
    keeper = WebhookKeeper(AesGcmVault(b"cluster secret", ENTROPY))
    kept = WebhookSecrets((Secret("whsec_new"), Secret("whsec_old", 5)), {"a": "b"})
    sealed = keeper.seal(HOOK, kept)
    assert "whsec" not in sealed.sealed
    assert keeper.open(sealed) == kept
    assert keeper.seal(HOOK, kept).sealed != sealed.sealed
    other_key = WebhookKeeper(AesGcmVault(b"another secret", ENTROPY))
    for opener, moved in (
        (keeper, replace(sealed, workspace="other")),
        (keeper, replace(sealed, id="whk_03abd")),
        (keeper, replace(sealed, sealed=sealed.sealed[:-6] + "AAAA==")),
        (keeper, replace(sealed, sealed="")),
        (keeper, replace(sealed, sealed="v1.no base64!")),
        (other_key, sealed),
    ):
        with pytest.raises(SealBrokenError):
            opener.open(moved)


class Known:
    """A webhook store with fixed members."""

    def __init__(self, *webhooks: Webhook) -> None:
        self.webhooks = webhooks
        self.asked: list[tuple[str, int]] = []

    async def known(self, workspace: str, not_before_ms: int = 0) -> tuple[Webhook, ...]:
        self.asked.append((workspace, not_before_ms))
        return self.webhooks


def endings_over(store: Known, output_max: int = 1000) -> Endings:
    return Endings(store, 16, output_max, lambda eid: f"http://h/v1/executions/{eid}")  # type: ignore[arg-type]


async def test_an_end_becomes_one_message_for_each_endpoint_that_hears_it() -> None:
    deaf = replace(HOOK, id="whk_05def", events=("workflow.failed",))
    store = Known(HOOK, deaf, replace(HOOK, id="whk_0a123"))
    end = an_end(metadata={"m": 1})
    sent = await endings_over(store).outgoing(end)
    assert store.asked == [(end.created.workspace, end.created.at_ms)]
    assert [one.target_partition for one in sent] == [3, 10]
    assert sent[0].message_id == delivery_id(HOOK.id, "evt_01xyz")
    assert sent[0].log == "webhook:whk_03abc:default:evt_01xyz:workflow.completed"
    assert sent[0].body == sent[1].body
    told = json.loads(sent[0].body)
    assert told == event("evt_01xyz", "workflow.completed", 1_763_700_000_123, told["data"])
    assert told["createdAt"] == "2025-11-21T04:40:00.123Z"
    assert told["data"]["output"] == {"a": 1}
    assert told["data"]["metadata"] == {"m": 1}
    assert await endings_over(store).outgoing(end) == sent


@pytest.mark.parametrize(("length", "is_cut"), [(97, False), (98, False), (99, True)])
async def test_an_output_over_the_bound_is_left_out(length: int, is_cut: bool) -> None:
    end = replace(an_end(), data="x" * length)
    (sent,) = await endings_over(Known(HOOK), output_max=100).outgoing(end)
    data = json.loads(sent.body)["data"]
    assert (data["output"] is None) == is_cut
    assert data.get("outputUrl") == ("http://h/v1/executions/exe_01xyz" if is_cut else None)


async def test_metadata_over_the_bound_is_left_out_too() -> None:
    end = an_end(metadata={"m": "x" * 100})
    (sent,) = await endings_over(Known(HOOK), output_max=100).outgoing(end)
    data = json.loads(sent.body)["data"]
    assert data["metadata"] is None
    assert data["output"] == {"a": 1}
