"""Where our own requests may go: webhooks, HTTP steps, file fetches.

Owns the deny table and the spelling of URLs. Opens no socket and asks no name server: the adapter
resolves, hands every address in, and connects to nothing that was not permitted here. Invariant:
an address is judged as it will be connected to. What is not plainly global unicast is refused,
whatever it is mapped, translated or tunnelled to; only the operator's allow-list overrides that.

`ipaddress.is_global` is not used: that of Python 3.11 lets NAT64, 6to4, multicast and site-local
addresses through. Sources: IANA's special-purpose address registries (RFC 6890 and its updates).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_network,
)
from types import MappingProxyType
from urllib.parse import urlsplit

from serve_app.core.errors import EgressRefusedError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

URL_LENGTH_MAX = 2048
_PORT_MAX = 65535
_DEFAULT_PORTS = MappingProxyType({"http": 80, "https": 443})
_NAME_LENGTH_MAX = 253  # RFC 1035
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
_GLOBAL_UNICAST_V6 = IPv6Network("2000::/3")  # all that IANA has given out; the rest is refused

DENIED: Mapping[Network, str] = MappingProxyType(
    {
        ip_network(text): reason
        for text, reason in {
            "0.0.0.0/8": "this host",
            "10.0.0.0/8": "private",
            "100.64.0.0/10": "shared by a carrier (CGNAT)",
            "127.0.0.0/8": "loopback",
            "168.63.129.16/32": "a cloud's metadata",
            "169.254.0.0/16": "link-local, metadata",
            "172.16.0.0/12": "private",
            "192.0.0.0/24": "protocol assignments",
            "192.0.2.0/24": "documentation",
            "192.31.196.0/24": "AS112",
            "192.52.193.0/24": "multicast tunnels (AMT)",
            "192.88.99.0/24": "6to4 relay",
            "192.168.0.0/16": "private",
            "192.175.48.0/24": "AS112",
            "198.18.0.0/15": "benchmarks",
            "198.51.100.0/24": "documentation",
            "203.0.113.0/24": "documentation",
            "224.0.0.0/4": "multicast",
            "240.0.0.0/4": "reserved, broadcast",
            "::/128": "this host",
            "::1/128": "loopback",
            "::ffff:0:0/96": "IPv4-mapped",
            "::ffff:0:0:0/96": "IPv4-translated",
            "::/96": "IPv4-compatible",
            "64:ff9b::/96": "NAT64",
            "64:ff9b:1::/48": "NAT64",
            "100::/64": "discard",
            "2001::/32": "Teredo",
            "2001::/23": "protocol assignments",
            "2001:db8::/32": "documentation",
            "2002::/16": "6to4",
            "2620:4f:8000::/48": "AS112",
            "3fff::/20": "documentation",
            "5f00::/16": "segment routing",
            "fc00::/7": "unique local, metadata",
            "fe80::/10": "link-local",
            "fec0::/10": "site-local",
            "ff00::/8": "multicast",
        }.items()
    }
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL leads. `literal` is set where it names an address and not a name."""

    scheme: str
    host: str
    port: int
    literal: Address | None


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """The operator's allow-list.

    Raises:
        ValueError: one is no network, or has host bits set (`10.0.0.1/8`).
    """
    return tuple(ip_network(text.strip()) for text in texts)


@lru_cache(maxsize=1024)
def parse_target(url: str) -> Target:
    """Take a URL apart, refusing every spelling that different parsers read differently.

    Raises:
        EgressRefusedError: not http or https, credentials in it, no host, a host that is neither
            a plain name nor an address in its canonical form, white space or control characters.
    """
    if not 0 < len(url) <= URL_LENGTH_MAX:
        raise EgressRefusedError(f"a URL has 1 to {URL_LENGTH_MAX} characters")
    if "\\" in url or any(not c.isprintable() or c.isspace() for c in url):
        raise EgressRefusedError("the URL holds white space, a control character or a backslash")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise EgressRefusedError("this is no URL") from error
    scheme = parts.scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise EgressRefusedError("only http and https URLs are reached")
    if "@" in parts.netloc:
        raise EgressRefusedError("the URL holds credentials; send them in a header")
    if port is not None and not 0 < port <= _PORT_MAX:
        raise EgressRefusedError("the URL's port is out of range")
    host = (parts.hostname or "").lower()
    literal = _literal(host, is_bracketed="[" in parts.netloc)
    return Target(scheme, host, _DEFAULT_PORTS[scheme] if port is None else port, literal)


def check_url(url: str, allowed: Sequence[Network]) -> Target:
    """Refuse what the URL itself shows; a name is judged when it is resolved.

    Raises:
        EgressRefusedError: as `parse_target`, or its literal address is not permitted.
    """
    target = parse_target(url)
    if target.literal is not None:
        permitted(target.host, [target.literal], allowed)
    return target


def permitted(
    host: str, addresses: Iterable[Address], allowed: Sequence[Network]
) -> tuple[Address, ...]:
    """Those of a host's addresses that may be connected to, in order; at least one.

    Raises:
        EgressRefusedError: none may. The message names no address, so that a tenant learns
            nothing of the operator's name server.
    """
    found = tuple(address for address in addresses if refusal(address, allowed) is None)
    if not found:
        raise EgressRefusedError(
            f"{host} leads to an address that is not public; INFERPIPE_EGRESS_ALLOW can permit it"
        )
    return found


def refusal(address: Address, allowed: Sequence[Network]) -> str | None:
    """Why an address is not connected to, or None.

    The allow-list counts for the very form that is connected to: 127.0.0.1/32 does not permit
    ::ffff:127.0.0.1.
    """
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return "scoped"
    if any(address in network for network in allowed):
        return None
    for network, reason in DENIED.items():
        if address in network:
            return reason
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST_V6:
        return "not global unicast"
    return None


def _literal(host: str, *, is_bracketed: bool) -> Address | None:
    if is_bracketed:
        if "%" in host:
            raise EgressRefusedError("the URL names a scope")
        try:
            return IPv6Address(host)
        except AddressValueError as error:
            raise EgressRefusedError("the URL's host is no IPv6 address") from error
    if not host or len(host) > _NAME_LENGTH_MAX or not _NAME_CHARACTERS.issuperset(host):
        raise EgressRefusedError("the URL's host is no plain name (write an IDN in its xn-- form)")
    labels = host.split(".")
    if not all(labels[:-1]) or host == ".":
        raise EgressRefusedError("the URL's host has an empty label")
    last = labels[-1] or labels[-2]
    # The WHATWG rule: a last label that is a number makes the host an IPv4 address, in whatever
    # base and however short. Only the dotted decimal form is taken.
    if not (last.isdigit() or last.startswith("0x")):
        return None
    try:
        return IPv4Address(host)
    except AddressValueError as error:
        raise EgressRefusedError("the URL's host is an oddly spelt address") from error
