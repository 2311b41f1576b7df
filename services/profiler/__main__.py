"""`python -m services.profiler`: evaluates candidate models beside serving."""

import asyncio
import logging
import os
import sys

from redis.asyncio import Redis

from helios import catalog, service_process
from helios.engine import jit
from helios.server import Server, wait_for_signal
from helios.v1 import profiler_pb2_grpc
from services.profiler.service import ProfilerService
from services.profiler.settings import ProfilerSettings

log = logging.getLogger(__name__)

# A running evaluation is cancelled at once: its caller asks again.
_GRACE_SECONDS = 0.5
_REDIS_SECONDS = 5.0


def main() -> int:
    """Runs the profiler until SIGTERM. Exit code 1: it could not start."""
    return service_process.run("profiler", ProfilerSettings, _serve)


async def _serve(settings: ProfilerSettings) -> int:
    os.nice(settings.niceness)
    models_dir = catalog.find_models_dir(settings.models_dir)
    log.info("%s", jit.describe())
    redis = None
    if settings.redis_url is None:
        log.warning("no --redis-url: prompts are the bundled ones, and results are not kept")
    else:
        redis = Redis.from_url(
            settings.redis_url, socket_timeout=_REDIS_SECONDS, socket_connect_timeout=_REDIS_SECONDS
        )
    server = Server(["helios.v1.ProfilerService"])
    port = server.bind(settings.address)
    service = ProfilerService(settings, models_dir, redis)
    profiler_pb2_grpc.add_ProfilerServiceServicer_to_server(service, server.grpc_server)
    await server.start()
    service_process.say_ready(f"{settings.address.rpartition(':')[0]}:{port}")
    await wait_for_signal()
    await server.stop(_GRACE_SECONDS)
    await asyncio.to_thread(service.close)
    if redis is not None:
        await redis.aclose()
    return 0


if __name__ == "__main__":
    sys.exit(main())
