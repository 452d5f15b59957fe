"""The way to the store: TLS with a self-made certificate, and a user with only what we need."""

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from serve_app.adapters import redis_calls
from serve_app.adapters.redis_bells import RedisBells, worker_channels
from serve_app.adapters.redis_blocking import call_blocking
from serve_app.adapters.redis_connect import RedisConnections, connect, redis_options
from serve_app.adapters.system import SystemClock
from serve_app.core.errors import StoreUnavailableError
from serve_app.settings import Settings
from tests.support.tcp_proxy import TcpProxy
from tests.support.valkey_cluster import flush


def self_signed(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = folder / f"{name}.pem", folder / f"{name}.key"
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_path, key_path


@pytest.fixture
async def tls_port(valkey_url: str, tmp_path: Path) -> AsyncIterator[int]:
    """The server behind TLS that asks for our certificate; the bundled one speaks none itself."""
    await flush(valkey_url)
    certificate, key = self_signed(tmp_path, "server")
    ours, _ = self_signed(tmp_path, "ours")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(ours))
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    proxy = TcpProxy.before(valkey_url)
    proxy.tls = context
    async with proxy:
        yield proxy.port


def settings_for(valkey_url: str, port: int, folder: Path, **changed: object) -> Settings:
    password = valkey_url.partition("://:")[2].partition("@")[0]
    given: dict[str, object] = {
        "redis_url": SecretStr(f"rediss://127.0.0.1:{port}/0"),
        "redis_password": SecretStr(password),
        "redis_ca_file": folder / "server.pem",
        "redis_cert_file": folder / "ours.pem",
        "redis_key_file": folder / "ours.key",
        "partitions": 4,
    }
    return Settings(**{**given, **changed})  # type: ignore[arg-type]


async def use(connections: RedisConnections) -> None:
    """Functions, plain commands and channels."""
    beat = await connections.store.heartbeat(0, "w", 1000, 1)
    assert beat.workers == ("w",)
    bells = RedisBells(connections.nodes, worker_channels("w", 4), SystemClock())
    async with bells.listen() as notices:
        channel = "ip:{0}:bell"
        assert await connections.calls.call("SPUBLISH", channel, b"\x91\xa5ready") == 1
        assert (await anext(notices)).partition == 0  # type: ignore[union-attr]


async def test_the_store_is_reached_over_tls(
    valkey_url: str, tls_port: int, tmp_path: Path
) -> None:
    settings = settings_for(valkey_url, tls_port, tmp_path)
    connections = connect(settings, SystemClock())
    await use(connections)
    await connections.close()
    asked = (redis_options(settings), "EXISTS", "ip:{0}:workers")
    assert await asyncio.to_thread(call_blocking, *asked) == 1


async def test_another_authority_is_not_believed(
    valkey_url: str, tls_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_calls, "RETRY_FOR_S", 0.1)
    settings = settings_for(valkey_url, tls_port, tmp_path, redis_ca_file=tmp_path / "ours.pem")
    connections = connect(settings, SystemClock())
    with pytest.raises(StoreUnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        await connections.store.live_workers()
    await connections.close()


async def test_a_wrong_password_is_said_at_once(
    valkey_url: str, tls_port: int, tmp_path: Path
) -> None:
    settings = settings_for(
        valkey_url, tls_port, tmp_path, redis_password=SecretStr("not the password")
    )
    connections = connect(settings, SystemClock())
    with pytest.raises(StoreUnavailableError, match="the store refuses"):
        await connections.store.live_workers()
    await connections.close()
