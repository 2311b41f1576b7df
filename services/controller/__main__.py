"""`python -m services.controller`: decides which model and depth each worker serves."""

import asyncio
import logging
import sys
import uuid

from helios import catalog, redis_client, service_process
from helios.server import Server
from helios.v1 import controller_pb2_grpc
from services.controller.controller import Controller
from services.controller.leader import Leadership
from services.controller.service import SERVICE_NAME, ControllerService
from services.controller.settings import ControllerSettings

log = logging.getLogger(__name__)


def main() -> int:
    """Runs the controller until SIGTERM. Exit code 1: it could not start, or failed."""
    return service_process.run("controller", ControllerSettings, _serve)


async def _serve(settings: ControllerSettings) -> int:
    if settings.models_dir is not None:
        catalog.list_models(settings.models_dir)  # Raises if the directory does not exist.
    server = Server([SERVICE_NAME])
    port = server.bind(settings.address)
    address = settings.advertise or f"{settings.address.rpartition(':')[0]}:{port}"
    redis = redis_client.connect(settings.redis_url, settings.worker_timeout_seconds)
    leadership = Leadership(redis, uuid.uuid4().hex, address, settings.lease_seconds)
    controller = Controller(redis, settings, leadership)
    service = ControllerService(controller, redis, settings)
    controller_pb2_grpc.add_ControllerServiceServicer_to_server(service, server.grpc_server)
    running = asyncio.create_task(controller.run())
    await server.start()
    signalled = service_process.StopSignal(settings.grace_seconds + settings.stop_seconds)
    service_process.say_ready(address)
    stop = asyncio.create_task(signalled.wait())
    await asyncio.wait({stop, running}, return_when=asyncio.FIRST_COMPLETED)

    failed = running.done()
    if failed and not running.cancelled():
        log.critical("the controller failed", exc_info=running.exception())
    stop.cancel()
    running.cancel()
    await asyncio.gather(stop, running, return_exceptions=True)
    await controller.close()
    await server.stop(settings.grace_seconds)
    await redis.aclose()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
