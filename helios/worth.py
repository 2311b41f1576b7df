"""What the exits of a profiled model are worth, in a sentence."""

from helios.history import ExitProfile, ModelProfile


def worth(profile: ModelProfile, bound: float) -> str:
    """The shallowest depth whose perplexity rises by at most `bound` (a share), and what it brings.

    If there is none, the sentence names the nearest exit and what it costs.
    """
    full = profile.full
    early = profile.exits[:-1]
    if not early:
        return (
            f"{profile.model} has no exits before its last layer ({full.depth}); `helios models add-exits` "
            "trains them."
        )
    within = [one for one in early if profile.perplexity_increase(one) <= bound]
    if not within:
        nearest = min(early, key=profile.perplexity_increase)
        return (
            f"No exit of {profile.model} pays: none is within {bound:+.0%} perplexity. The nearest is depth "
            f"{nearest.depth} of {full.depth}, with {_cost(profile, nearest)}; at depth {full.depth} the "
            "model loses nothing."
        )
    shallowest = within[0]
    gains = {speed.batch: full.step_seconds(speed.batch) / speed.step_seconds for speed in shallowest.decode}
    best = max(gains.values())
    beginning = (
        f"Depth {shallowest.depth} of {full.depth} is the shallowest of {profile.model} within {bound:+.0%} "
        f"perplexity ({_cost(profile, shallowest)})"
    )
    left_out = full.depth - shallowest.depth
    layers = f"{left_out} layer{'s' if left_out > 1 else ''} less"
    if best <= 1.0:
        return f"{beginning}, but it brings nothing: with {layers}, steps take as long as at full depth."
    speeds = " and ".join(f"{gain:.2f} times as fast at batch {batch}" for batch, gain in gains.items())
    return f"{beginning}. With {layers}, steps are {speeds}."


def _cost(profile: ModelProfile, one: ExitProfile) -> str:
    return f"{profile.perplexity_increase(one):+.1%} and {one.agreement:.0%} of tokens as the last layer's"
