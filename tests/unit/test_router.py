"""Property tests of the router, which is a pure function."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from helios.routing.ranked_plan import RankedPlan
from helios.served import ServedPlan, successor
from services.gateway.router import Candidate, Needs, Ranking, choose, expected_seconds

PLANS = st.builds(ServedPlan, model=st.sampled_from(["prose", "tech"]), depth=st.sampled_from([3, 6, 12]))
ADDRESSES = st.sampled_from([f"host-{number}:1" for number in range(6)])
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        address=ADDRESSES,
        plans=st.lists(PLANS, min_size=1, max_size=3, unique=True).map(tuple),
        tokenizer_id=st.sampled_from(["t1", "t2"]),
        context_tokens=st.sampled_from([256, 512]),
        sequences=st.integers(0, 100),
        free_share=st.floats(0, 1),
        places=st.integers(1, 64),
        seconds_per_place=st.floats(0, 10),
    ),
    unique_by=lambda candidate: candidate.address,
)
RANKINGS = st.builds(
    Ranking,
    plans=st.lists(
        st.builds(
            RankedPlan,
            plan=PLANS,
            extra_seconds_per_token=st.floats(0, 1),
            expected_perplexity_increase=st.floats(-1, 1),
            reason=st.just("a test"),
        ),
        min_size=1,
        unique_by=lambda ranked: ranked.plan,
    ).map(tuple),
    max_tokens=st.integers(1, 500),
)
NEEDS = st.builds(
    Needs,
    models=st.frozensets(st.sampled_from(["prose", "tech"])),
    tokenizer_id=st.sampled_from(["", "t1", "t2"]),
    context_tokens=st.sampled_from([0, 300]),
)


SIX, TWELVE = ServedPlan(model="prose", depth=6), ServedPlan(model="prose", depth=12)


def worker(address: str, sequences: int = 0, free: float = 1.0) -> Candidate:
    return Candidate(address, (SIX,), "t1", 512, sequences, free)


def ranked(plan: ServedPlan, extra_seconds_per_token: float = 0.0) -> RankedPlan:
    return RankedPlan(
        plan=plan,
        extra_seconds_per_token=extra_seconds_per_token,
        expected_perplexity_increase=0.01,
        reason="a test",
    )


@given(CANDIDATES, NEEDS, st.none() | PLANS, st.sets(ADDRESSES), st.sets(ADDRESSES))
def test_a_chosen_worker_can_serve_and_is_not_excluded(
    candidates: list[Candidate], needs: Needs, prefer: ServedPlan | None, avoid: set[str], exclude: set[str]
) -> None:
    chosen = choose(candidates, needs, prefer=prefer, avoid=avoid, exclude=exclude)
    able = [one for one in candidates if one.address not in exclude and needs.met_by(one)]
    if chosen is None:
        assert not able
        return
    assert chosen in able
    if chosen.address in avoid:
        assert all(one.address in avoid for one in able), "an avoided worker is the last resort"


@given(CANDIDATES, NEEDS)
def test_a_new_stream_goes_to_a_least_loaded_worker(candidates: list[Candidate], needs: Needs) -> None:
    chosen = choose(candidates, needs)
    if chosen is not None:
        assert chosen.sequences == min(one.sequences for one in candidates if needs.met_by(one))


@given(CANDIDATES, NEEDS, PLANS)
def test_a_stream_that_goes_on_stays_with_its_plan_when_that_is_served(
    candidates: list[Candidate], needs: Needs, plan: ServedPlan
) -> None:
    chosen = choose(candidates, needs, prefer=plan)
    able = [served for one in candidates if needs.met_by(one) for served in one.plans]
    if chosen is not None and plan in able:
        assert plan in chosen.plans
    elif chosen is not None and plan.model in {one.model for one in able}:
        assert plan.model in {one.model for one in chosen.plans}


@given(CANDIDATES, NEEDS, RANKINGS)
def test_a_stream_is_never_served_under_a_plan_that_was_not_ranked(
    candidates: list[Candidate], needs: Needs, ranking: Ranking
) -> None:
    chosen = choose(candidates, needs, ranking=ranking)
    plans = {one.plan for one in ranking.plans}
    if chosen is None:
        assert not any(needs.met_by(one) and plans & set(one.plans) for one in candidates)
        return
    best = ranking.best_at(chosen.plans)
    assert best is not None
    assert best.plan in plans & set(chosen.plans)


def test_an_overloaded_plan_spills_over_when_the_wait_costs_more_than_the_next_plan() -> None:
    ranking = Ranking((ranked(SIX), ranked(TWELVE, 0.01)), max_tokens=100)
    for waiting, expected in ((9, SIX), (11, TWELVE)):
        # A place becomes free every 0.1 s; the deeper plan costs 1 s more for the whole stream.
        six = Candidate("a:1", (SIX,), "t1", 512, 4 + waiting - 1, 1.0, places=4, seconds_per_place=0.1)
        twelve = Candidate("b:1", (TWELVE,), "t1", 512, 3, 1.0, places=4, seconds_per_place=0.1)
        assert choose([twelve, six], Needs(), ranking=ranking) == (six if expected == SIX else twelve)


def test_a_wait_begins_with_the_first_sequence_that_has_no_place() -> None:
    for sequences, seconds in ((0, 0.0), (3, 0.0), (4, 0.5), (6, 1.5)):
        one = Candidate("a:1", (SIX,), "t1", 512, sequences, 1.0, places=4, seconds_per_place=0.5)
        assert one.wait_seconds == seconds
        assert expected_seconds(one, ranked(SIX, 0.25), max_tokens=8) == seconds + 2.0


@given(st.lists(PLANS, min_size=1, unique=True), PLANS)
def test_a_stream_goes_on_under_its_own_plan_or_one_that_is_no_shallower(
    plans: list[ServedPlan], plan: ServedPlan
) -> None:
    found = successor(plan, plans)
    same = [one for one in plans if one.model == plan.model]
    assert found in plans
    if plan in plans:
        assert found == plan
    elif any(one.depth > plan.depth for one in same):
        assert found.model == plan.model
        assert found.depth > plan.depth
    elif same:
        assert found == max(same, key=lambda one: one.depth)
    else:
        assert found == plans[0]


@given(CANDIDATES, NEEDS, st.randoms())
def test_the_choice_does_not_depend_on_the_order_of_workers(
    candidates: list[Candidate], needs: Needs, random: Random
) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)
    assert choose(candidates, needs) == choose(shuffled, needs)


def test_equal_load_is_decided_by_free_kv_blocks() -> None:
    workers = [worker("a:1", free=0.2), worker("b:1", free=0.9), worker("c:1", sequences=1)]
    assert choose(workers, Needs()) == workers[1]
