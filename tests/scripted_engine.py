"""An engine without a model, for a worker whose plans, probes and prompts the test decides."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from helios.engine.interface import (
    Counters,
    Finish,
    FinishReason,
    GeneratedToken,
    Limits,
    Output,
    PhaseTimes,
    PlanToLoad,
    Progress,
    Reloaded,
    Route,
    Served,
    ServedPrompt,
    Sink,
    Telemetry,
)
from helios.errors import HeliosError, PlanNotServedError
from helios.modes import ExitMode
from helios.routing.probe import Probe
from helios.sampling import SamplingParams
from helios.served import ServedPlan


@dataclass
class ScriptedSequence:
    """A sequence that has come to its end when it was submitted."""

    plan: ServedPlan
    prompt_tokens: int
    completion_tokens: int
    times: PhaseTimes
    preemptions: int = 0


class ScriptedEngine:
    """Ends each sequence at once, with `x` for every token, under the plan that was given or chosen."""

    def __init__(self, *plans: ServedPlan, probe: Probe) -> None:
        self.plans = plans
        self.probe = probe
        self.prompts: list[ServedPrompt] = []
        # The model that each route names as the first one.
        self.probed_first: list[str | None] = []
        # Thresholds and shares of the last reload, in the order of the plans.
        self.thresholds: list[float | None] = []
        self.shares: list[float] = []
        self.running = False

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False

    def submit(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling: SamplingParams,
        sink: Sink,
        *,
        emitted_ids: list[int] | None = None,
        deadline: float | None = None,
        plan: ServedPlan | None = None,
        route: Route | None = None,
    ) -> ScriptedSequence:
        times = PhaseTimes()
        chosen = plan or self.plans[0]
        if route is not None:
            self.probed_first.append(route.first(self.probe.first_ids))
            # A route may ask for more readings once.
            found = route(self.probe, is_complete=False) or route(self.probe, is_complete=True)
            assert found is not None
            chosen = found
        if chosen not in self.plans:
            sink(Output(error=PlanNotServedError(f"{chosen} is not in force")))
            return ScriptedSequence(self.plans[0], len(prompt_ids), 0, times)
        tokens = tuple(
            GeneratedToken(index, 100 + index, "x", -0.1, 0.9, chosen.depth, chosen.model)
            for index in range(len(emitted_ids or []), sampling.max_tokens)
        )
        finish = Finish(FinishReason.LENGTH, "x" * sampling.max_tokens, len(prompt_ids), sampling.max_tokens)
        sink(Output(tokens, finish))
        return ScriptedSequence(chosen, len(prompt_ids), sampling.max_tokens, times)

    def cancel(self, request_id: str, error: HeliosError | None = None) -> None:
        """Nothing is left to cancel."""

    def reload(
        self,
        path: Path,
        depth: int | None = None,
        progress: Progress | None = None,
        threshold: float | None = None,
        *,
        also: Sequence[PlanToLoad] = (),
        urgent: bool = False,
    ) -> Reloaded:
        wanted = [PlanToLoad(path, depth, threshold), *also]
        self.plans = tuple(ServedPlan(model=one.path.name, depth=one.depth or 1) for one in wanted)
        self.thresholds = [one.threshold for one in wanted]
        self.shares = [one.share for one in wanted]
        return Reloaded(bytes_read=0, sequences_moved=0, stall_seconds=0.0)

    def telemetry(self) -> Telemetry:
        return Telemetry(
            plan=self.plans[0],
            plans={plan: number for number, plan in enumerate(self.plans)},
            running=0,
            waiting=0,
            blocks_total=10,
            blocks_free=10,
            counters=Counters(),
            preemptions=0,
            cached_tokens=0,
            step_age=0.0,
        )

    def served_prompts(self, after: int) -> list[ServedPrompt]:
        return [prompt for prompt in self.prompts if prompt.number > after]

    def add_prompt(self, prompt: ServedPrompt) -> None:
        """Adds a prompt, with the next number."""
        self.prompts.append(replace(prompt, number=len(self.prompts) + 1))

    @property
    def served(self) -> Served:
        return Served(
            plan=self.plans[0],
            plans=self.plans,
            num_layers=4,
            exit_layers=(1, 2, 4),
            vocab_size=512,
            context_tokens=256,
            tokenizer_id="scripted",
            tokenizer_json=b"{}",
            chat_templates={},
            threshold=None,
            precision="float32",
            weight_bytes=0,
            kv_bytes_per_token=0,
            memory_bytes=0,
            bytes_read=0,
        )

    @property
    def limits(self) -> Limits:
        return Limits(
            exit_mode=ExitMode.GREEDY,
            device="cpu",
            max_running=64,
            max_waiting=256,
            step_token_budget=512,
            block_tokens=16,
        )
