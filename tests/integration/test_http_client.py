"""The guarded client end to end, on loopback only."""

import datetime
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from serve_app.adapters.aiohttp_http import GuardedHttp
from serve_app.core.egress import parse_networks
from serve_app.core.errors import DeadlineExceededError, EgressRefusedError, ExchangeFailedError
from serve_app.ports import HttpAnswer, HttpRequest
from tests.support.receiver import drip, hang, receiver, status

ALLOWED = parse_networks(["127.0.0.1/32"])


@pytest.fixture
async def http() -> AsyncIterator[GuardedHttp]:
    client = GuardedHttp(ALLOWED)
    yield client
    await client.close()


async def post(
    client: GuardedHttp, url: str, timeout_s: float = 10, size_max: int = 1000
) -> HttpAnswer:
    request = HttpRequest("POST", url, {"X-Test": "yes"}, b"{}", timeout_s, size_max)
    return await client.request(request)


async def test_an_allowed_address_is_reached(http: GuardedHttp) -> None:
    async with receiver(status(201, b"made", X_Thing="1")) as there:
        answer = await post(http, there.url)
    assert answer == HttpAnswer(201, {"content-length": "4", "x-thing": "1"}, b"made", is_cut=False)
    assert there.got[0].body == b"{}"
    assert there.got[0].headers["x-test"] == "yes"
    assert there.got[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("bind", "host"),
    [
        ("127.0.0.2", "127.0.0.2"),
        ("::1", "[::1]"),
        ("127.0.0.1", "2130706433"),
        ("127.0.0.1", "0x7f.1"),
        ("127.0.0.1", "0177.0.0.1"),
        ("127.0.0.1", "127.1"),
        ("127.0.0.1", "[::ffff:127.0.0.1]"),
        ("127.0.0.1", "[::ffff:7f00:1]"),
        ("127.0.0.1", "0.0.0.0"),
        ("127.0.0.1", "user@127.0.0.1"),
    ],
)
async def test_what_is_not_allowed_sees_no_connection(
    http: GuardedHttp, bind: str, host: str
) -> None:
    async with receiver(status(200), host=bind) as there:
        with pytest.raises(EgressRefusedError):
            await post(http, f"http://{host}:{there.port}/")
    assert there.connections == 0


async def test_an_open_and_a_closed_port_of_a_refused_address_look_the_same(
    http: GuardedHttp,
) -> None:
    texts = set()
    async with receiver(status(200), host="127.0.0.2") as there:
        for port in (there.port, _closed_port("127.0.0.2")):
            with pytest.raises(EgressRefusedError) as refused:
                await post(http, f"http://127.0.0.2:{port}/")
            texts.add(str(refused.value))
    assert len(texts) == 1


async def test_a_redirect_is_an_answer_and_is_not_followed(http: GuardedHttp) -> None:
    async with (
        receiver(status(200), host="127.0.0.2") as inner,
        receiver(status(307, Location=inner.url)) as there,
    ):
        assert (await post(http, there.url)).status == 307
    assert inner.connections == 0


async def test_the_system_s_resolver_passes_the_same_guard(http: GuardedHttp) -> None:
    """`localhost` is 127.0.0.1 and often ::1: only the permitted one is connected to."""
    async with receiver(status(200)) as there:
        assert (await post(http, f"http://localhost:{there.port}/")).status == 200
    closed = GuardedHttp(())
    with pytest.raises(EgressRefusedError):
        await post(closed, f"http://localhost:{there.port}/")
    await closed.close()


