"""The parts that every gRPC server of Helios has: health, reflection, keepalive, graceful stop."""

from collections.abc import Sequence
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from helios.address import parse
from helios.errors import HeliosError, SettingsError, trailing_metadata

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)


class Server:
    """A grpc.aio server with health and reflection for the named services."""

    def __init__(self, service_names: Sequence[str], options: Sequence[tuple[str, int]] = ()) -> None:
        self.grpc_server = grpc.aio.server(options=(*SERVER_OPTIONS, *options))
        self._service_names = tuple(service_names)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc_server)

    async def set_serving(self, serving: bool) -> None:
        """Sets the health status of every service, and of the empty name (the whole server)."""
        answer = health_pb2.HealthCheckResponse
        status = answer.SERVING if serving else answer.NOT_SERVING
        for name in ("", *self._service_names):
            await self._health.set(name, status)

    def bind(self, address: str) -> int:
        """Binds to host:port (port 0: any free port) and returns the port.

        Raises SettingsError when it is not an address or cannot be bound.
        """
        try:
            parse(address, any_port=True)
        except ValueError as error:
            raise SettingsError(f"cannot listen: {error}") from error
        try:
            return self.grpc_server.add_insecure_port(address)
        except RuntimeError as error:
            raise SettingsError(f"cannot listen on {address}: {error}; choose another port") from error

    async def start(self) -> None:
        """Starts to serve and sets the health status. All services must have been added before."""
        await self.grpc_server.start()
        await self.set_serving(True)

    async def stop(self, grace_seconds: float) -> None:
        """Refuses new calls, waits for running ones until the grace period ends, then cancels the rest."""
        await self._health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace_seconds)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: HeliosError) -> NoReturn:
    """Ends a call with the error's status and details."""
    await context.abort(error.code, error.message, trailing_metadata(error))
