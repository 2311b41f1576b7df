"""Logits, and the values per row that sampling needs first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from helios.engine.kernels import border
from helios.engine.kernels.layout import CONFIDENCE, LOGPROB, NORMALIZER, SUMMARY, Outputs
from helios.engine.kernels.team import TEAM


@dataclass(frozen=True, slots=True, eq=False)
class Readout:
    """The model's output for some rows, before penalties and temperature."""

    logits: torch.Tensor  # float32 [rows, vocabulary]
    # Index of each row's largest logit, the first one if several are equal: int64 [rows].
    best: torch.Tensor
    # float32 [rows, SUMMARY], with the columns that `kernels.layout` names.
    summaries: torch.Tensor
    # best and summaries as NumPy arrays of the same memory. A compiled step is so short that reading them
    # through torch would take longer than the step.
    host: tuple[NDArray[Any], NDArray[Any]] | None = None

    @classmethod
    def joined(cls, parts: Sequence[Self], order: torch.Tensor) -> Self:
        """Concatenates the rows of all parts, then takes them in `order`."""
        kinds = zip(*((part.logits, part.best, part.summaries) for part in parts), strict=True)
        logits, best, summaries = (torch.cat(kind)[order] for kind in kinds)
        return cls(logits, best, summaries)

    def rows(self, chosen: torch.Tensor | slice) -> "Readout":
        """A readout of the chosen rows."""
        host = None
        if self.host is not None and isinstance(chosen, slice):
            host = self.host[0][chosen], self.host[1][chosen]
        return Readout(self.logits[chosen], self.best[chosen], self.summaries[chosen], host)

    def nats(self, targets: Sequence[int]) -> float:
        """Sum over the rows of the negative log-probability of each row's target token.

        The sum is infinite or NaN if the model's probabilities are not finite.
        """
        chosen = (float(self.logits[row, target]) for row, target in enumerate(targets))
        return math.fsum(
            normalizer - logit for normalizer, logit in zip(self.normalizers.tolist(), chosen, strict=True)
        )

    def costs(self, targets: Sequence[int]) -> tuple[list[float], list[float]]:
        """Each row's negative log-probability of its target token, and -ln of its confidence."""
        if self.host is not None:
            _, summaries = self.host
            logits = self.logits.numpy()[np.arange(len(targets)), targets]
            return (summaries[:, NORMALIZER] - logits).tolist(), (-summaries[:, LOGPROB]).tolist()
        at = torch.tensor(targets, device=self.logits.device)
        nats = self.normalizers - self.logits.gather(1, at[:, None])[:, 0]
        found, doubts = torch.stack([nats, -self.logprobs]).tolist()
        return found, doubts

    def likeliest(self) -> tuple[list[int], list[float], list[float]]:
        """The most likely token of each row, its natural log-probability and its probability."""
        if self.host is not None:
            best, summaries = self.host
            return best.tolist(), summaries[:, LOGPROB].tolist(), summaries[:, CONFIDENCE].tolist()
        # One transfer for all columns.
        columns = self.summaries[:, LOGPROB : CONFIDENCE + 1].T
        parts = torch.cat([self.best[None].double(), columns.double()]).tolist()
        return list(map(int, parts[0])), parts[1], parts[2]

    @property
    def normalizers(self) -> torch.Tensor:
        """Log-sum-exp of each row."""
        return self.summaries[:, NORMALIZER]

    @property
    def logprobs(self) -> torch.Tensor:
        """Natural log-probability of each row's best token."""
        return self.summaries[:, LOGPROB]

    @property
    def confidences(self) -> torch.Tensor:
        """Probability of each row's best token."""
        return self.summaries[:, CONFIDENCE]


def read_on_device(logits: torch.Tensor) -> Readout:
    """Summarizes logits [rows, vocabulary] with torch, where they are."""
    logits = logits.float()
    peaks, best = logits.max(dim=-1)
    normalizers = logits.logsumexp(dim=-1)
    logprobs = peaks - normalizers
    return Readout(logits, best, torch.stack([peaks, normalizers, logprobs, logprobs.exp()], dim=1))


def read(logits: torch.Tensor) -> Readout:
    """Summarizes logits [rows, vocabulary] on a CPU, with a kernel."""
    logits = logits.float().contiguous()
    rows, width = logits.shape
    best, summaries = torch.empty(rows, dtype=torch.int64), torch.empty(rows, SUMMARY)
    outputs = Outputs(logits.data_ptr(), best.data_ptr(), summaries.data_ptr(), exit_layers=0)
    TEAM.run(
        border.call_summarize,
        tuple(outputs),
        rows,
        width,
        # One exponential counts as ten operations.
        operations=10 * rows * width,
    )
    return Readout(logits, best, summaries)
