"""An address that a stack drew stays free until its service listens on it, and while it starts again."""

import asyncio
import socket
from pathlib import Path

import pytest

from helios import embedded_redis
from helios.errors import SettingsError
from helios.reservation import Reservation
from helios.server import Server
from tests.stack import Process

STACKS = 300


@pytest.fixture
def reservation() -> Reservation:
    return Reservation("127.0.0.1:0", "--controller")


def test_stacks_that_start_side_by_side_get_different_ports() -> None:
    reservations = [Reservation("127.0.0.1:0", "--controller") for _ in range(STACKS)]
    assert len({one.port for one in reservations}) == STACKS


def test_nobody_else_gets_the_port_before_the_service_binds_it(reservation: Reservation) -> None:
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", reservation.port))
    for _ in range(STACKS):
        with socket.socket() as other:
            # As gRPC, Redis and most servers bind.
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", 0))
            assert other.getsockname()[1] != reservation.port


def test_a_service_listens_on_its_reserved_port_as_often_as_it_is_started(reservation: Reservation) -> None:
    async def serve() -> None:
        for _ in range(2):
            server = Server(())
            assert server.bind(reservation.address) == reservation.port
            await server.start()
            with socket.create_connection(("127.0.0.1", reservation.port)):
                pass
            await server.stop(0)

    asyncio.run(serve())


def test_redis_listens_on_its_reserved_port(reservation: Reservation, tmp_path: Path) -> None:
    command = embedded_redis.server_command(reservation.port, tmp_path)
    Process("redis", command, tmp_path, embedded_redis.READY_LINE.pattern).kill()


def test_a_taken_address_is_refused_with_its_option(reservation: Reservation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SettingsError, match=f"cannot listen on {address}: .* --gateway HOST:PORT"):
            Reservation(address, "--gateway")
    reservation.close()
    Reservation(reservation.address, "--controller")
