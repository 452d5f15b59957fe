"""Where requests of ours may go: a table of addresses and of spellings, no socket."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.egress import (
    DENIED,
    Network,
    check_url,
    parse_networks,
    parse_target,
    permitted,
    refusal,
)
from serve_app.core.errors import EgressRefusedError
from serve_app.settings import Settings

LOOPBACK = parse_networks(["127.0.0.1/32"])


def table(text: str) -> list[str]:
    return text.split()


REFUSED = table(
    """
0.0.0.0 0.0.0.1 0.255.255.255 10.0.0.0 10.1.2.3 10.255.255.255 100.64.0.0 100.100.100.200
100.127.255.255 127.0.0.0 127.0.0.1 127.0.0.2 127.1.2.3 127.255.255.255 168.63.129.16 169.254.0.1
169.254.169.253 169.254.169.254 169.254.170.2 169.254.255.255 172.16.0.1 172.20.0.1 172.31.255.255
192.0.0.1 192.0.0.8 192.0.0.170 192.0.0.192 192.0.2.1 192.31.196.1 192.52.193.1 192.88.99.1
192.168.0.0 192.168.1.1 192.168.255.255 192.175.48.1 198.18.0.0 198.19.255.255 198.51.100.7
203.0.113.7 224.0.0.1 224.0.0.251 233.252.0.1 239.255.255.250 240.0.0.1 250.1.2.3 255.255.255.254
255.255.255.255 :: ::1 ::2 ::7f00:1 ::127.0.0.1 ::10.0.0.1 ::8.8.8.8 ::ffff:0.0.0.0
::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:192.168.1.1 ::ffff:8.8.8.8
::ffff:0:127.0.0.1 64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b::8.8.8.8
64:ff9b:1::1 64:ff9b:1:ffff::10.0.0.1 100::1 100:0:0:1::1 200::1 1000::1 1fff:ffff::1 2001::1
2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:1::1 2001:2::1 2001:3::1 2001:4:112::1 2001:10::1
2001:20::1 2001:30::1 2001:1ff:ffff::1 2001:db8::1 2001:db8:ffff::1 2002:: 2002:7f00:1::1
2002:a00:1::1 2002:a9fe:a9fe::1 2002:c0a8:101::1 2002:808:808::1 2620:4f:8000::1 3fff::1
3fff:fff:ffff::1 4000::1 5f00::1 5fff::1 8000::1 e000::1 fc00::1 fcff::1 fd00::1 fd00:ec2::254
fd12:3456:789a::1 fd20:ce::254 fdff:ffff::1 fe00::1 fe80::1 fe80::a9fe:a9fe fe80::5efe:7f00:1
febf:ffff::1 fec0::1 feff::1 ff00::1 ff01::1 ff02::1 ff02::fb ff05::1:3 ff0e::1 ffff::1
"""
)

PUBLIC = table(
    """
