"""Measures the quality of plans on held-out text of a phase."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bench.demo.traffic import Phase
from bench.systems.subject import Sizes, Subject
from bench.texts import held_out
from helios import catalog
from helios.engine.evaluation.trace import trace_dynamic
from helios.engine.threads import set_threads
from helios.hardware import available_memory
from helios.modes import Precision

_HELD_OUT = Sizes(window_tokens=192, windows=20, prompt_tokens=32, forced_tokens=96, forced_windows=20)


class Judge:
    """Knows the quality of every plan on held-out text, from the predictions of every exit for it."""

    def __init__(
        self, models_dir: Path, tokenizer_id: str, precision: Precision, say: Callable[[str], None]
    ) -> None:
        """Runs every candidate over the texts, in the workers' precision.

        Raises SettingsError when there is no candidate.
        """
        set_threads(1, precision)
        models = catalog.list_models(models_dir)
        movable = [model for model in models if model.tokenizer_id in (None, tokenizer_id)]
        context = min((model.context_tokens for model in movable), default=_HELD_OUT.window_tokens)
        sizes = replace(_HELD_OUT, window_tokens=min(_HELD_OUT.window_tokens, context))
        self._subject = Subject(movable, sizes, available_memory() // 4, say, precision)
        self._plans: dict[tuple[str, int, str], tuple[float, float]] = {}
        for model, domain in itertools.product(self._subject.models, held_out.DOMAINS):
            self._subject.traces(model, domain)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which all candidates share."""
        return next(iter(self._subject.tokenizers.values()))

    def best(self, phase: Phase) -> catalog.ModelEntry:
        """The candidate that is best at full depth."""
        return self._subject.judge(*phase.domains)

    def of_plan(self, model: str, depth: int, phase: Phase) -> tuple[float, float]:
        """Quality of a plan: the relative rise of perplexity over the best candidate at full depth, and the
        agreement with the model's own last layer."""
        key = (model, depth, phase.name)
        if key not in self._plans:
            found = self._subject.quality(self._subject.model(model), depth, *phase.domains)
            self._plans[key] = (found.perplexity_increase, found.agreement)
        return self._plans[key]

    def of_dynamic(self, phase: Phase) -> tuple[float, float]:
        """The same for the best candidate in exit mode `dynamic`: each token leaves at its own exit."""
        model, sizes = self.best(phase), self._subject.sizes
        plan, prefix = self._subject.plan(model), sizes.prompt_tokens
        nats, full_nats, agrees = [], [], []
        for domain in phase.domains:
            texts = [
                window[: prefix + sizes.forced_tokens] for window in self._subject.windows(model, domain)
            ]
            dynamic = trace_dynamic(plan, texts, prefix, plan.thresholds)
            for trace, row in zip(self._subject.traces(model, domain), range(len(texts)), strict=True):
                part = slice(prefix - 1, len(texts[row]) - 1)
                full_nats.append(trace.nats[-1, part])
                agrees.append(dynamic.top_ids[row] == trace.top_ids[-1, part])
            nats.append(dynamic.nats.ravel())
        excess = np.concatenate(nats).mean(dtype=np.float64)
        excess -= np.concatenate(full_nats).mean(dtype=np.float64)
        return math.expm1(float(excess)), float(np.concatenate(agrees).mean())
