"""gRPC server addresses as people write them (host:port), checked before any connection is made."""

import re

_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://+", re.IGNORECASE)
_HOST = re.compile(r"^(\[[0-9A-Fa-f:.%]+\]|[^\s:/@?#\[\]]+)$")
_LAST_PORT = 65535


def parse(address: str, *, any_port: bool = False) -> tuple[str, int]:
    """Host and port of an address; an IPv6 host keeps its brackets.

    `any_port` allows port 0, with which a server takes any free port. Raises ValueError with a message that
    says how to write the address.
    """
    if not address:
        raise ValueError("an address must not be empty: write HOST:PORT")
    problem = f"{address!r} is not HOST:PORT: "
    if scheme := _SCHEME.match(address):
        rest = address[scheme.end() :].partition("/")[0]
        example = f"{rest}:50051" if _HOST.match(rest) else rest or "127.0.0.1:50051"
        raise ValueError(f"{problem}leave out {scheme[0]}, as in {example}")
    if _HOST.match(address):
        raise ValueError(f"{problem}it needs a port, as in {address}:50051")
    host, _, port = address.rpartition(":") if ":" in address else (address, "", "")
    if not host:
        raise ValueError(f"{problem}it needs a host, as in 127.0.0.1:{port}")
    if ":" in host and "[" not in host:
        raise ValueError(f"{problem}an IPv6 address needs brackets, as in [::1]:50051")
    if not _HOST.match(host):
        raise ValueError(f"{problem}{host!r} is not the name or IP address of a host")
    first = 0 if any_port else 1
    if not (port.isascii() and port.isdigit() and first <= int(port) <= _LAST_PORT):
        raise ValueError(f"{problem}the port must be a number from {first} to {_LAST_PORT}, not {port!r}")
    return host, int(port)
