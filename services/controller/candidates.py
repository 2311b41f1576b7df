"""Selects the models to consider: the shortlist (TopK in arXiv 2504.10724) of those that workers can load."""

import asyncio
from pathlib import Path

from helios import catalog
from helios.catalog import ModelEntry
from helios.shortlist import shortlist
from helios.slo import Objective
from services.controller.fleet import Fleet


class Candidates:
    """Makes the shortlist from offline facts, or, without a models directory, from what workers report."""

    def __init__(self, models_dir: Path | None, top_k: int, context_tokens: int | None, fleet: Fleet) -> None:
        """context_tokens: limit of the workers' contexts; None: there is none."""
        self._models_dir = models_dir
        self._top_k = top_k
        self._context_tokens = context_tokens
        self._fleet = fleet
        # Read once, at first use.
        self._catalog: list[ModelEntry] | None = None

    async def names(self, objective: Objective) -> tuple[str, ...]:
        """The shortlist for an objective. Without offline facts, every model that workers can load.

        Raises SettingsError when the models directory cannot be read.
        """
        serving, loadable = self._fleet.serving, self._fleet.loadable
        if self._models_dir is None or not serving:
            return tuple(sorted(loadable))
        if self._catalog is None:
            self._catalog = await asyncio.to_thread(catalog.list_models, self._models_dir)
        # Sequences in flight can only move to a model with the same tokens.
        tokenizers = (None, serving[0].model.tokenizer_id)
        movable = [
            entry.within(self._context_tokens)
            for entry in self._catalog
            if entry.name in loadable and entry.tokenizer_id in tokenizers
        ]
        chosen = shortlist(
            movable,
            objective,
            min(worker.memory_bytes for worker in serving),
            serving[0].precision,
            self._top_k,
        )
        return tuple(entry.name for entry in chosen.candidates)
