"""`helios profile`: measure every exit of the candidates on recent prompts."""

import json
from collections.abc import Iterator

import click

from helios.cli.target import target_option
from helios.errors import HeliosError
from helios.history import ModelProfile
from helios.slo import Slo
from helios.stack_state import find_profiler
from helios.v1 import profiler_pb2, profiler_pb2_grpc
from helios.worth import worth


class _Names(click.ParamType[tuple[str, ...]]):
    name = "names"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        names = tuple(name.strip() for name in str(value).split(","))
        if not all(names):
            self.fail(f"{value!r} is not a list of names such as first,second", param, ctx)
        return names


@click.command()
@click.option("--models", type=_Names(), metavar="NAME,NAME", help="Default: the shortlist.")
@click.option("--requests", type=click.IntRange(min=1), help="Recent requests. Default: the profiler's.")
@click.option("--history", is_flag=True, help="Show the last results; measure nothing.")
@click.option(
    "--max-perplexity-increase",
    "bound",
    type=click.FloatRange(min=0),
    default=Slo().max_perplexity_increase,
    show_default=True,
    help="The bound for the sentence that says which depth is worth it.",
)
@click.option("--json", "as_json", is_flag=True, help="As a JSON list.")
@target_option("profiler")
def profile(
    *,
    models: tuple[str, ...] | None,
    requests: int | None,
    history: bool,
    bound: float,
    as_json: bool,
    target: str | None,
) -> None:
    """Run recent prompts through the candidates, reading every exit: quality, speed, memory, energy.

    A sentence says for each model which depth is worth it. Without traffic the bundled prompts are taken.
    Results are kept in Redis, for the controller.
    """
    import grpc

    from helios.channel import from_client
    from helios.client import error_from

    address, names = find_profiler(target), models or ()
    profiles: list[ModelProfile] = []
    failure: HeliosError | None = None
    with from_client(address) as channel:
        stub = profiler_pb2_grpc.ProfilerServiceStub(channel)
        try:
            if history:
                answer = stub.GetHistory(profiler_pb2.GetHistoryRequest(models=names))
                profiles += map(ModelProfile.from_proto, answer.profiles)
            else:
                request = profiler_pb2.EvaluateRequest(models=names, requests=requests)
                # Results are shown one by one, so that those before a failure are seen.
                for one in _with_progress(stub.Evaluate(request)):
                    profiles.append(one)
        except grpc.RpcError as error:
            failure = error_from(error, address)
    if as_json:
        click.echo(json.dumps([one.model_dump(mode="json") for one in profiles], indent=2))
    else:
        for one in profiles:
            _show(one, bound)
    if failure is not None:
        raise failure


def _with_progress(responses: Iterator[profiler_pb2.EvaluateResponse]) -> Iterator[ModelProfile]:
    """The results. Progress bars (one per model) go to stderr, so stdout holds only the command's answer."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    bars: dict[str, TaskID] = {}
    progress = Progress(console=Console(stderr=True))
    try:
        for response in responses:
            if response.HasField("result"):
                yield ModelProfile.from_proto(response.result)
                continue
            stage = response.progress
            if stage.model not in bars:
                progress.start()
                bars[stage.model] = progress.add_task(stage.model, total=stage.requests_total)
            progress.update(bars[stage.model], completed=stage.requests_done)
    finally:
        # Bars that never started would leave an empty line.
        if bars:
            progress.stop()


def _show(measured: ModelProfile, bound: float) -> None:
    from rich.console import Console

    from helios.cli.rows import Line, Rows, show

    full = measured.full
    columns = ["depth", "TH", "sure", "agree", "ppl", "+%", *(f"x{speed.batch} ms" for speed in full.decode)]
    columns += ["TTFT ms", "MB", "KV kB"]
    if full.joules_per_token is not None:
        columns.append("J/token")
    rows = Rows(*columns)
    for one in measured.exits:
        cells = [
            str(one.depth),
            f"{one.threshold:.2f}",
            f"{one.share_above(one.threshold):.0%}",
            f"{one.agreement:.0%}",
            f"{one.perplexity:.1f}",
            f"{measured.perplexity_increase(one):+.1%}",
            *(f"{1e3 * speed.step_seconds:.2f}" for speed in one.decode),
            f"{1e3 * one.ttft_seconds:.1f}",
            f"{one.weight_bytes / 1e6:,.1f}",
            f"{one.kv_bytes_per_token / 1e3:,.1f}",
        ]
        if one.joules_per_token is not None:
            cells.append(f"{one.joules_per_token:.3g}")
        rows.add(*cells)
    facts = measured.provenance
    text = (
        f"{measured.requests} {facts.get('prompts', 'given')} prompts, {measured.tokens:,} tokens; took "
        f"{measured.wall_seconds:.1f} s, {measured.cpu_seconds:.1f} s of CPU; steps timed in "
        f"{facts.get('clock', 'seconds')}; power: {facts.get('power', 'unknown')}"
    )
    show(Console(), Line(measured.model, "bold"), rows, Line(worth(measured, bound)), Line(text, "dim"), "")
