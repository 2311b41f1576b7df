"""Creates every gRPC channel of Helios: keepalive options, and whether it uses a proxy.

gRPC connects through the proxy that `grpc_proxy`, `https_proxy` or `http_proxy` names, even to loopback.
Services reach each other directly, whatever the environment says. A client uses the proxy, except for a
server on its own machine.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence

import grpc

_Options = Sequence[tuple[str, int]]

_KEEPALIVE: _Options = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A worker that restarts on the same address is soon reached again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_NO_PROXY: _Options = (("grpc.enable_http_proxy", 0),)
# A gRPC target. The scheme and authority before the endpoint are optional (gRPC name resolution).
_TARGET = re.compile(r"(?:(?P<scheme>[a-z][a-z0-9+.-]*):(?://[^/]*/)?)?(?P<endpoint>.*)", re.IGNORECASE)
_SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds")


def to_service(address: str, options: _Options = ()) -> grpc.Channel:
    """A channel from one service to another at host:port. Never uses a proxy."""
    return grpc.insecure_channel(address, options=(*_KEEPALIVE, *_NO_PROXY, *options))


def to_service_async(address: str, options: _Options = ()) -> grpc.aio.Channel:
    """Like `to_service`, for asyncio. Call it in the event loop that uses the channel."""
    return grpc.aio.insecure_channel(address, options=(*_KEEPALIVE, *_NO_PROXY, *options))


def from_client(target: str) -> grpc.Channel:
    """A client's channel to a server. Uses the environment's proxy for another machine."""
    return grpc.insecure_channel(target, options=_client_options(target))


def from_client_async(target: str) -> grpc.aio.Channel:
    """Like `from_client`, for asyncio. Call it in the event loop that uses the channel."""
    return grpc.aio.insecure_channel(target, options=_client_options(target))


def is_on_this_machine(target: str) -> bool:
    """Whether a gRPC target is loopback, a socket file, or an address or name of this machine."""
    scheme, endpoint = _parts(target)
    if scheme.startswith("unix"):
        return True
    host = _host(endpoint).lower().rstrip(".")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return _is_own_name(host)
    return address.is_loopback or address.is_unspecified or _is_own_address(host)


def _client_options(target: str) -> _Options:
    return (*_KEEPALIVE, *(_NO_PROXY if is_on_this_machine(target) else ()))


def _parts(target: str) -> tuple[str, str]:
    """Scheme and endpoint. The scheme is dns unless the target names one."""
    found = _TARGET.fullmatch(target)
    scheme = (found["scheme"] or "").lower() if found else ""
    # In `localhost:50051` the part before the colon is not a scheme.
    return (scheme, found["endpoint"]) if found and scheme in _SCHEMES else ("dns", target)


def _host(endpoint: str) -> str:
    if endpoint.startswith("["):
        return endpoint[1:].partition("]")[0]
    # An IPv6 address without brackets has no port.
    return endpoint if endpoint.count(":") > 1 else endpoint.partition(":")[0]


def _is_own_name(host: str) -> bool:
    own = socket.gethostname().lower()
    if host in ("localhost", own) or host.endswith(".localhost"):
        return True
    # The full name may need a DNS lookup, so it is requested only if it can match.
    return host.partition(".")[0] == own.partition(".")[0] and host == socket.getfqdn().lower()


def _is_own_address(host: str) -> bool:
    """Whether a socket can be bound to the IP address. That works only for the machine's own addresses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True
