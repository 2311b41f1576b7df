"""Chooses a worker for a stream: a pure function of the known facts about the workers."""

from collections.abc import Iterable, Set
from dataclasses import dataclass

from helios.served import ServedPlan


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ready worker as the router sees it.

    `sequences` is its load: streams of this gateway and of others. `free_share` is the free part of its KV
    blocks, 0 to 1. `suspects` counts streams of this gateway under which another worker has failed and which
    have not settled on this one.
    """

    address: str
    plan: ServedPlan
    tokenizer_id: str
    context_tokens: int
    sequences: int
    free_share: float
    suspects: int = 0


@dataclass(frozen=True, slots=True)
class Needs:
    """A stream's requirements for a worker. Empty or 0: no such requirement."""

    models: frozenset[str] = frozenset()
    tokenizer_id: str = ""
    context_tokens: int = 0

    def met_by(self, worker: Candidate) -> bool:
        """Whether the worker can compute this stream."""
        return (
            (not self.models or worker.plan.model in self.models)
            and self.tokenizer_id in ("", worker.tokenizer_id)
            and self.context_tokens <= worker.context_tokens
        )


def choose(
    workers: Iterable[Candidate],
    needs: Needs,
    *,
    prefer: ServedPlan | None = None,
    avoid: Set[str] = frozenset(),
    exclude: Set[str] = frozenset(),
    alone: bool = False,
) -> Candidate | None:
    """The worker that takes a stream, or None if none can.

    A new stream goes to the least loaded worker. `avoid` and `exclude` are addresses. An avoided worker is
    used if there is no other, an excluded one never. A stream that continues after a loss names its plan in
    `prefer`, because only the same model and depth continue it with the same tokens. A stream that must be
    the only suspect on its worker (`alone`) goes to a worker without suspects if there is one. If the chosen
    worker has suspects, the caller must wait.
    """

    def cost(worker: Candidate) -> tuple[bool, int, bool, int, float, str]:
        distance = 0
        if prefer is not None and worker.plan != prefer:
            distance = 1 if worker.plan.model == prefer.model else 2
        return (
            worker.address in avoid,
            distance,
            alone and worker.suspects > 0,
            worker.sequences,
            -worker.free_share,
            worker.address,
        )

    able = (worker for worker in workers if worker.address not in exclude and needs.met_by(worker))
    return min(able, key=cost, default=None)
