"""Fits a prompt for evaluation."""

from collections.abc import Sequence

from helios.catalog import ModelEntry
from helios.engine.evaluation.settings import EvaluationSettings
from helios.errors import InvalidRequestError


def fit_prompt(prompt: Sequence[int], entry: ModelEntry, settings: EvaluationSettings) -> list[int]:
    """The prompt's tokens, cut so that its continuation fits the context.

    Raises InvalidRequestError for an empty prompt, for tokens that the model does not know, and when the
    context has no room for a prompt beside its continuation.
    """
    outside = [token for token in prompt if not 0 <= token < entry.vocab_size]
    if not prompt or outside:
        problem = f"token {outside[0]}, which {entry.name} does not know" if outside else "no token"
        raise InvalidRequestError(f"a prompt to evaluate on holds {problem}; give ids of its tokenizer")
    room = entry.context_tokens - settings.generated_tokens
    if room < 1:
        raise InvalidRequestError(
            f"generated_tokens ({settings.generated_tokens}) must be below the context of {entry.name} "
            f"({entry.context_tokens})"
        )
    return list(prompt[: min(settings.max_prompt_tokens, room)])
