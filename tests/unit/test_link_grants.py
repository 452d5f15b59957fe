"""Grants: signed, for one replica, for a while, once."""

from dataclasses import replace

import pytest

from serve_app.core.errors import ConnectionFailedError, ForbiddenError, OverloadedError
from serve_app.core.grants import GrantLedger, is_signed, sign_grant
from serve_app.core.inference import Grant

SECRET = b"cluster secret"


def grant(request_id: str = "r1", expires_at_ms: int = 1000) -> Grant:
    return sign_grant(SECRET, request_id, ("replica-1", "127.0.0.1", 4000), expires_at_ms)


def test_signed_grant_is_accepted_once() -> None:
    ledger = GrantLedger(SECRET, "replica-1")
    ledger.spend(grant(), now_ms=999)
    with pytest.raises(ForbiddenError, match="used"):
        ledger.spend(grant(), now_ms=999)


@pytest.mark.parametrize(
    "change",
    [
        {"request_id": "r2"},
        {"replica_id": "replica-2"},
        {"host": "127.0.0.2"},
        {"port": 4001},
        {"expires_at_ms": 1001},
        {"signature": ""},
        {"signature": "é"},
        {"signature": "\ud800"},
    ],
)
def test_changing_any_member_breaks_the_signature(change: dict[str, object]) -> None:
    changed = replace(grant(), **change)  # type: ignore[arg-type]
    assert not is_signed(SECRET, changed)
    with pytest.raises(ForbiddenError, match="signature"):
        GrantLedger(SECRET, changed.replica_id).spend(changed, now_ms=0)


def test_another_secret_does_not_sign() -> None:
    assert not is_signed(b"other", grant())


@pytest.mark.parametrize(("now_ms", "is_accepted"), [(999, True), (1000, False), (1001, False)])
def test_grant_expires(now_ms: int, is_accepted: bool) -> None:
    ledger = GrantLedger(SECRET, "replica-1")
    if is_accepted:
        ledger.spend(grant(), now_ms)
    else:
        with pytest.raises(ConnectionFailedError, match="expired"):
            ledger.spend(grant(), now_ms)


def test_grant_for_another_replica_sends_the_caller_back_to_the_router() -> None:
    with pytest.raises(ConnectionFailedError, match="another replica"):
        GrantLedger(SECRET, "replica-2").spend(grant(), now_ms=0)


def test_full_ledger_refuses_until_grants_expire() -> None:
    ledger = GrantLedger(SECRET, "replica-1", size_max=2)
    ledger.spend(grant("a", 100), now_ms=0)
    ledger.spend(grant("b", 200), now_ms=0)
    with pytest.raises(OverloadedError):
        ledger.spend(grant("c", 300), now_ms=99)
    ledger.spend(grant("c", 300), now_ms=100)
    with pytest.raises(ForbiddenError, match="used"):
        ledger.spend(grant("b", 200), now_ms=100)
