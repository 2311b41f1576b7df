"""Logits, and of each row what sampling needs first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from numpy.typing import NDArray

from helios.engine.kernels import step as kernels
from helios.engine.kernels.sampling import SUMMARY
from helios.engine.kernels.team import TEAM


@dataclass(frozen=True, slots=True, eq=False)
class Readout:
    """Of the model itself, before penalties and temperature."""

    logits: torch.Tensor  # float32 [rows, vocabulary]
    # The first of each row's largest logits: int64 [rows].
    best: torch.Tensor
    # The largest logit, log-sum-exp, and the largest's log-probability and probability: float32 [rows, 4].
    summaries: torch.Tensor
    # The memory of best and of summaries, where a step is so short that reading it through torch is felt.
    host: tuple[NDArray[Any], NDArray[Any]] | None = None

    @classmethod
    def joined(cls, parts: Sequence[Self], order: torch.Tensor) -> Self:
        """The rows of all parts, in an order of their own."""
        kinds = zip(*((part.logits, part.best, part.summaries) for part in parts), strict=True)
        logits, best, summaries = (torch.cat(kind)[order] for kind in kinds)
        return cls(logits, best, summaries)

    def rows(self, chosen: torch.Tensor | slice) -> "Readout":
        """Some of the rows."""
        host = None
        if self.host is not None and isinstance(chosen, slice):
            host = self.host[0][chosen], self.host[1][chosen]
        return Readout(self.logits[chosen], self.best[chosen], self.summaries[chosen], host)

    def nats(self, targets: Sequence[int]) -> float:
        """Sum of the negative log-probabilities of one token for each row.

        Infinite or NaN if the model computes no probabilities.
        """
        chosen = (float(self.logits[row, target]) for row, target in enumerate(targets))
        return math.fsum(
            normalizer - logit for normalizer, logit in zip(self.normalizers.tolist(), chosen, strict=True)
        )

    def likeliest(self) -> tuple[list[int], list[float], list[float]]:
        """Of each row the likeliest token, its natural log-probability and its probability."""
        if self.host is not None:
            best, summaries = self.host
            return best.tolist(), summaries[:, 2].tolist(), summaries[:, 3].tolist()
        # In one transfer.
        parts = torch.cat([self.best[None].double(), self.summaries[:, 2:].T.double()]).tolist()
        return list(map(int, parts[0])), parts[1], parts[2]

    @property
    def normalizers(self) -> torch.Tensor:
        """Log-sum-exp of each row."""
        return self.summaries[:, 1]

    @property
    def logprobs(self) -> torch.Tensor:
        """Natural log-probability of each row's best token."""
        return self.summaries[:, 2]

    @property
    def confidences(self) -> torch.Tensor:
        """Probability of each row's best token."""
        return self.summaries[:, 3]


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
    TEAM.run(
        kernels.summarize,
        logits.data_ptr(),
        rows,
        width,
        best.data_ptr(),
        summaries.data_ptr(),
        # An exponential each.
        operations=10 * rows * width,
    )
    return Readout(logits, best, summaries)
