"""`python -m services.gateway`: the service that clients call."""

import sys

from helios import service_process
from helios.server import Server
from services.gateway.prompt_sampler import PromptSampler
from services.gateway.service import SERVICE_NAME, InferenceService
from services.gateway.settings import GatewaySettings
from services.gateway.worker_pool import WorkerPool

# Time for the last statuses to be sent.
_FAREWELL_SECONDS = 3.0


def main() -> int:
    """Runs the gateway until SIGTERM. Exit code 1: it could not start."""
    return service_process.run("gateway", GatewaySettings, _serve)


async def _serve(settings: GatewaySettings) -> int:
    server = Server([SERVICE_NAME], [("grpc.max_receive_message_length", settings.max_request_bytes)])
    port = server.bind(settings.address)
    pool = WorkerPool(settings)
    sampler = PromptSampler(settings)
    service = InferenceService(settings, pool, sampler)
    service.add_to(server.grpc_server)
    pool.start()
    sampler.start()
    await server.start()
    stop = service_process.StopSignal(settings.grace_seconds + settings.stop_seconds)
    service_process.say_ready(f"{settings.address.rpartition(':')[0]}:{port}")
    await stop.wait()
    # Until the last stream ends, health checks direct new callers elsewhere.
    await server.set_serving(False)
    await service.stop(settings.grace_seconds)
    await server.stop(_FAREWELL_SECONDS)
    await sampler.close()
    await pool.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
