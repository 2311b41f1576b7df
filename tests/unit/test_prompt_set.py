"""Which prompts an evaluation runs: recent ones, and bundled ones if there is too little traffic."""

from redis.asyncio import Redis
from tokenizers import Tokenizer

from helios import prompts
from helios.prompts import RecentPrompt
from services.profiler.prompt_set import choose
from tests.opt_variants import byte_tokenizer

KNOWN: dict[str, Tokenizer] = {"known": byte_tokenizer()}
HOUR = 3600.0


def prompt(text: str, tokenizer_id: str = "known") -> RecentPrompt:
    return RecentPrompt(tokenizer_id, tuple(KNOWN["known"].encode(text).ids))


async def test_without_traffic_or_redis_the_bundled_prompts_are_taken(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        for chosen in (await choose(redis, KNOWN, 3, 1), await choose(None, KNOWN, 3, 1)):
            assert chosen.source == "bundled"
            assert len(chosen.prompts) == 3
            assert all(isinstance(one, str) and len(one) > 200 for one in chosen.prompts)


async def test_the_newest_prompts_with_text_are_taken(redis_url: str) -> None:
    texts = [f"the text of prompt {number}" for number in range(9)]
    useless = [
        RecentPrompt("known", (2,)),
        RecentPrompt("known", (2, 2)),
        RecentPrompt("known", (2, 99999)),
        RecentPrompt("known", (2, -1)),
        prompt("of another tokenizer", "unknown"),
    ]
    async with Redis.from_url(redis_url) as redis:
        await prompts.write(redis, [*map(prompt, texts), *useless], 100, HOUR)
        chosen = await choose(redis, KNOWN, 2, 1)
        assert chosen.source == "recent"
        assert chosen.prompts == (prompt(texts[8]), prompt(texts[7]))


async def test_short_prompts_are_made_up_for_by_more_of_them_then_by_bundled_ones(redis_url: str) -> None:
    text = "twenty bytes of text"
    async with Redis.from_url(redis_url) as redis:
        await prompts.write(redis, [prompt(text)] * 9, 100, HOUR)
        # Each prompt has 21 tokens.
        more = await choose(redis, KNOWN, 2, 100)
        assert more.source == "recent"
        assert more.prompts == (prompt(text),) * 5
        filled = await choose(redis, KNOWN, 2, 250)
        assert filled.source == "recent and bundled"
        assert filled.prompts[:9] == (prompt(text),) * 9
        assert [type(one) for one in filled.prompts[9:]] == [str]
