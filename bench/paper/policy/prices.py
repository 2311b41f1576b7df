"""What routing costs in a simulation: tokens under each plan, probes, loading, and evaluations."""

from dataclasses import dataclass

from bench.paper.policy.simulation import Scene
from helios.routing.knowledge import PlanCost, ProbeCost
from helios.routing.probe import PROBE_READINGS, read_positions
from helios.served import ServedPlan


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices in seconds.

    layers: by model, its layers up to the first exit over a beginning. reading: the rows of the LM head that
    one reading of one model takes. whole: probing all models once more, and reading all positions. loading:
    with all layers, once, all models but the first, which is served from the start in every simulation.
    evaluation: CPU of one request under one model, for the router to learn from.
    """

    plans: tuple[PlanCost, ...]
    tokens: float
    layers: dict[str, float]
    reading: float
    whole: float
    loading: float
    evaluation: float

    @property
    def probe(self) -> ProbeCost:
        """What a router expects a probe to cost."""
        others = len(self.layers) - 1
        layers = sum(self.layers.values()) / len(self.layers)
        return ProbeCost(first_seconds=self.reading, further_seconds=others * (layers + self.reading))

    def probing(self, read: set[str], plan: ServedPlan) -> float:
        """Seconds of the probe of a request that `plan` serves. read: the models that were read.

        The layers of the model that serves are not computed again, so only those of the others are lost.
        """
        lost = sum(self.layers[model] for model in read - {plan.model})
        return len(read) * self.reading + lost


def prices(scene: Scene) -> Prices:
    """The prices of a scene, which has at least one request."""
    profiles = scene.profiles.values()
    plans = [ServedPlan(model=one.model, depth=exit_.depth) for one in profiles for exit_ in one.exits]
    rows = len(read_positions(scene.judged_from, PROBE_READINGS))
    every = len(read_positions(scene.judged_from, scene.judged_from))
    layers = {one.model: scene.judged_from / one.exits[0].prefill_tokens_per_second for one in profiles}
    return Prices(
        plans=tuple(
            PlanCost(
                model=plan.model,
                depth=plan.depth,
                seconds=scene.token_seconds(plan),
                latency_seconds=scene.profiles[plan.model].at(plan.depth).step_seconds(scene.batch),
            )
            for plan in plans
        ),
        tokens=float(scene.requests[0].records[plans[0].model].tokens),
        layers=layers,
        reading=rows * scene.row_seconds,
        whole=sum(layers.values()) + len(layers) * every * scene.row_seconds,
        loading=sum(one.full.load_seconds for one in list(profiles)[1:]),
        evaluation=scene.router_evaluation_seconds,
    )
