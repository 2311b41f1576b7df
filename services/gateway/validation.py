"""Checks a request before any worker sees it. Each refusal says what to change."""

from collections.abc import Sequence

from google.protobuf import empty_pb2
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from helios.chat_template import ROLES
from helios.errors import InvalidRequestError
from helios.sampling import SamplingParams
from helios.v1 import inference_pb2
from services.gateway.settings import GatewaySettings

MAX_REQUEST_ID_CHARACTERS = 128
MAX_MODEL_CHARACTERS = 256
# Of an unknown role, so many characters are repeated in the message.
_MOST_ROLE_CHARACTERS = 40
# Names by field number.
_PROMPTS = {
    field.number: field.name
    for field in inference_pb2.GenerateRequest.DESCRIPTOR.oneofs_by_name["prompt"].fields
}


def parse(raw: bytes) -> inference_pb2.GenerateRequest:
    """Parses the received bytes as a request.

    Raises InvalidRequestError if they are not a request, or if it has several prompts. Only the bytes show
    the latter, because the parser silently keeps the last member of a oneof.
    """
    try:
        request = inference_pb2.GenerateRequest.FromString(raw)
        fields = UnknownFieldSet(empty_pb2.Empty.FromString(raw))
    except DecodeError as error:
        raise InvalidRequestError(
            "the message is not a valid helios.v1.GenerateRequest: its strings must be valid UTF-8 "
            "and its fields as in the proto"
        ) from error
    numbers = {fields[position].field_number for position in range(len(fields))}
    if len(given := sorted(numbers & _PROMPTS.keys())) > 1:
        names = " and ".join(_PROMPTS[number] for number in given)
        raise InvalidRequestError(f"the request has both {names}; set one of them")
    return request


def check_request(request: inference_pb2.GenerateRequest, settings: GatewaySettings) -> None:
    """Raises InvalidRequestError when a name is too long, or the prompt is missing, empty or not valid."""
    if len(request.request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise InvalidRequestError(f"request_id must have at most {MAX_REQUEST_ID_CHARACTERS} characters")
    if len(request.model) > MAX_MODEL_CHARACTERS:
        raise InvalidRequestError(f"model must have at most {MAX_MODEL_CHARACTERS} characters")
    match request.WhichOneof("prompt"):
        case None:
            raise InvalidRequestError("the request has no prompt; set text, token_ids or messages")
        case "text" if not request.text:
            raise InvalidRequestError("the prompt is empty; text must have at least one character")
        case "token_ids" if not request.token_ids.ids:
            raise InvalidRequestError("the prompt is empty; token_ids.ids must have at least one id")
        case "messages":
            _check_messages(request.messages.messages, settings)


def _check_messages(messages: Sequence[inference_pb2.ChatMessage], settings: GatewaySettings) -> None:
    if not messages:
        raise InvalidRequestError("the conversation is empty; messages.messages must have at least one")
    # Each message takes at least one token.
    if len(messages) > settings.max_prompt_tokens:
        raise InvalidRequestError(
            f"the conversation has {len(messages)} messages; this gateway takes at most "
            f"{settings.max_prompt_tokens}"
        )
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequestError(
                f"messages.messages[{number}].role must be {', '.join(ROLES[:-1])} or {ROLES[-1]}, not "
                f"{message.role[:_MOST_ROLE_CHARACTERS]!r}"
            )


def sampling_params(
    request: inference_pb2.GenerateRequest, settings: GatewaySettings, default_seed: int
) -> SamplingParams:
    """The request's sampling parameters with defaults filled in.

    Raises InvalidRequestError naming the field that is out of range or above the gateway's limit.
    """
    sampling = SamplingParams.from_proto(
        request.sampling, default_max_tokens=settings.default_max_tokens, default_seed=default_seed
    )
    if sampling.max_tokens > settings.max_tokens:
        raise InvalidRequestError(
            f"sampling.max_tokens must be at most {settings.max_tokens}, not {sampling.max_tokens}"
        )
    return sampling


def check_prompt_bytes(size: int, longest_token_bytes: int, limit: int) -> None:
    """Refuses a text that certainly has more than `limit` tokens, without tokenizing it.

    size: length of the text in UTF-8 bytes. Raises InvalidRequestError.
    """
    at_least = -(-size // longest_token_bytes)
    if at_least > limit:
        raise InvalidRequestError(
            f"the prompt has at least {at_least} tokens and may have at most {limit}; shorten it"
        )


def prompt_limit(context_tokens: int, settings: GatewaySettings) -> int:
    """The most tokens that a prompt may have. The model's context must have room for one more."""
    return min(settings.max_prompt_tokens, context_tokens - 1)


def check_prompt_ids(
    ids: Sequence[int], vocab_size: int, context_tokens: int, settings: GatewaySettings
) -> None:
    """Raises InvalidRequestError when the prompt is too long or an id is not in the vocabulary."""
    if len(ids) > settings.max_prompt_tokens:
        raise InvalidRequestError(
            f"the prompt has {len(ids)} tokens; this gateway takes at most {settings.max_prompt_tokens}"
        )
    if len(ids) >= context_tokens:
        raise InvalidRequestError(
            f"the prompt has {len(ids)} tokens; the model's context of {context_tokens} must hold it "
            "and at least one more"
        )
    if (largest := max(ids)) >= vocab_size:
        raise InvalidRequestError(
            f"token id {largest} is out of the vocabulary; ids go from 0 to {vocab_size - 1}"
        )
