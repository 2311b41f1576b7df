"""What has been learnt from evaluated prompts: the expected nats of every plan, given what a probe shows.

Ridge regression (Hoerl and Kennard 1970) from a prompt's features to the nats of its rest under every plan.
There is one fit for each model that is probed first, with the reading of this model only, and one with the
readings of all models. All figures about quality come from the examples' true nats, with predictions that
leave the example itself out, so they include the router's own errors.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from helios.errors import InvalidRequestError
from helios.routing.example import Example
from helios.routing.token_table import TokenTable, TokenTableRecord
from helios.served import ServedPlan

VERSION: Final = 1
# Fewest examples to learn from.
LEAST_EXAMPLES = 8

Numbers = NDArray[np.float64]
_Row = tuple[float, ...]

# Strength of the ridge, in examples.
_RIDGE = 2.0
# Smallest scales of features: scores of tokens, share of known tokens, readings (nats). Where examples differ
# less, they say little about how far away is far.
_LEAST_SCORE, _LEAST_KNOWN, _LEAST_READING = 0.3, 0.1, 0.5
# A prompt is unlike the examples if its k-th nearest one is farther than this factor times the upper quartile
# of the examples' own distances, plus a little, because examples may be much alike. Both are by the same
# features, in units of their scales.
_NEIGHBOUR = 6
_FAR_FACTOR, _FAR_MORE = 1.6, 0.1
# So much of that distance is enough while other prompts are unlike the examples.
_SUSPECT_FACTOR = 0.6
# Decimals that are kept in JSON.
_DECIMALS = 4


class PlanCost(BaseModel):
    """A plan that may be chosen, and the seconds that each generated token costs under it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    depth: int = Field(ge=1)
    seconds: float = Field(gt=0)
    """Of a full batch, a share of the prefill included."""
    latency_seconds: float = Field(gt=0)
    """Until the token is there, at the present load."""

    @property
    def plan(self) -> ServedPlan:
        """Its name."""
        return ServedPlan(model=self.model, depth=self.depth)


class ProbeCost(BaseModel):
    """Seconds that a probe costs: reading out the first model, and computing and reading each further one."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    first_seconds: float = Field(ge=0)
    further_seconds: float = Field(ge=0)


class _Fit(BaseModel):
    """Nats of every plan = intercept + coefficients x features. coefficients: [features, plans]."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    intercept: _Row
    coefficients: tuple[_Row, ...]


