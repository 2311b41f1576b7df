"""Recent prompts in a real Redis: the newest are found, old and foreign ones are not."""

from redis.asyncio import Redis

from helios import prompts
from helios.prompts import RecentPrompt
from helios.redis_schema import PROMPTS
from tests.streams import until

KEPT = 100
HOUR = 3600.0


def numbered(count: int, tokenizer_id: str = "a") -> list[RecentPrompt]:
    return [RecentPrompt(tokenizer_id, (2, number)) for number in range(count)]


async def test_the_newest_prompts_of_a_tokenizer_come_back_newest_first(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await prompts.write(redis, numbered(3), KEPT, HOUR)
        # These are more prompts of another tokenizer than one page of the stream holds.
        await prompts.write(redis, numbered(90, "b"), KEPT, HOUR)
        assert (await prompts.recent(redis, {"a"}, 2))[0] == [RecentPrompt("a", (2, n)) for n in (2, 1)]
        assert len((await prompts.recent(redis, {"a", "b"}, 1000))[0]) == 93
        assert await prompts.recent(redis, {"c"}, 5) == ([], {})


async def test_only_so_many_are_kept(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await prompts.write(redis, numbered(30), 10, HOUR)
        found, _ = await prompts.recent(redis, {"a"}, 99)
        assert [prompt.ids[1] for prompt in found] == list(range(29, 19, -1))


async def test_prompts_are_deleted_after_their_lifetime(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await prompts.write(redis, numbered(3), KEPT, HOUR)

        async def trimmed_away() -> bool:
            await prompts.write(redis, [], KEPT, 0.05)
            return await prompts.recent(redis, {"a"}, 1) == ([], {})

        await until(trimmed_away, "the prompts to be trimmed")
        await prompts.write(redis, numbered(3), KEPT, 0.2)

        async def expired() -> bool:
            return not await redis.exists(PROMPTS)

        await until(expired, "the stream to expire without another write")


async def test_an_entry_that_is_no_prompt_is_ignored_with_the_reason(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await prompts.write(redis, numbered(1), KEPT, HOUR)
        for ids in ("[]", '["x"]', "7", "{", "[true]", "[" * 100_000):
            await redis.xadd(PROMPTS, {"tokenizer_id": "a", "ids": ids})
        await redis.xadd(PROMPTS, {"something": "else"})
        found, ignored = await prompts.recent(redis, {"a"}, 9)
        assert found == numbered(1)
        assert len(ignored) == 7
        assert all(entry.startswith(f"{PROMPTS} ") for entry in ignored)


async def test_a_field_of_a_newer_version_does_not_hide_a_prompt(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as redis:
        await redis.xadd(PROMPTS, {"tokenizer_id": "a", "ids": "[2, 0]", "language": "en"})
        assert await prompts.recent(redis, {"a"}, 9) == (numbered(1), {})