async def test_a_name_whose_answer_changes_is_judged_by_what_is_connected_to() -> None:
    answers: list[Sequence[str]] = [["127.0.0.1"], ["127.0.0.2"], [], ["127.0.0.2", "127.0.0.1"]]
    asked: list[str] = []

    async def look_up(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    async with (
        receiver(status(200), host="127.0.0.2") as inner,
        receiver(status(200)) as there,
    ):
        outcomes = []
        for number in range(4):
            # A new client each time: else it remembers a name for some seconds.
            client = GuardedHttp(ALLOWED, look_up=look_up)
            try:
                answer = await post(client, f"http://a.example:{there.port}/")
                outcomes.append(str(answer.status))
            except (EgressRefusedError, ExchangeFailedError) as error:
                outcomes.append(type(error).__name__)
            await client.close()
            assert len(asked) == number + 1, "one look-up each: none between check and connect"
    assert outcomes == ["200", "EgressRefusedError", "ExchangeFailedError", "200"]
    assert inner.connections == 0


async def test_the_last_gate_is_the_socket_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the resolver's own check gone, no connection would be made all the same."""
    monkeypatch.setattr("serve_app.adapters.aiohttp_http.permitted", lambda _h, found, _a: found)

    async def look_up(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.2"]

    client = GuardedHttp(ALLOWED, look_up=look_up)
    async with receiver(status(200), host="127.0.0.2") as inner:
        with pytest.raises(EgressRefusedError):
            await post(client, f"http://a.example:{inner.port}/")
    await client.close()
    assert inner.connections == 0


async def test_a_proxy_of_the_environment_is_not_used(
    http: GuardedHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receiver(status(200)) as proxy, receiver(status(204)) as there:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert (await post(http, there.url)).status == 204
    assert proxy.connections == 0


async def test_a_hanging_server_is_left_in_time(http: GuardedHttp) -> None:
    async with receiver(hang) as there:
        with pytest.raises(DeadlineExceededError):
            await post(http, there.url, timeout_s=0.3)


async def test_a_dripping_answer_is_cut_by_the_total_time(http: GuardedHttp) -> None:
    async with receiver(drip) as there:
        with pytest.raises(DeadlineExceededError):
            await post(http, there.url, timeout_s=0.5, size_max=100_000)


async def test_a_large_answer_is_read_up_to_the_bound(http: GuardedHttp) -> None:
    async with receiver(status(200, b"x" * 10_000_000)) as there:
        answer = await post(http, there.url, size_max=1000)
        assert answer.body == b"x" * 1000
        assert answer.is_cut
        exact = status(200, b"y" * 1000)
        there.answer = exact
        assert (await post(http, there.url, size_max=1000)).is_cut is False


async def test_nobody_listening_is_a_failed_exchange(http: GuardedHttp) -> None:
    with pytest.raises(ExchangeFailedError, match="no connection"):
        await post(http, f"http://127.0.0.1:{_closed_port('127.0.0.1')}/")


async def test_garbage_is_a_failed_exchange(http: GuardedHttp) -> None:
    async def garbage(got: object, writer: object) -> None:
        writer.write(b"\x00\xff not http\r\n\r\n")  # type: ignore[attr-defined]
        writer.close()  # type: ignore[attr-defined]

    async with receiver(garbage) as there:
        with pytest.raises(ExchangeFailedError):
            await post(http, there.url)


async def test_a_header_that_would_split_the_request_is_refused(http: GuardedHttp) -> None:
    async with receiver(status(200)) as there:
        request = HttpRequest("POST", there.url, {"X-A": "b\r\nX-C: d"}, b"", 5, 10)
        with pytest.raises(ExchangeFailedError):
            await http.request(request)


async def test_a_certificate_must_be_vouched_for(http: GuardedHttp, tmp_path: Path) -> None:
    server, authority = _self_signed(tmp_path)
    async with receiver(status(200), tls=server) as there:
        with pytest.raises(ExchangeFailedError, match="TLS"):
            await post(http, there.url)
        assert there.got == []
        trusting = GuardedHttp(ALLOWED, tls=ssl.create_default_context(cafile=str(authority)))
        assert (await post(trusting, there.url)).status == 200
        with pytest.raises(ExchangeFailedError, match="TLS"):  # not the name it was made for
            await post(trusting, f"https://localhost:{there.port}/")
        await trusting.close()


def _closed_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _self_signed(folder: Path) -> tuple[ssl.SSLContext, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "receiver")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = folder / "certificate.pem", folder / "key.pem"
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_path, key_path)
    return context, certificate_path
