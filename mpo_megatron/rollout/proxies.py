"""The proxy between this machine and a server: from the environment, but never for a server on this machine.

A proxy reads what is sent without TLS, including the key. A job's `HTTP_PROXY` would also take requests to `localhost`, which it
cannot reach.
"""

from __future__ import annotations

import ipaddress
import urllib.request
from urllib.parse import urlsplit


def find_proxy(base_url: str) -> str | None:
    """Address of the proxy for a server; None for a direct connection. Reads HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY."""
    parts = urlsplit(base_url)
    if is_local(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    return address if address is None or "://" in address else f"http://{address}"


def is_local(host: str) -> bool:
    """Whether a host name is this machine's own: localhost, 127.0.0.1, ::1, 0.0.0.0."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def describe_proxy(address: str) -> str:
    """The proxy's address without user name and password."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
