"""What a router learns from: requests that every candidate has evaluated at every exit."""

from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict, model_validator


class _Record(BaseModel):
    # It is stored in Redis, where a newer version may write fields that this one does not know.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class ModelExample(_Record):
    """One prompt under one model. Nats are per token.

    The prompt has a beginning, which a worker would probe, and a rest.
    """

    id: str
    """Identifies the prompt. The same for every model."""
    ids: tuple[int, ...]
    """The prompt's token ids."""
    first_tokens: int
    """Number of tokens of the beginning."""
    first_nats: float
    """Nats of the beginning at the first exit, at the positions that a probe reads."""
    rest_nats: tuple[float, ...]
    """Nats of the rest at every exit, ascending by depth."""
    token_nats: tuple[float, ...]
    """Nats of each of `ids` but the first, with all layers."""

    @model_validator(mode="after")
    def _consistent(self) -> "ModelExample":
        if len(self.token_nats) != len(self.ids) - 1 or not 0 < self.first_tokens < len(self.ids):
            raise ValueError("an example has nats of every token but the first, and a beginning within it")
        if min(self.ids) < 0:
            raise ValueError("token ids must not be negative")
        return self


class Example(_Record):
    """One prompt under every model, by model."""

    id: str
    ids: tuple[int, ...]
    first_tokens: int
    first_nats: Mapping[str, float]
    rest_nats: Mapping[str, tuple[float, ...]]
    token_nats: Mapping[str, tuple[float, ...]]


def joined(by_model: Mapping[str, Iterable[ModelExample]]) -> list[Example]:
    """The prompts that all models have evaluated alike, in the order of the first model."""
    known = {model: {one.id: one for one in examples} for model, examples in by_model.items()}
    first = next(iter(known.values()), {})
    found = []
    for name, one in first.items():
        all_ = {model: examples[name] for model, examples in known.items() if name in examples}
        same = all((other.ids, other.first_tokens) == (one.ids, one.first_tokens) for other in all_.values())
        if len(all_) == len(known) and same:
            found.append(
                Example(
                    id=name,
                    ids=one.ids,
                    first_tokens=one.first_tokens,
                    first_nats={model: other.first_nats for model, other in all_.items()},
                    rest_nats={model: other.rest_nats for model, other in all_.items()},
                    token_nats={model: other.token_nats for model, other in all_.items()},
                )
            )
    return found
