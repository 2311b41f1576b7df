"""KV keeps its address while layers and blocks are added or removed, and unused memory is freed."""

from pathlib import Path

import pytest
import torch

from helios.engine.backends.kv_cache import KVCache, kv_bytes

HEADS, HEAD_DIM, BLOCK_TOKENS = 2, 8, 16
CPU = torch.device("cpu")


def make(
    num_layers: int,
    num_blocks: int,
    most_blocks: int = 0,
    *,
    commit: bool = True,
    dtype: torch.dtype = torch.float16,
    block_tokens: int = BLOCK_TOKENS,
    head_dim: int = HEAD_DIM,
) -> KVCache:
    return KVCache(
        num_layers,
        num_blocks,
        block_tokens,
        HEADS,
        head_dim,
        dtype,
        CPU,
        most_blocks=most_blocks,
        commit=commit,
    )


def resident_bytes() -> int:
    """The resident bytes of this process, as the system counts them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_what_was_written_is_gathered_in_order() -> None:
    cache = make(2, 5)
    keys, values = (torch.randn(20, HEADS, HEAD_DIM).half() for _ in range(2))
    # Twenty tokens in two blocks that are not adjacent.
    slots = torch.tensor([3 * BLOCK_TOKENS + offset for offset in range(16)] + [16, 17, 18, 19])
    cache.write(1, slots, keys, values)
    found_keys, found_values = cache.gather(1, torch.tensor([[3, 1]]))
    assert torch.equal(found_keys[0, :, :20], keys.transpose(0, 1))
    assert torch.equal(found_values[0, :, :20], values.transpose(0, 1))
    cache.copy(3, 4)
    assert torch.equal(cache.gather(1, torch.tensor([[4]]))[0], cache.gather(1, torch.tensor([[3]]))[0])


@pytest.mark.parametrize(("block_tokens", "head_dim"), [(16, 8), (16, 64), (6, 10)])
def test_in_int8_each_token_keeps_a_step_of_its_own(block_tokens: int, head_dim: int) -> None:
    cache = make(1, 3, dtype=torch.int8, block_tokens=block_tokens, head_dim=head_dim)
    count = block_tokens + 2
    keys, values = (torch.randn(count, HEADS, head_dim) for _ in range(2))
    # One token has far larger values than the others, and one head of another token is zero.
    keys[3] *= 1e6
    values[4, 1] = 0
    slots = torch.tensor([2 * block_tokens + offset for offset in range(block_tokens)] + [0, 1])
    cache.write(0, slots, keys, values)
    for found, written in zip(cache.gather(0, torch.tensor([[2, 0]])), (keys, values), strict=True):
        kept = found[0, :, :count].transpose(0, 1)
        steps = written.abs().amax(dim=2, keepdim=True) / 127
        assert ((kept - written).abs() <= 0.501 * steps).all()
        assert (kept.abs().amax(dim=2) == written.abs().amax(dim=2)).float().mean() > 0.9
    cache.copy(2, 1)
    for copied, source in zip(*(cache.gather(0, torch.tensor([[block]])) for block in (1, 2)), strict=True):
        assert torch.equal(copied, source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_the_bytes_of_a_block_are_known_beforehand(dtype: torch.dtype) -> None:
    cache = make(1, 3, dtype=dtype)
    kept = cache.keys[0].nbytes + cache.values[0].nbytes
    assert 3 * kv_bytes(HEADS, HEAD_DIM, BLOCK_TOKENS, dtype) == kept


def test_layers_and_blocks_that_stay_keep_place_and_content() -> None:
    cache = make(3, 4, most_blocks=8)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    before, places = [tensor.clone() for tensor in cache.keys[:2]], cache.addresses[0][:2].tolist()
    cache.resize([8, 8])
    assert (len(cache.keys), len(cache.values), cache.num_blocks) == (2, 2, 8)
    assert cache.addresses[0].tolist() == places
    for old, new in zip(before, cache.keys, strict=True):
        assert torch.equal(new[:4], old)
        assert not new[4:].any()
    cache.resize([4, 4, 4])
    assert [tensor.shape[0] for tensor in cache.keys] == [4, 4, 4]
    assert cache.addresses[0][:2].tolist() == places


def test_memory_of_what_fell_away_goes_back_and_comes_again_as_zeros() -> None:
    # 64 MB each for keys and values, in two layers.
    blocks = (64 << 20) // (HEADS * HEAD_DIM * BLOCK_TOKENS * 2)
    cache = make(2, blocks)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(1)
    full = resident_bytes()
    cache.resize([blocks // 2])
    cache.give_back()
    # Of two layers, half of one is left.
    assert full - resident_bytes() == pytest.approx(3 * (64 << 20), rel=0.05)
    assert cache.keys[0].all()
    assert cache.values[0].all()
    cache.resize([blocks, blocks])
    assert cache.keys[0][: blocks // 2].all()
    assert not cache.keys[0][blocks // 2 :].any()
    assert not cache.values[1].any()


def test_address_space_is_no_memory() -> None:
    before = resident_bytes()
    # 16 layers of 2 x 64 GB are more than this machine has.
    most = (64 << 30) // (HEADS * HEAD_DIM * BLOCK_TOKENS * 2)
    cache = make(16, 1000, most_blocks=most, commit=False)
    assert resident_bytes() - before < 32 << 20
    assert cache.has_room_for(most, HEADS, HEAD_DIM, torch.float16)
    assert not cache.has_room_for(most + 1, HEADS, HEAD_DIM, torch.float16)
    assert not cache.has_room_for(1, HEADS, 2 * HEAD_DIM, torch.float16)
    assert not cache.has_room_for(1, HEADS, HEAD_DIM, torch.float32)
    cache.resize([most])
    cache.keys[0][-1] = 1
    assert cache.keys[0][-1].all()


def test_layers_have_their_own_numbers_of_blocks() -> None:
    cache = make(3, 4, most_blocks=8)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(1)
    places = cache.addresses[0].tolist()
    cache.resize([8, 4, 2])
    assert [len(tensor) for tensor in cache.keys] == [8, 4, 2]
    assert cache.addresses[0].tolist() == places
    cache.copy(1, 3)
    cache.keys[0][6] = 7
    cache.copy(6, 3)
    assert (cache.keys[0][3] == 7).all()
    assert (cache.keys[1][3] == 1).all(), "this layer lacks the copied block"
    cache.resize([2, 2, 2])
    cache.give_back()
    cache.resize([4, 4, 4])
    assert all(bool(tensor[:2].all()) for tensor in cache.keys)
