"""The prompts of an evaluation: recent ones, or bundled ones while there is no traffic."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError
from tokenizers import Tokenizer

from helios import prompts
from helios.catalog import ModelEntry
from helios.engine.tokenizer import LoadedTokenizer, load_tokenizer
from helios.ignored_entries import IgnoredEntries
from helios.prompts import RecentPrompt
from helios.redis_outage import reason

log = logging.getLogger(__name__)

_ignored = IgnoredEntries(log)
# Most recent prompts that are read. More would make an evaluation long.
_MOST_RECENT = 256
DEFAULT_PROMPTS = Path(__file__).parent / "default_prompts.json"


class Tokenizers:
    """The tokenizers of the models directory, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[Path, str | None], LoadedTokenizer] = {}

    def of(self, entry: ModelEntry) -> LoadedTokenizer:
        """A model's tokenizer. Raises CheckpointError."""
        key = (entry.path, entry.tokenizer_id)
        if key not in self._loaded:
            self._loaded[key] = load_tokenizer(entry.path, entry.facts)
        return self._loaded[key]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts on which every candidate is evaluated, each as ids of its tokenizer or as text."""

    source: str
    prompts: tuple[RecentPrompt | str, ...]

    @property
    def names(self) -> list[str]:
        """An id of each prompt, the same for every candidate."""
        contents = (prompt if isinstance(prompt, str) else repr(prompt) for prompt in self.prompts)
        return [hashlib.sha256(content.encode()).hexdigest()[:16] for content in contents]

    def ids_for(
        self, entry: ModelEntry, known: Mapping[str, Tokenizer], own: LoadedTokenizer
    ) -> list[list[int]]:
        """The prompts as ids of `own`, a model's tokenizer. known: tokenizers of recent prompts, by id."""
        found = []
        for prompt in self.prompts:
            if isinstance(prompt, str):
                ids = own.tokenizer.encode(prompt).ids
            elif prompt.tokenizer_id == own.tokenizer_id and max(prompt.ids) < entry.vocab_size:
                ids = list(prompt.ids)
            else:
                # Encodes the same text, so that models with different tokenizers can be compared per byte.
                ids = own.tokenizer.encode(known[prompt.tokenizer_id].decode(list(prompt.ids))).ids
            found.append(ids)
        return found


async def choose(
    redis: Redis | None,
    known: Mapping[str, Tokenizer],
    count: int,
    min_tokens: int,
    newest_seconds: float | None = None,
) -> PromptSet:
    """The `count` newest prompts that contain text, and more until they have `min_tokens` in total.

    If there are not enough recent prompts, bundled ones are added. known: tokenizers by id. Prompts of other
    tokenizers cannot be read. newest_seconds: use only prompts up to this age, however few, and no bundled
    ones; None: any age.
    """
    recent = await _recent(redis, known, newest_seconds)
    if newest_seconds is not None:
        young = tuple(prompt for prompt in recent if _has_text(prompt, known[prompt.tokenizer_id]))
        return PromptSet("recent", young[:count])
    chosen: list[RecentPrompt | str] = []
    tokens = 0
    for prompt in recent:
        if len(chosen) >= count and tokens >= min_tokens:
            break
        if _has_text(prompt, known[prompt.tokenizer_id]):
            chosen.append(prompt)
            tokens += len(prompt.ids)
    if not chosen:
        return PromptSet("bundled", tuple(_bundled()[:count]))
    if tokens >= min_tokens:
        return PromptSet("recent", tuple(chosen))
    for text in _bundled():
        if tokens < min_tokens:
            chosen.append(text)
            # Any tokenizer measures the length of the text well enough.
            tokens += len(next(iter(known.values())).encode(text).ids)
    return PromptSet("recent and bundled", tuple(chosen))


def _bundled() -> list[str]:
    texts: list[str] = json.loads(DEFAULT_PROMPTS.read_text(encoding="utf-8"))
    return texts


async def _recent(
    redis: Redis | None, known: Mapping[str, Tokenizer], newest_seconds: float | None
) -> list[RecentPrompt]:
    """Recent prompts, newest first."""
    if redis is None:
        return []
    try:
        found, ignored = await prompts.recent(redis, known, _MOST_RECENT, newest_seconds)
    except (RedisError, OSError) as error:
        log.warning("recent prompts cannot be read, the bundled ones are taken: %s", reason(error))
        return []
    _ignored.update(ignored)
    return found


def _has_text(prompt: RecentPrompt, tokenizer: Tokenizer) -> bool:
    """Whether there is text to predict after the first token."""
    ids = list(prompt.ids)
    return min(ids) >= 0 and max(ids) < tokenizer.get_vocab_size() and bool(tokenizer.decode(ids[1:]))
