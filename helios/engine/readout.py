"""Logits, and of each row what sampling needs first."""

from typing import NamedTuple

import torch

from helios.engine import kernels
from helios.engine.team import TEAM


class Readout(NamedTuple):
    """Of the model itself, before penalties and temperature."""

    logits: torch.Tensor  # float32 [rows, vocabulary]
    # The first of each row's largest logits: int64 [rows].
    best: torch.Tensor
    # The largest logit, log-sum-exp, and the largest's log-probability and probability: float32 [rows, 4].
    summaries: torch.Tensor

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


def read(logits: torch.Tensor) -> Readout:
    """Summarizes logits [rows, vocabulary]."""
    logits = logits.float()
    if logits.device.type != "cpu":
        peaks, best = logits.max(dim=-1)
        normalizers = logits.logsumexp(dim=-1)
        logprobs = peaks - normalizers
        return Readout(logits, best, torch.stack([peaks, normalizers, logprobs, logprobs.exp()], dim=1))
    logits = logits.contiguous()
    rows, width = logits.shape
    best, summaries = torch.empty(rows, dtype=torch.int64), torch.empty(rows, kernels.SUMMARY)
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
