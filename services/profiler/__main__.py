"""`python -m services.profiler`: evaluates candidate models while others are served."""

import asyncio
import logging
import sys

from helios import catalog, redis_client, service_process
from helios.engine.kernels import jit
from helios.server import Server
from helios.v1 import profiler_pb2_grpc
from services.profiler.service import ProfilerService
from services.profiler.settings import ProfilerSettings

log = logging.getLogger(__name__)

# A running evaluation is cancelled at once, because its caller asks again.
_GRACE_SECONDS = 0.5


def main() -> int:
    """Runs the profiler until SIGTERM. Exit code 1: it could not start."""
    return service_process.run("profiler", ProfilerSettings, _serve)


async def _serve(settings: ProfilerSettings) -> int:
    models_dir = catalog.find_models_dir(settings.models_dir)
    log.info("%s", jit.describe())
    redis = None
    if settings.redis_url is None:
        log.warning("no --redis-url: prompts are the bundled ones, and results are not kept")
    else:
        redis = redis_client.connect(settings.redis_url)
    server = Server(["helios.v1.ProfilerService"])
    port = server.bind(settings.address)
    service = ProfilerService(settings, models_dir, redis)
    profiler_pb2_grpc.add_ProfilerServiceServicer_to_server(service, server.grpc_server)
    await server.start()
    stop = service_process.StopSignal(_GRACE_SECONDS + settings.stop_seconds)
    service_process.say_ready(f"{settings.address.rpartition(':')[0]}:{port}")
    await stop.wait()
    await server.stop(_GRACE_SECONDS)
    await asyncio.to_thread(service.close)
    if redis is not None:
        await redis.aclose()
    return 0


if __name__ == "__main__":
    sys.exit(main())
