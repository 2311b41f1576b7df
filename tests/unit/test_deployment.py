"""Promises of the Dockerfile, the compose file and the Kubernetes manifests, as far as they can be read."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from helios.cli import cli
from helios.settings import ServiceSettings

ROOT = Path(__file__).parents[2]
SERVICES = sorted(path.parent.name for path in ROOT.glob("services/*/__main__.py"))
# The default grace period of Kubernetes, in seconds.
DEFAULT_GRACE_SECONDS = 30


def settings_type(service: str) -> type[ServiceSettings]:
    module = importlib.import_module(f"services.{service}.settings")
    found: type[ServiceSettings] = getattr(module, f"{service.capitalize()}Settings")
    return found


def port(service: str) -> int:
    """The port on which the service listens by default."""
    address: str = settings_type(service).model_fields["address"].default
    return int(address.rpartition(":")[2])


def target(service: str) -> str:
    """The service's target of the Dockerfile."""
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    (found,) = (stage for stage in stages if stage.partition("\n")[0].endswith(f" AS {service}"))
    return found


def composed() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return services


def objects() -> Iterator[dict[str, Any]]:
    """All Kubernetes objects."""
    for path in sorted((ROOT / "deploy/kubernetes").rglob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def pod(service: str) -> dict[str, Any]:
    (found,) = (
        one["spec"]["template"]["spec"]
        for one in objects()
        if one["kind"] in ("Deployment", "StatefulSet") and one["metadata"]["name"] == service
    )
    return dict(found)


def environment(service: str) -> dict[str, Any]:
    """The variables that a pod gives its service, by name. None: the value is known only in the cluster."""
    return {one["name"]: one.get("value") for one in pod(service)["containers"][0]["env"]}


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_has_an_image_that_listens_where_it_is_checked(service: str) -> None:
    stage = target(service)

    assert f"HELIOS_{service.upper()}_ADDRESS=0.0.0.0:{port(service)}" in stage
    assert f"EXPOSE {port(service)}\n" in stage
    assert f'"helios.health", "127.0.0.1:{port(service)}"' in stage
    assert f'ENTRYPOINT ["python", "-m", "services.{service}"]' in stage


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_runs_in_compose_and_waits_for_redis(service: str) -> None:
    one = composed()[service]

    assert one["build"]["target"] == service
    assert one["depends_on"] == {"redis": {"condition": "service_healthy"}}


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_runs_in_kubernetes_with_probes_and_limits(service: str) -> None:
    (container,) = pod(service)["containers"]

    assert container["image"] == f"helios-{service}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": port(service)}
    assert container["resources"]["limits"]["memory"]
    assert pod(service)["securityContext"]["runAsNonRoot"]
    (found,) = (one for one in objects() if one["kind"] == "Service" and one["metadata"]["name"] == service)
    assert found["spec"]["ports"][0]["port"] == port(service)


@pytest.mark.parametrize("service", SERVICES)
def test_variables_that_a_service_is_given_are_its_settings(service: str) -> None:
    prefix = f"HELIOS_{service.upper()}_"
    known = {f"{prefix}{name.upper()}" for name in settings_type(service).model_fields}
    given = {*re.findall(rf"\b({prefix}\w+)=", target(service))}
    given |= composed()[service]["environment"].keys() | environment(service).keys()

    assert {name for name in given if name.startswith(prefix)} <= known


@pytest.mark.parametrize("service", SERVICES)
def test_nobody_kills_a_service_before_its_own_grace_and_bound_are_over(service: str) -> None:
    defaults = settings_type(service).model_fields
    name = "drain_seconds" if service == "worker" else "grace_seconds"
    default = float(defaults[name].default) if name in defaults else 0.0
    bound = float(defaults["stop_seconds"].default)

    compose_grace = float(composed()[service]["stop_grace_period"].removesuffix("s"))
    assert compose_grace > default + bound

    one = pod(service)
    pause = one["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["0"])
    grace = float(environment(service).get(f"HELIOS_{service.upper()}_{name.upper()}", default))
    pod_grace = one.get("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
    assert pod_grace > float(pause[-1]) + grace + bound


def options(group: click.Group) -> Iterator[click.Parameter]:
    """All options of a group's commands."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from options(command)
        else:
            yield from command.params


def test_commands_in_the_gateways_container_find_all_that_they_speak_to() -> None:
    read = {str(option.envvar) for option in options(cli) if option.envvar}
    targets = {f"HELIOS_{part}TARGET" for part in ("", "CONTROLLER_", "PROFILER_")}
    image = set(re.findall(r"\b(HELIOS_\w*TARGET)=", target("gateway")))

    assert targets <= read
    assert image | composed()["gateway"]["environment"].keys() >= targets
    assert image | environment("gateway").keys() >= targets