class Knowledge(BaseModel):
    """Everything that routers have learnt. Frozen; JSON with a version.

    The features of a prompt are, in this order: the token table's scores of every model but the first, the
    share of known tokens, and each model's reading (nats). They are standardised.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = VERSION
    models: tuple[str, ...] = Field(min_length=1)
    plans: tuple[PlanCost, ...] = Field(min_length=1)
    probe: ProbeCost
    tokens: float = Field(gt=0)
    """Tokens of a mean request that its plan computes after the probe."""
    table: TokenTableRecord
    centre: _Row
    scale: _Row
    first_fits: tuple[_Fit, ...]
    """By model: from the scores and the reading of this model alone."""
    full_fit: _Fit
    first_far: _Row
    """By model: distance of the k-th nearest example from which on a prompt is unlike all examples, if only
    this model was read."""
    far: float
    """The same, if all models were read."""
    features: tuple[_Row, ...]
    """Standardised features of the examples. The next fields are also [examples, ...]."""
    nats: tuple[_Row, ...]
    """True nats of the rest under every plan."""
    expected: tuple[_Row, ...]
    """The same, predicted from all readings without the example itself."""
    first_expected: tuple[tuple[_Row, ...], ...] = ()
    """By model: the same, predicted from the reading of this model alone. Only prices need it, so workers do
    not get it."""

    @model_validator(mode="after")
    def _consistent(self) -> "Knowledge":
        """Raises ValueError unless all parts have sizes that fit, so that no later step can fail on them."""
        models, plans, examples = len(self.models), len(self.plans), len(self.features)
        width = 2 * models
        sizes = {
            "centre": np.shape(self.centre) == (width,),
            "scale": np.shape(self.scale) == (width,) and min(self.scale, default=0.0) > 0,
            "features": examples > 1 and np.shape(self.features) == (examples, width),
            "nats": np.shape(self.nats) == (examples, plans),
            "expected": np.shape(self.expected) == (examples, plans),
            "first_expected": np.shape(self.first_expected) in ((0,), (models, examples, plans)),
            "first_far": len(self.first_far) == models,
            "first_fits": len(self.first_fits) == models
            and all(_fits(fit, models, plans) for fit in self.first_fits),
            "full_fit": _fits(self.full_fit, 2 * models - 1, plans),
        }
        wrong = [name for name, right in sizes.items() if not right]
        missing = [name for name in self.models if name not in {one.model for one in self.plans}]
        if wrong or missing:
            raise ValueError(f"parts do not fit together: {', '.join(wrong) or f'no plan of {missing}'}")
        if not all(
            np.isfinite(part).all()
            for part in (self.known_features, self.true_nats, self.expected_by_all, self.expected_by_first)
        ):
            raise ValueError("a number is not finite")
        TokenTable.from_record(self.table, models)
        return self

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        """Raises InvalidRequestError for another version, or anything else that this one cannot use."""
        try:
            return cls.model_validate_json(data)
        except (ValidationError, ValueError) as error:
            raise InvalidRequestError(f"not what a router of version {VERSION} has learnt: {error}") from None

    @classmethod
    def learn(
        cls,
        examples: Sequence[Example],
        plans: Sequence[PlanCost],
        depths: Mapping[str, Sequence[int]],
        probe: ProbeCost,
        tokens: float,
    ) -> Self:
        """Learns from examples.

        plans: those that may be chosen; every model has at least one. depths: by model, the exit layers that
        examples have nats of. Raises InvalidRequestError for fewer than LEAST_EXAMPLES examples.
        """
        models = tuple(dict.fromkeys(one.model for one in plans))
        # Files of a model may have been replaced by others with other exits.
        examples = [
            one
            for one in examples
            if all(len(one.rest_nats[model]) == len(depths[model]) for model in models)
        ]
        if len(examples) < LEAST_EXAMPLES:
            raise InvalidRequestError(f"{len(examples)} examples are too few, {LEAST_EXAMPLES} are needed")
        columns = [(one.model, list(depths[one.model]).index(one.depth)) for one in plans]
        nats = np.array([[one.rest_nats[model][at] for model, at in columns] for one in examples])
        texts, excess = [], []
        for one in examples:
            of_tokens = np.array([one.token_nats[model] for model in models])
            texts.append(np.array(one.ids[1:], dtype=np.int64))
            excess.append((of_tokens[1:] - of_tokens[0]).T)
        table = TokenTable.of(texts, excess)
        rows = []
        for one, ids, more in zip(examples, texts, excess, strict=True):
            # Its own tokens would make an example look better known than a new prompt.
            scores, known = table.without(ids, more).scores(np.array(one.ids[: one.first_tokens]))
            rows.append([*scores, known, *(one.first_nats[model] for model in models)])
        raw, count = np.array(rows), len(models)
        least = [_LEAST_SCORE] * (count - 1) + [_LEAST_KNOWN] + [_LEAST_READING] * count
        centre, scale = raw.mean(axis=0), np.maximum(raw.std(axis=0), least)
        features = (raw - centre) / scale
        first = [_ridge(features[:, _first_columns(count, index)], nats) for index in range(count)]
        full = _ridge(features[:, _full_columns(count)], nats)
        return cls(
            models=models,
            plans=tuple(plans),
            probe=probe,
            tokens=tokens,
            table=table.record(),
            centre=_row(centre),
            scale=_row(scale),
            first_fits=tuple(fit for fit, _ in first),
            full_fit=full[0],
            first_far=tuple(_far(features[:, _near_columns(count, index)]) for index in range(count)),
            far=_far(features[:, _near_columns(count, None)]),
            features=_rows(features),
            nats=_rows(nats),
            expected=_rows(full[1]),
            first_expected=tuple(_rows(expected) for _, expected in first),
        )

    # The fields as arrays.

    @cached_property
    def known_features(self) -> Numbers:
        """Standardised features of the examples: [examples, features]."""
        return np.array(self.features)

    @cached_property
    def true_nats(self) -> Numbers:
        """True nats of the examples: [examples, plans]."""
        return np.array(self.nats)

    @cached_property
    def expected_by_all(self) -> Numbers:
        """Expected nats of the examples from all readings: [examples, plans]."""
        return np.array(self.expected)

    @cached_property
    def expected_by_first(self) -> Numbers:
        """The same from the reading of one model: [models, examples, plans]."""
        return np.array(self.first_expected)

    @cached_property
    def costs(self) -> Numbers:
        """Seconds of a token under each plan: [plans]."""
        return np.array([one.seconds for one in self.plans])

    @cached_property
    def plan_index(self) -> dict[ServedPlan, int]:
        """The place of each plan in `plans`."""
        return {plan: at for at, plan in enumerate(self.served_plans)}

    @cached_property
    def served_plans(self) -> list[ServedPlan]:
        """The names of `plans`."""
        return [one.plan for one in self.plans]

    @cached_property
    def deepest(self) -> list[int]:
        """By model: the index of its deepest plan."""
        return [
            max(
                (at for at, one in enumerate(self.plans) if one.model == model),
                key=lambda at: self.plans[at].depth,
            )
            for model in self.models
        ]

    @cached_property
    def firsts(self) -> NDArray[np.intp]:
        """For each example the model that is probed first: [examples]. Its own tokens do not count."""
        scores = (self.known_features * self._scales[1] + self._scales[0])[:, : len(self.models) - 1]
        return np.asarray(_best_scored(scores))

    @cached_property
    def outcomes(self) -> list[tuple[Numbers, Numbers]]:
        """What every price leads to. Empty until `helios.routing.terms` fills it.

        It depends on nothing else, and takes most of the time of settling.
        """
        return []

    @cached_property
    def best_models(self) -> NDArray[np.intp]:
        """For each example the model that reads it best at its deepest plan: [examples]."""
        return np.asarray(self.true_nats[:, self.deepest].argmin(axis=1))

    @cached_property
    def confusion(self) -> Numbers:
        """Share of the examples of each kind that the first reading takes for each kind: [models, models].

        The kind of an example is the model that reads it best.
        """
        count, rows = len(self.models), np.arange(len(self.firsts))
        taken = self.expected_by_first[self.firsts, rows][:, self.deepest].argmin(axis=1)
        found = np.zeros((count, count))
        np.add.at(found, (self.best_models, taken), 1.0)
        return np.asarray(found / np.maximum(found.sum(axis=1, keepdims=True), 1.0))

    @cached_property
    def token_table(self) -> TokenTable:
        """The table that scores texts by their tokens."""
        return TokenTable.from_record(self.table, len(self.models))

    def features_of(self, first_ids: Sequence[int], nats: Mapping[str, float]) -> Numbers:
        """Standardised features of a prompt. nats: readings by model; those that are missing become NaN."""
        scores, known = self.token_table.scores(np.array(first_ids, dtype=np.int64))
        raw = np.array([*scores, known, *(nats.get(model, np.nan) for model in self.models)])
        centre, scale = self._scales
        return np.asarray((raw - centre) / scale)

    def expected_nats(self, features: Numbers, first: int | None) -> Numbers:
        """Expected nats a token of the rest under each plan: [plans].

        first: the model whose reading alone is used. None: all readings.
        """
        intercept, coefficients = self._arrays[-1 if first is None else first]
        return np.asarray(intercept + features[self.columns(first)] @ coefficients)

    def safest_model(self, nats: Mapping[str, float]) -> str:
        """The model that probably reads an unknown kind of text best with all layers.

        nats: readings by model. Of the examples it takes only by how much each model's deepest plan is better
        than its first exit in the mean.
        """
        gains = (self.readings_of(self.known_features) - self.true_nats[:, self.deepest]).mean(axis=0)
        return min(nats, key=lambda model: nats[model] - gains[self.models.index(model)])

    def first_for(self, first_ids: Sequence[int]) -> int:
        """Index of the model that probably reads a prompt best, by its tokens alone. It is probed first."""
        scores, _ = self.token_table.scores(np.array(first_ids, dtype=np.int64))
        best = int(scores.argmin()) if len(scores) else 0
        return best + 1 if len(scores) and scores[best] < 0 else 0

    def readings_of(self, features: Numbers) -> Numbers:
        """The models' readings in nats that are part of standardised features: [..., models]."""
        return np.asarray((features * self.scale + self.centre)[..., len(self.models) :])

    def kind(self, features: Numbers, first: int | None) -> int:
        """Index of the model that is expected to read a prompt best. first: as in `expected_nats`."""
        return int(self.expected_nats(features, first)[self.deepest].argmin())

    def first_of(self, nats: Mapping[str, float]) -> int | None:
        """Index of the only model that was read. None: all were. nats: readings by model, at least one."""
        return None if len(nats) == len(self.models) else self.models.index(next(iter(nats)))

    def columns(self, first: int | None) -> list[int]:
        """The features of a fit."""
        count = len(self.models)
        return _full_columns(count) if first is None else _first_columns(count, first)

    def nearest(self, features: Numbers, first: int | None, count: int) -> NDArray[np.intp]:
        """The nearest examples by the features of a fit, the nearest first."""
        away = self._squares(features, self.columns(first))
        count = min(count, len(away))
        found = np.argpartition(away, count - 1)[:count]
        return np.asarray(found[np.argsort(away[found])])

    def is_unlike(self, features: Numbers, first: int | None, *, is_suspect: bool = False) -> bool:
        """Whether a prompt is unlike all examples. is_suspect: others before it were, so less is enough."""
        away = self._squares(features, _near_columns(len(self.models), first))
        at = min(_NEIGHBOUR, len(away)) - 1
        far = self.far if first is None else self.first_far[first]
        return bool(np.sqrt(np.partition(away, at)[at]) > far * (_SUSPECT_FACTOR if is_suspect else 1.0))

    @cached_property
    def _arrays(self) -> list[tuple[Numbers, Numbers]]:
        return [
            (np.array(fit.intercept), np.array(fit.coefficients)) for fit in (*self.first_fits, self.full_fit)
        ]

    @cached_property
    def _scales(self) -> tuple[Numbers, Numbers]:
        return np.array(self.centre), np.array(self.scale)

    @cached_property
    def _known_columns(self) -> dict[tuple[int, ...], Numbers]:
        """Some columns of the examples' features, by these columns: those that were asked for."""
        return {}

    def _squares(self, features: Numbers, columns: list[int]) -> Numbers:
        known, key = self._known_columns, tuple(columns)
        if key not in known:
            known[key] = self.known_features[:, columns]
        away = known[key] - features[columns]
        return np.asarray(np.einsum("ij,ij->i", away, away))


