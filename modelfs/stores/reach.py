"""How near an address is: a store on the Internet must not lead us to what only this machine can reach.

A redirect that did would have us ask services behind the firewall, or the cloud's metadata service, in a
stranger's name (server-side request forgery).
"""

from __future__ import annotations

import enum
import ipaddress
import socket
import urllib.request
from urllib.parse import urlsplit

from modelfs.errors import BadAnswer
from modelfs.stores import redact

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv4 addresses as networks that only have IPv6 write them (RFC 6052)."""


class Reach(enum.IntEnum):
    """Who can reach an address, fewer with each step; a redirect never leads to a nearer one."""

    PUBLIC = 0
    PRIVATE = 1
    """The machines of a private network (RFC 1918, RFC 4193, RFC 6598), or this machine alone."""
    LINK = 2
    """Neighbours on the wire (RFC 3927), where clouds have their metadata services."""


def reach_of(host: str) -> Reach:
    """Return the reach of an IP address, in any spelling that libc accepts, or of a name without asking DNS.

    Of names only ``localhost`` and what is below it are known not to be public (RFC 6761).
    """
    host = host.strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return Reach.PRIVATE
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(host))  # 0x7f.1
        except OSError:
            return Reach.PUBLIC
    if isinstance(address, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
        address = address.ipv4_mapped or translated or address
    if address.is_link_local:
        return Reach.LINK
    return Reach.PUBLIC if address.is_global else Reach.PRIVATE


def allowed(url: str, reach: Reach, limit: Reach) -> Reach:
    """Return `reach`, that of `url`, if whoever leads there is as near itself.

    Raises:
        BadAnswer: `reach` is nearer than `limit`.

    """
    if reach > limit:
        where = "a link-local" if reach is Reach.LINK else "a private"
        raise BadAnswer(
            f"{redact(url)}: a redirect leads to {where} address, where the store itself is not; "
            "if that is meant, configure this URL"
        )
    return reach


def leads(origin: str, url: str) -> bool:
    """Return whether a server on the Internet at `origin` leads us to `url`, as it may; blocks for DNS.

    Raises:
        BadAnswer: `url` is neither http nor https, not encrypted although `origin` is, or nearer.

    """
    try:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    except ValueError:
        scheme, host = "", None
    if scheme not in ("http", "https") or not host:
        raise BadAnswer(f"{redact(origin)}: leads to something that is not HTTP: check the address")
    if scheme == "http" and origin.startswith("https:"):
        raise BadAnswer(f"{redact(origin)}: leads from https to http on {host}: correct the server")
    limit = resolved_reach(origin)
    allowed(url, resolved_reach(url), limit)
    return limit is Reach.PUBLIC


def written_reach(url: str) -> Reach:
    """Return the reach of the host of `url` as far as it can be told without asking DNS."""
    return reach_of(urlsplit(url).hostname or "")


def resolved_reach(url: str) -> Reach:
    """Return the nearest reach of what the host of `url` resolves to; blocks while DNS is asked.

    Where a proxy is asked, or DNS knows nothing, that of the host as it is written.
    """
    if proxied(url):
        return written_reach(url)
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return written_reach(url)
    return max(reach_of(str(address[0])) for *_, address in found)


def peer_reach(url: str, address: str) -> Reach:
    """Return the reach of who answers for `url` on a connection to `address`.

    Behind a proxy of the environment the address is the proxy's: then the host tells as it is written, and
    where a name leads to is for the proxy to decide.
    """
    return written_reach(url) if proxied(url) else reach_of(address)


def proxied(url: str) -> bool:
    """Return whether the environment names a proxy for `url`."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    wanted = proxies.get(parts.scheme) or proxies.get("all")
    return bool(wanted) and not urllib.request.proxy_bypass(parts.hostname or "")
