"""Validation: for any bytes, the result is a valid request or a reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.client import generate_request
from helios.errors import InvalidRequestError
from helios.routing.preference import Preference
from helios.slo import Objective
from helios.v1 import controller_pb2, generation_pb2, inference_pb2, worker_pb2
from services.gateway.settings import GatewaySettings
from services.gateway.validation import (
    check_prompt_bytes,
    check_prompt_ids,
    check_request,
    parse,
    prompt_limit,
    sampling_params,
)

SETTINGS = GatewaySettings(max_prompt_tokens=100, max_tokens=200)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused_with_a_reason(raw: bytes) -> None:
    try:
        request = parse(raw)
        check_request(request, SETTINGS)
        Preference.from_proto(request)
        sampling_params(request, SETTINGS, default_seed=1)
    except InvalidRequestError as refusal:
        assert refusal.message
    else:
        assert request.text or request.token_ids.ids or request.messages.messages


@given(st.binary(min_size=1, max_size=127))
def test_text_that_is_not_utf8_is_refused(text: bytes) -> None:
    raw = bytes([0x12, len(text)]) + text  # Field 2, length-delimited.
    try:
        expected = text.decode()
    except UnicodeDecodeError:
        with pytest.raises(InvalidRequestError, match="valid UTF-8"):
            parse(raw)
    else:
        assert parse(raw).text == expected


@pytest.mark.parametrize("order", [1, -1])
def test_both_prompts_are_refused_in_either_order(order: int) -> None:
    parts = [generate_request("a").SerializeToString(), generate_request([1]).SerializeToString()]
    with pytest.raises(InvalidRequestError, match="both text and token_ids"):
        parse(b"".join(parts[::order]))


@given(st.integers(0, 2**32 - 1), st.floats(allow_nan=True, width=32), st.floats(allow_nan=True, width=32))
def test_accepted_sampling_is_within_the_limits(max_tokens: int, temperature: float, top_p: float) -> None:
    sampling = generation_pb2.SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    request = inference_pb2.GenerateRequest(text="a", sampling=sampling)
    good = 1 <= max_tokens <= 200 and 0 <= temperature < float("inf") and 0 < top_p <= 1
    if good:
        accepted = sampling_params(request, SETTINGS, default_seed=7)
        assert (accepted.max_tokens, accepted.seed) == (max_tokens, 7)
    else:
        with pytest.raises(InvalidRequestError, match=r"sampling\.(max_tokens|temperature|top_p) must be"):
            sampling_params(request, SETTINGS, default_seed=7)


@given(st.floats(allow_nan=True), st.integers(-(2**31), 2**31 - 1))
def test_an_accepted_preference_is_within_the_limits_and_reaches_the_worker(
    increase: float, objective: int
) -> None:
    request = inference_pb2.GenerateRequest(text="a", max_perplexity_increase=increase)
    # Protos take any number for an enum that has been read from bytes.
    raw = request.SerializeToString() + b"\x38" + _varint(objective)
    request = parse(raw)
    allowed = (
        controller_pb2.OBJECTIVE_UNSPECIFIED,
        controller_pb2.OBJECTIVE_THROUGHPUT,
        controller_pb2.OBJECTIVE_LATENCY,
    )
    if 0 <= increase < float("inf") and objective in allowed:
        preference = Preference.from_proto(request)
        assert preference.max_perplexity_increase == increase
        assert Preference.from_proto(preference.to_proto()) == preference
        assert preference.to_proto().objective == objective
    else:
        with pytest.raises(InvalidRequestError, match=r"(max_perplexity_increase|objective) must be"):
            Preference.from_proto(request)


def test_a_request_without_preference_leaves_the_choice_to_the_operator() -> None:
    preference = Preference.from_proto(generate_request("a"))
    assert preference == Preference(None, None)
    assert preference.to_proto() == worker_pb2.Route()


def test_the_client_sends_a_preference() -> None:
    request = generate_request("a", max_perplexity_increase=0.0, objective=Objective.LATENCY)
    assert Preference.from_proto(request) == Preference(0.0, Objective.LATENCY)


def _varint(value: int) -> bytes:
    """An enum's number on the wire; negative ones as 64 bits."""
    value &= (1 << 64) - 1
    parts = []
    while True:
        value, part = value >> 7, value & 0x7F
        parts.append(part | (0x80 if value else 0))
        if not value:
            return bytes(parts)


@given(st.lists(st.integers(0, 600), min_size=1, max_size=150), st.integers(2, 200))
def test_accepted_ids_fit_vocabulary_limit_and_context(ids: list[int], context: int) -> None:
    fits = len(ids) <= prompt_limit(context, SETTINGS) and max(ids) < 512
    if fits:
        check_prompt_ids(ids, vocab_size=512, context_tokens=context, settings=SETTINGS)
    else:
        with pytest.raises(InvalidRequestError):
            check_prompt_ids(ids, vocab_size=512, context_tokens=context, settings=SETTINGS)


def test_a_text_too_long_for_any_tokenization_is_refused_by_its_size() -> None:
    check_prompt_bytes(size=1000, longest_token_bytes=10, limit=100)
    with pytest.raises(InvalidRequestError, match="at least 101 tokens and may have at most 100"):
        check_prompt_bytes(size=1001, longest_token_bytes=10, limit=100)
