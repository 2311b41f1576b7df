"""Property tests of the router, which is a pure function."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from helios.served import ServedPlan
from services.gateway.router import Candidate, Needs, choose

PLANS = st.builds(ServedPlan, model=st.sampled_from(["prose", "tech"]), depth=st.sampled_from([3, 6, 12]))
ADDRESSES = st.sampled_from([f"host-{number}:1" for number in range(6)])
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        address=ADDRESSES,
        plan=PLANS,
        tokenizer_id=st.sampled_from(["t1", "t2"]),
        context_tokens=st.sampled_from([256, 512]),
        sequences=st.integers(0, 100),
        free_share=st.floats(0, 1),
    ),
    unique_by=lambda candidate: candidate.address,
)
NEEDS = st.builds(
    Needs,
    models=st.frozensets(st.sampled_from(["prose", "tech"])),
    tokenizer_id=st.sampled_from(["", "t1", "t2"]),
    context_tokens=st.sampled_from([0, 300]),
)


def worker(address: str, sequences: int = 0, free: float = 1.0) -> Candidate:
    return Candidate(address, ServedPlan(model="prose", depth=6), "t1", 512, sequences, free)


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
    able = [one.plan for one in candidates if needs.met_by(one)]
    if chosen is not None and plan in able:
        assert chosen.plan == plan
    elif chosen is not None and plan.model in {one.model for one in able}:
        assert chosen.plan.model == plan.model


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
