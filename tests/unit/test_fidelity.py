"""What a precision costs is measured on pieces of text, for every architecture."""

from pathlib import Path

import pytest

from helios.catalog import read_model
from helios.engine.evaluation.fidelity import cut, measure_fidelity
from tests.variants import TYPICAL, save_variant

EXITS = (2, 4, 6)
TEXT = "What is measured on a text says something about this text. " * 80


@pytest.mark.parametrize("variant", TYPICAL)
def test_int8_costs_little_and_float32_nothing_at_every_exit(tmp_path: Path, variant: str) -> None:
    save_variant(tmp_path, variant, 3, exits=EXITS, head="norm")
    entry = read_model(tmp_path)
    texts = cut(entry, [TEXT], 3)
    assert [len(text) for text in texts] == [256] * 3
    exact, rounded = (measure_fidelity(entry, precision, texts) for precision in ("float32", "int8"))
    assert exact.keys() == rounded.keys() == set(EXITS)
    for layer in EXITS:
        assert (exact[layer].perplexity_increase, exact[layer].agreement) == (0, 1)
        assert 0 < abs(rounded[layer].perplexity_increase) < 0.02
        assert 0.85 < rounded[layer].agreement < 1
        assert rounded[layer].tokens == 3 * 255


def test_pieces_of_a_long_context_have_2048_tokens_and_need_memory_for_no_more(tmp_path: Path) -> None:
    save_variant(tmp_path, "llama", 3, max_position_embeddings=1 << 20)
    entry = read_model(tmp_path)
    (text,) = cut(entry, [TEXT], 1)
    assert len(text) == 2048
    assert measure_fidelity(entry, "int8", [text])[6].tokens == 2047
