"""`python -m services.worker`: one engine behind gRPC."""

import asyncio
import logging
import socket
import sys
from pathlib import Path

from helios import catalog, redis_client, registry, service_process
from helios.engine.interface import ServingEngine
from helios.errors import SettingsError
from helios.orders import EVERY_WORKER
from helios.served import ServedPlan
from helios.server import Server
from helios.v1 import worker_pb2_grpc
from services.worker import first_plan, first_router
from services.worker.engines import ENGINES, OWN
from services.worker.first_plan import FirstPlan, PlanFile
from services.worker.lease import keep_announced
from services.worker.service import WorkerService
from services.worker.settings import WorkerSettings

log = logging.getLogger(__name__)

# Seconds between two checks whether the engine still runs.
_WATCH_SECONDS = 0.5


def main() -> int:
    """Runs the worker until SIGTERM. Exit code 1: it could not start, or its engine failed."""
    return service_process.run(
        "worker",
        WorkerSettings,
        _serve,
        instance=lambda settings: settings.worker_id or settings.advertise,
    )


async def _serve(settings: WorkerSettings) -> int:
    models_dir = catalog.find_models_dir(settings.models_dir)
    entry = _choose(models_dir, settings.model)
    depth = settings.depth
    if depth is None:
        depth = entry.default_depth if settings.exit_mode == "greedy" else entry.num_layers
    plan_file = PlanFile(settings.plan_file, ServedPlan(model=entry.name, depth=depth))
    engine, first = await _load(settings, models_dir, entry, depth, plan_file)

    server = Server(["helios.v1.WorkerService"])
    port = server.bind(settings.address)
    address = _advertised(settings, port)
    worker_id = settings.worker_id or address
    router = await first_router.find(settings.redis_url)
    service = WorkerService(engine, settings, models_dir, worker_id, plan_file, router)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(service, server.grpc_server)
    engine.start()
    if first is not None:
        await asyncio.to_thread(_load_further, engine, models_dir, first)
        served = engine.served.plans
        plan_file.write(first.plan, first.threshold, tuple(one for one in first.also if one.plan in served))
    await server.start()
    background = [asyncio.create_task(_watch(engine))]
    if settings.redis_url is not None:
        redis = redis_client.connect(settings.redis_url)
        lease = registry.WorkerLease(worker_id, address)
        background.append(asyncio.create_task(keep_announced(redis, lease, settings.lease_seconds)))
    signalled = service_process.StopSignal(settings.drain_seconds + settings.stop_seconds)
    service_process.say_ready(address)
    stop = asyncio.create_task(signalled.wait())
    await asyncio.wait({stop, background[0]}, return_when=asyncio.FIRST_COMPLETED)

    failed = background[0].done()
    stop.cancel()
    # Gateways stop choosing this worker before its streams end.
    for task in background:
        task.cancel()
    await asyncio.gather(*background, stop, return_exceptions=True)
    await service.drain(settings.drain_seconds)
    await asyncio.to_thread(engine.stop)
    await server.stop(grace_seconds=1.0)
    return 1 if failed else 0


async def _load(
    settings: WorkerSettings,
    models_dir: Path,
    entry: catalog.ModelEntry,
    depth: int,
    plan_file: PlanFile,
) -> tuple[ServingEngine, FirstPlan | None]:
    """An engine with the plan to start with (first_plan.py), and that plan unless it is that of the flags.

    The flags specify `entry` at `depth`.
    """
    load = ENGINES[OWN]
    port = settings.address.rpartition(":")[2]
    has_port = port.isdecimal() and int(port) > 0
    # Without an id and a fixed port it counts as another worker at each start.
    worker_id = settings.worker_id or (_advertised(settings, int(port)) if has_port else EVERY_WORKER)
    first = await first_plan.find(settings.redis_url, worker_id, plan_file)
    if first is not None:
        try:
            other = catalog.find_model(models_dir, first.plan.model)
            if len({other.tokenizer_id, entry.tokenizer_id} - {None}) > 1:
                # A reload would refuse it too.
                raise SettingsError(f"{other.name} has another tokenizer than {entry.name}")
            engine = load(settings, other.path, first.plan.depth, first.threshold)
        # Whatever is wrong with that plan, the worker can serve the plan of its flags.
        except Exception as error:
            log.warning(
                "%s, which %s, cannot be loaded, starting with %s at depth %d as the flags say: %s",
                first.plan,
                first.why,
                entry.name,
                depth,
                error,
            )
        else:
            log.info("starting with %s, which %s", first.plan, first.why)
            return engine, first
    return load(settings, entry.path, depth), None


def _load_further(engine: ServingEngine, models_dir: Path, first: FirstPlan) -> None:
    """Loads the plans that are served beside the first one. If they cannot be, that is logged."""
    if not first.also:
        return
    try:
        path = catalog.find_model(models_dir, first.plan.model).path
        also = [one.to_load(catalog.find_model(models_dir, one.plan.model).path) for one in first.also]
        engine.reload(path, first.plan.depth, threshold=first.threshold, also=also, urgent=True)
    # Whatever is wrong with those plans, the worker can serve the first one.
    except Exception as error:
        told = ", ".join(str(one.plan) for one in first.also)
        log.warning("%s cannot be loaded, starting with %s alone: %s", told, first.plan, error)
    else:
        log.info("serving beside it %s", ", ".join(str(one.plan) for one in first.also))


async def _watch(engine: ServingEngine) -> None:
    """Returns when the engine has failed, so that the process ends and can be restarted."""
    while engine.running:
        await asyncio.sleep(_WATCH_SECONDS)


def _choose(models_dir: Path, name: str | None) -> catalog.ModelEntry:
    if name is not None:
        return catalog.find_model(models_dir, name)
    models = catalog.list_models(models_dir)
    if not models:
        raise SettingsError(f"no model in {models_dir}; fetch one with `helios models pull`")
    return models[0]


def _advertised(settings: WorkerSettings, port: int) -> str:
    """The host:port at which gateways reach this worker."""
    if settings.advertise is not None:
        return settings.advertise if ":" in settings.advertise else f"{settings.advertise}:{port}"
    host = settings.address.rpartition(":")[0]
    # Others cannot connect to a wildcard address.
    return f"{socket.gethostname() if host in ('', '0.0.0.0', '[::]') else host}:{port}"


if __name__ == "__main__":
    sys.exit(main())
