"""Judges requests that were served: runs every candidate over their prompts."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bench.load.clients import Stream
from bench.quality.served import Quality, Served, served_of
from bench.systems.subject import Sizes, Subject
from helios import catalog
from helios.catalog import ModelEntry
from helios.engine.evaluation.trace import trace_dynamic, trace_exits
from helios.engine.threads import set_threads
from helios.hardware import available_memory
from helios.modes import Precision
from helios.served import ServedPlan

# A probe may read this many of a prompt's first tokens, so quality is measured on the rest.
_PROBED_TOKENS = 32
# The first requests of a phase are all judged, because a plan that is wrong for it serves these.
FIRST_REQUESTS = 32

_Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Trace:
    """A model on the rest of a prompt: means by exit, and the top tokens of its last layer."""

    nats: NDArray[np.float64]
    agreement: NDArray[np.float64]
    last_ids: NDArray[np.int32]


def stride(requests: int, most: int, kinds: int) -> int:
    """Judging every so many of these requests judges at most `most`.

    Kinds of prompts that come in turn are judged alike often.
    """
    every = max(1, math.ceil(requests / most))
    while math.gcd(every, kinds) > 1:
        every += 1
    return every


class Judge:
    """Knows the quality of every plan on each prompt that it was shown."""

    def __init__(
        self, models_dir: Path, tokenizer_id: str, precision: Precision, say: Callable[[str], None]
    ) -> None:
        """Candidates are the models in `models_dir` with exits and this tokenizer, in the workers' precision.

        Raises SettingsError when there is none.
        """
        set_threads(1, precision)
        movable = [one for one in catalog.list_models(models_dir) if one.tokenizer_id in (None, tokenizer_id)]
        self._subject = Subject(movable, Sizes(), available_memory() // 4, say, precision)
        self._traces: dict[tuple[str, _Prompt], _Trace] = {}

    @property
    def candidates(self) -> Sequence[ModelEntry]:
        """All candidates."""
        return self._subject.models

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which all candidates share."""
        return next(iter(self._subject.tokenizers.values()))

    def best(self, prompts: Iterable[_Prompt]) -> ModelEntry:
        """The candidate that is best over these prompts with all its layers."""
        prompts = list(prompts)
        self._run(prompts)
        return min(self.candidates, key=lambda model: self._nats(model, prompts)[-1])

    def fastest_within(self, prompts: Iterable[_Prompt], bound: float) -> ServedPlan:
        """The smallest plan whose perplexity on these prompts is within `bound` (a share) of the best's."""
        prompts = list(prompts)
        most = self._nats(self.best(prompts), prompts)[-1] + math.log1p(bound)
        within = [
            (model, depth)
            for model in self.candidates
            for depth, nats in zip(model.exit_layers, self._nats(model, prompts), strict=True)
            if nats <= most
        ]
        model, depth = min(within, key=lambda plan: plan[0].config.parameters(plan[1]))
        return ServedPlan(model=model.name, depth=depth)

    def of(self, streams: Iterable[Stream], every: int) -> list[Served]:
        """The requests of one phase. The first ones and every so many of the others are judged."""
        chosen = _chosen(streams, every)
        self._run(one.request.prompt_ids for one, is_judged in chosen if is_judged)
        return [served_of(one, self._quality(one) if is_judged else None) for one, is_judged in chosen]

    def of_dynamic(self, streams: Iterable[Stream], every: int, model: ModelEntry) -> list[Served]:
        """The same for streams of a model in exit mode `dynamic`: each token leaves at its own exit.

        Their prompts must have the same length.
        """
        chosen = _chosen(streams, every)
        prompts = list(dict.fromkeys(one.request.prompt_ids for one, is_judged in chosen if is_judged))
        found = self._dynamic(model, prompts) if prompts else {}
        return [
            served_of(one, found[one.request.prompt_ids] if is_judged else None) for one, is_judged in chosen
        ]

    def _dynamic(self, model: ModelEntry, prompts: Sequence[_Prompt]) -> dict[_Prompt, Quality]:
        self._run(prompts)
        self._subject.say(f"dynamic exits of {model.name} on {len(prompts)} prompts")
        plan = self._subject.plan(model)
        trace = trace_dynamic(plan, prompts, _prefix(prompts[0]), plan.thresholds)
        return {
            prompt: Quality(
                float(trace.nats[row].mean(dtype=np.float64)),
                float((trace.top_ids[row] == self._traces[model.name, prompt].last_ids).mean()),
                self._full_nats(prompt),
            )
            for row, prompt in enumerate(prompts)
        }

    def _quality(self, stream: Stream) -> Quality:
        """The plans' means, weighted by the tokens of the stream that each generated."""
        prompt, nats, agreement = stream.request.prompt_ids, 0.0, 0.0
        for (model, depth), tokens in stream.exits.items():
            trace = self._traces[model, prompt]
            at = self._subject.model(model).exit_layers.index(depth)
            nats += tokens * float(trace.nats[at])
            agreement += tokens * float(trace.agreement[at])
        total = stream.exits.total()
        return Quality(nats / total, agreement / total, self._full_nats(prompt))

    def _full_nats(self, prompt: _Prompt) -> tuple[float, ...]:
        return tuple(float(self._traces[model.name, prompt].nats[-1]) for model in self.candidates)

    def _nats(self, model: ModelEntry, prompts: Sequence[_Prompt]) -> NDArray[np.float64]:
        """Mean nats by exit over prompts that were run."""
        return np.average([self._traces[model.name, one].nats for one in prompts], axis=0)

    def _run(self, prompts: Iterable[_Prompt]) -> None:
        """Runs every candidate over the prompts that it does not know."""
        prompts = list(dict.fromkeys(prompts))
        for model in self.candidates:
            unknown = [one for one in prompts if (model.name, one) not in self._traces]
            if not unknown:
                continue
            self._subject.say(f"every exit of {model.name} on {len(unknown)} prompts")
            for prompt, trace in zip(unknown, trace_exits(self._subject.plan(model), unknown), strict=True):
                # [exits, tokens of the rest]
                rest = slice(_prefix(prompt) - 1, None)
                last_ids = trace.top_ids[-1, rest]
                self._traces[model.name, prompt] = _Trace(
                    trace.nats[:, rest].mean(axis=1, dtype=np.float64),
                    (trace.top_ids[:, rest] == last_ids).mean(axis=1),
                    last_ids,
                )


def _prefix(prompt: _Prompt) -> int:
    return min(_PROBED_TOKENS, len(prompt) // 2)


def _chosen(streams: Iterable[Stream], every: int) -> list[tuple[Stream, bool]]:
    """All streams in the order of their requests, and whether each is judged."""
    ordered = sorted(streams, key=lambda stream: stream.opened)
    return [
        (one, bool(one.token_ids) and (index < FIRST_REQUESTS or index % every == 0))
        for index, one in enumerate(ordered)
    ]
