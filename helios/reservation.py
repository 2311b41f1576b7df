"""Addresses that are kept free for servers that start later."""

import socket

from helios.address import parse
from helios.errors import SettingsError


class Reservation:
    """An address that only a server which shares it on purpose can listen on.

    The socket is bound but does not listen. Linux then gives its port to nobody who asks for any port, and
    to no connection. A server that sets SO_REUSEADDR, as gRPC and Redis do, can still listen on it, as often
    as it is started.
    """

    def __init__(self, address: str, option: str) -> None:
        """Reserves host:port (port 0: any free port).

        Raises SettingsError naming the option that sets the address when it is wrong or in use.
        """
        try:
            host, port = parse(address, any_port=True)
        except ValueError as error:
            raise SettingsError(f"{option}: {error}") from error
        try:
            family, kind, _, _, location = socket.getaddrinfo(
                host.strip("[]"), port, type=socket.SOCK_STREAM
            )[0]
            self._socket = socket.socket(family, kind)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._socket.bind(location)
            except OSError:
                self._socket.close()
                raise
        except OSError as error:
            raise SettingsError(
                f"cannot listen on {address}: {error.strerror}; "
                f"choose another address with {option} HOST:PORT"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self.address = f"{host}:{self.port}"

    def close(self) -> None:
        """Gives the address up."""
        self._socket.close()