def _best_scored(scores: Numbers) -> NDArray[np.intp]:
    """For each text the model of the least score: [texts]. scores: of every model but the first, over it."""
    return np.asarray(np.insert(scores, 0, 0.0, axis=1).argmin(axis=1))


def _first_columns(models: int, first: int) -> list[int]:
    return [*range(models - 1), models + first]


def _full_columns(models: int) -> list[int]:
    return [*range(models - 1), *range(models, 2 * models)]


def _near_columns(models: int, first: int | None) -> list[int]:
    """The features by which prompts are near: those of a fit, and the share of known tokens."""
    columns = _full_columns(models) if first is None else _first_columns(models, first)
    return [*columns, models - 1]


def _fits(fit: _Fit, features: int, plans: int) -> bool:
    return len(fit.intercept) == plans and np.shape(fit.coefficients) == (features, plans)


def _ridge(features: Numbers, nats: Numbers) -> tuple[_Fit, Numbers]:
    """The fit, and what it expects of each example if the example itself is left out."""
    count, width = features.shape
    design = np.concatenate([np.ones((count, 1)), features], axis=1)
    penalty = np.diag([1e-6] + [_RIDGE] * width)
    inverse = np.linalg.inv(design.T @ design + penalty)
    weights = inverse @ design.T @ nats
    leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
    residuals = (nats - design @ weights) / (1 - np.minimum(leverage, 0.9))[:, None]
    fit = _Fit(intercept=_row(weights[0]), coefficients=_rows(weights[1:]))
    return fit, nats - residuals


def _far(features: Numbers) -> float:
    away = np.sqrt(((features[:, None] - features[None]) ** 2).sum(axis=2))
    np.fill_diagonal(away, np.inf)
    at = min(_NEIGHBOUR, len(features) - 1) - 1
    return float(_FAR_FACTOR * np.quantile(np.sort(away, axis=1)[:, at], 0.75) + _FAR_MORE)


def _row(numbers: Numbers) -> _Row:
    return tuple(np.round(numbers, _DECIMALS + 2).tolist())


def _rows(numbers: Numbers) -> tuple[_Row, ...]:
    return tuple(map(tuple, np.round(numbers, _DECIMALS).tolist()))