1.0.0.1 1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255
128.0.0.1 168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0
191.255.255.255 192.0.1.0 192.0.3.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0
198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0 223.255.255.255 2001:200::1
2001:4860:4860::8888 2001:db7:ffff::1 2001:db9::1 2003::1 2400:cb00::1 2606:4700::1111
2620:4f:7fff::1 2620:4f:8001::1 2a00:1450::1 3000::1 3ffe:ffff::1
"""
)

ODD = [
    "http://2130706433/",
    "http://017700000001/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0x7F.1/",
    "http://127.1/",
    "http://127.0.1/",
    "http://127.0.0.1./",
    "http://0177.0.0.1/",
    "http://0177.0.0.01/",
    "http://127.0.0.01/",
    "http://127.0.0.0x1/",
    "http://1.2.3.4.5/",
    "http://256.1.1.1/",
    "http://999999999999/",
    "http://0/",
    "http://0x/",
    "http://1..1/",
    "http://.1/",
    "http://../",
    "http://./",
    "http://\uff11\uff12\uff17.0.0.1/",
    "http://127。0。0。1/",
    "http://①②⑦.0.0.1/",
    "http://localhost%00.example.com/",
    "http://%6c%6f%63%61%6c%68%6f%73%74/",
    "http://%31%32%37.0.0.1/",
    "http://bücher.example/",
    "http://exa mple.com/",
    "http://example.com/a b",
    "http://example.com/\r\nHost: x",
    "http://example.com/\t",
    "\thttp://example.com/",
    "http://example.com/\x00",
    "http://example.com/\u2028",
    "http://example.com\\@127.0.0.1/",
    "http:\\\\127.0.0.1\\",
    "http://user@example.com/",
    "http://user:secret@example.com/",
    "http://example.com@127.0.0.1/",
    "http://@example.com/",
    "http://:80/",
    "http:///path",
    "http://",
    "http:example.com",
    "//example.com/",
    "example.com",
    "/etc/passwd",
    "",
    "http://example.com:0/",
    "http://example.com:65536/",
    "http://example.com:http/",
    "http://example.com:-1/",
    "http://example..com/",
    "http://exam!ple.com/",
    "http://[::1/",
    "http://[localhost]/",
    "http://[1.2.3.4]/",
    "http://[v1.x]/",
    "http://[fe80::1%25eth0]/",
    "http://[::1%1]/",
    "http://" + "a" * 254 + "/",
    "http://example.com/" + "a" * 2048,
    "file:///etc/passwd",
    "ftp://example.com/",
    "gopher://example.com/",
    "dict://127.0.0.1:11211/",
    "ldap://example.com/",
    "unix:///var/run/docker.sock",
    "javascript:alert(1)",
    "data:text/plain,x",
    "ws://example.com/",
    "redis://127.0.0.1:6379/",
]


@pytest.mark.parametrize("address", REFUSED)
def test_a_special_address_is_refused(address: str) -> None:
    assert refusal(ip_address(address), ())
    assert refusal(ip_address(address), parse_networks(["93.184.0.0/16", "2606::/16"]))


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_permitted(address: str) -> None:
    assert refusal(ip_address(address), ()) is None


@pytest.mark.parametrize("network", DENIED, ids=str)
def test_both_ends_of_every_denied_network_are_refused(network: Network) -> None:
    assert refusal(network[0], ())
    assert refusal(network[-1], ())


@pytest.mark.parametrize("url", ODD)
def test_an_odd_url_is_refused_without_a_look_up(url: str) -> None:
    with pytest.raises(EgressRefusedError):
        parse_target(url)
    with pytest.raises(EgressRefusedError):
        check_url(url, parse_networks(["0.0.0.0/0", "::/0"]))


@pytest.mark.parametrize("address", REFUSED)
def test_a_literal_in_a_url_is_judged_at_once(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(EgressRefusedError):
        check_url(f"https://{host}:8443/hook?x=1", ())


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://example.com", "example.com", 80),
        ("HTTPS://Example.COM/hook?a=b#c", "example.com", 443),
        ("https://xn--bcher-kva.example:8443/", "xn--bcher-kva.example", 8443),
        ("http://a_b.example.", "a_b.example.", 80),
        ("http://1.1.1.1:81/", "1.1.1.1", 81),
        ("http://[2606:4700::1111]/", "2606:4700::1111", 80),
        ("http://7.example/", "7.example", 80),
    ],
)
def test_a_plain_url_is_taken_apart(url: str, host: str, port: int) -> None:
    target = check_url(url, ())
    assert (target.host, target.port) == (host, port)


def test_the_allow_list_permits_just_what_it_names() -> None:
    assert refusal(IPv4Address("127.0.0.1"), LOOPBACK) is None
    for other in ("127.0.0.2", "::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::127.0.0.1"):
        assert refusal(ip_address(other), LOOPBACK), other
    assert refusal(IPv6Address("::1"), parse_networks(["::1/128"])) is None


def test_a_scoped_address_is_refused_whatever_is_allowed() -> None:
    assert refusal(IPv6Address("fe80::1%eth0"), parse_networks(["::/0"])) == "scoped"


def test_of_several_addresses_only_permitted_ones_are_left() -> None:
    found = permitted("x", [IPv4Address("10.0.0.1"), IPv4Address("1.1.1.1")], ())
    assert found == (IPv4Address("1.1.1.1"),)


def test_a_refusal_does_not_tell_what_the_name_server_said() -> None:
    with pytest.raises(EgressRefusedError) as refused:
        permitted("inner.example", [IPv4Address("10.20.30.40")], ())
    assert "10.20" not in str(refused.value)


@pytest.mark.parametrize("text", ["10.0.0.1/8", "example.com", "127.0.0.1/33", ""])
def test_an_allow_list_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"appear|host bits"):
        parse_networks([text])


def test_the_setting_takes_networks_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERPIPE_EGRESS_ALLOW", "127.0.0.1/32, fd00::/8")
    assert Settings().egress_allow == ("127.0.0.1/32", "fd00::/8")
    monkeypatch.setenv("INFERPIPE_EGRESS_ALLOW", "everything")
    with pytest.raises(ValueError, match="egress_allow"):
        Settings()


@given(st.ip_addresses(v=4))
def test_ipv4_is_permitted_exactly_outside_the_table(address: IPv4Address) -> None:
    is_denied = any(address in net for net in DENIED if isinstance(net, IPv4Network))
    assert (refusal(address, ()) is not None) == is_denied


@given(st.ip_addresses(v=6))
def test_ipv6_outside_global_unicast_is_refused(address: IPv6Address) -> None:
    if address not in ip_network("2000::/3"):
        assert refusal(address, ())


@given(st.text(max_size=80))
def test_any_text_is_a_target_or_is_refused(text: str) -> None:
    for url in (text, f"http://{text}/", f"https://[{text}]/"):
        try:
            parse_target(url)
        except EgressRefusedError:
            continue
