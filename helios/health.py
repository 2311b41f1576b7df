"""Asks a server's gRPC health service whether it serves: `python -m helios.health HOST:PORT`.

For container health checks. Exit status 0: it serves. Exit status 1: it does not; the reason is on stderr.
"""

import argparse
import sys

import grpc
from grpc_health.v1 import health_pb2

from helios import channel
from helios.address import parse
from helios.errors import UnavailableError


def check(address: str, service: str = "", timeout_seconds: float = 5.0) -> None:
    """Returns if the server at host:port serves `service` ("": the whole server).

    Otherwise raises UnavailableError with the server's answer.
    """
    with channel.to_service(address) as opened:
        ask = opened.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = ask(health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds)
        except grpc.RpcError as error:
            raise UnavailableError(f"{address}: {error.code().name}: {error.details()}") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise UnavailableError(f"{address} answers {status}")


def main() -> int:
    """Runs the check given on the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helios.health", description=__doc__)
    parser.add_argument("address", help="host:port of the server")
    parser.add_argument("--service", default="", help="full name of one service (default: the whole server)")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds to wait (default: %(default)g)")
    arguments = parser.parse_args()
    try:
        parse(arguments.address)
    except ValueError as error:
        parser.error(str(error))
    try:
        check(arguments.address, arguments.service, arguments.timeout)
    except UnavailableError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
