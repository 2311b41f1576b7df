"""Streamed text has no half characters and no part of a stop string, and is the same after a resume."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import helios
from helios.engine.scheduling.detokenizer import Detokenizer, token_texts
from tests.opt_variants import byte_tokenizer

TOKENIZER = byte_tokenizer()  # one token per byte, so every non-ASCII character is split
TEXTS = token_texts(TOKENIZER)
BUNDLED = Path(helios.__file__).parent.parent / "models" / "helios-prose" / "tokenizer.json"
WORDS = ["<s>", "</s>", "▁", "▁▁", "a", "▁b", "▁c▁", "é", "\ufffd", ".", "##d", "e</w>"]


def word_tokenizer(decoder: decoders.Decoder) -> Tokenizer:
    """A vocabulary like Llama's: two special tokens, then words, and a token for each byte."""
    tokens = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(WORDS[:2])
    return tokenizer


LLAMA = word_tokenizer(
    decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
)
TOKENIZERS = {
    "byte-level": TOKENIZER,
    "bundled": Tokenizer.from_file(str(BUNDLED)),
    "byte fallback": LLAMA,
    "byte fallback, unstripped": word_tokenizer(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ),
    "metaspace": word_tokenizer(decoders.Metaspace()),
    "metaspace, never": word_tokenizer(decoders.Metaspace(prepend_scheme="never")),
    "byte-level in a sequence": TOKENIZER.from_str(TOKENIZER.to_str()),
    "word piece": word_tokenizer(decoders.WordPiece()),
    "word ends": word_tokenizer(decoders.BPEDecoder()),
    "as they are": word_tokenizer(decoders.Fuse()),
}
TOKENIZERS["byte-level in a sequence"].decoder = decoders.Sequence([decoders.ByteLevel()])


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@given(st.text(max_size=40))
def test_deltas_concatenate_to_the_text_and_never_split_a_character(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER, ())
    deltas = [detokenizer.push(token_id) for token_id in ids_of(text)]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas) or "\ufffd" in text
    assert detokenizer.flush() == ""


def fallback_ids(text: str) -> list[int]:
    """The ids of LLAMA: of one-letter words, and of bytes for everything else."""
    ids = []
    for letter in text:
        token_id = LLAMA.token_to_id(letter)
        ids += [len(WORDS) + byte for byte in letter.encode()] if token_id is None else [token_id]
    return ids


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.data())
def test_any_ids_give_the_text_that_the_tokenizer_decodes(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    # Often words and special tokens; also bytes, whole multi-byte characters, and ids beyond the vocabulary.
    character = st.sampled_from("é€😀").map(fallback_ids if size == LLAMA.get_vocab_size() else ids_of)
    one = st.integers(0, len(WORDS) - 1) | st.integers(0, size + 3)
    parts = data.draw(st.lists(one.map(lambda token_id: [token_id]) | character, max_size=30))
    ids = [token_id for part in parts for token_id in part]
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = Detokenizer(tokenizer, (), token_texts(tokenizer))
    replayed = detokenizer.push_all(ids[:cut])
    assert "".join(replayed) == detokenizer.text
    deltas = [*replayed, *(detokenizer.push(token_id) for token_id in ids[cut:]), detokenizer.flush()]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(deltas) == detokenizer.text == whole
    one_by_one = Detokenizer(tokenizer, ())
    assert [*(one_by_one.push(token_id) for token_id in ids), one_by_one.flush()] == deltas


@given(st.text(alphabet="a.é€😀\n", max_size=30))
def test_bytes_of_a_fallback_never_leave_as_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(LLAMA, ())
    deltas = [detokenizer.push(token_id) for token_id in fallback_ids(text)]
    assert not any("\ufffd" in delta for delta in deltas)
    assert "".join(deltas) + detokenizer.flush() == text


def byte_ids(tokenizer: Tokenizer, values: list[int]) -> list[int]:
    """The ids of bytes, for any byte values."""
    if tokenizer is LLAMA:
        return [len(WORDS) + value for value in values]
    # Each byte is written as a printable letter (Radford et al. 2019): itself, or one from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    letters = [chr(value) if value in printable else chr(256 + others.index(value)) for value in values]
    return [token_id for letter in letters if (token_id := tokenizer.token_to_id(letter)) is not None]


@pytest.mark.parametrize(
    ("tokenizer", "values", "deltas"),
    [
        (LLAMA, [0x41, 0xFF], ["", "", "\ufffd\ufffda"]),
        # A newline and half an emoji: if any byte of a run is broken, no byte of it becomes a character.
        (LLAMA, [0x0A, 0xF0, 0x9F], ["", "", "", "\ufffd" * 3 + "a"]),
        (TOKENIZER, [0x0A, 0xF0, 0x9F], ["\n", "", "", "\ufffda"]),
        # Broken bytes are sent as soon as they cannot become a character.
        (TOKENIZER, [0xFF] * 6, ["", *["\ufffd"] * 5, "\ufffda"]),
        (TOKENIZER, [0x80] * 6 + [0xE2, 0x82, 0xAC], ["", *["\ufffd"] * 6, "", "€", "a"]),
    ],
)
def test_broken_bytes_become_replacement_characters(
    tokenizer: Tokenizer, values: list[int], deltas: list[str]
) -> None:
    ids = [*byte_ids(tokenizer, values), WORDS.index("a") if tokenizer is LLAMA else ids_of("a")[0]]
    for texts in (None, token_texts(tokenizer)):
        detokenizer = Detokenizer(tokenizer, (), texts)
        assert [detokenizer.push(token_id) for token_id in ids] == deltas
        assert detokenizer.flush() == ""


@given(
    st.lists(st.integers(0, LLAMA.get_vocab_size()), max_size=40),
    st.text("ab \ufffd", min_size=1, max_size=2),
)
def test_a_stop_string_ends_a_text_of_byte_tokens(ids: list[int], stop: str) -> None:
    detokenizer = Detokenizer(LLAMA, (stop,))
    text = "".join(detokenizer.push_all(ids)) + detokenizer.flush()
    whole = LLAMA.decode(ids)
    assert text == detokenizer.text == whole.split(stop)[0]
    assert detokenizer.stopped == (stop in whole)


def test_texts_are_those_of_tokens_that_are_whole_characters() -> None:
    assert all(TEXTS[token_id] == letter for letter in "aZ 0" for token_id in ids_of(letter))
    assert not TEXTS.keys() & {*ids_of("é€"), 0, 1, 2}  # halves of characters, and special tokens


@given(st.lists(st.integers(0, 259), max_size=60))
def test_texts_known_before_change_no_delta(ids: list[int]) -> None:
    slow, fast = Detokenizer(TOKENIZER, ()), Detokenizer(TOKENIZER, (), TEXTS)
    assert [fast.push(token_id) for token_id in ids] == [slow.push(token_id) for token_id in ids]


@given(
    st.lists(st.integers(90, 110) | st.integers(0, 259), max_size=60),
    st.integers(0, 60),
    st.sampled_from([(), ("a", "cd")]),
)
def test_ids_at_once_have_the_texts_that_they_have_one_by_one(
    ids: list[int], cut: int, stop: tuple[str, ...]
) -> None:
    one_by_one, at_once = (Detokenizer(TOKENIZER, stop, TEXTS) for _ in range(2))
    expected = []
    for token_id in ids:
        expected.append(one_by_one.push(token_id))
        if one_by_one.stopped:
            break
    got = at_once.push_all(ids[:cut])
    if not at_once.stopped:
        got += at_once.push_all(ids[cut:])
    assert got == expected
    assert at_once.stopped == one_by_one.stopped
    assert at_once.flush() == one_by_one.flush()


@given(
    st.text(alphabet="abé", max_size=30),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(TOKENIZER, tuple(stop))
    got = ""
    for token_id in ids_of(text):
        got += detokenizer.push(token_id)
        if detokenizer.stopped:
            break
    got += detokenizer.flush()
    ends = [text.find(each) for each in stop if each in text]
    if ends:
        assert detokenizer.stopped
        # The stop string that is complete first decides. No stop string is in the text that was sent.
        first_complete = min(text.find(each) + len(each) for each in stop if each in text)
        assert text[:first_complete].startswith(got)
        assert not any(each in got for each in stop)
    else:
        assert got == text


@given(st.text(alphabet="abé ", max_size=25), st.integers(0, 60))
def test_a_resumed_text_goes_on_where_it_was(text: str, cut: int) -> None:
    ids = ids_of(text)
    stop = ("ba é",)
    whole = Detokenizer(TOKENIZER, stop)
    deltas = [whole.push(token_id) for token_id in ids]
    resumed = Detokenizer(TOKENIZER, stop)
    for token_id in ids[:cut]:
        resumed.push(token_id)
    assert [resumed.push(token_id) for token_id in ids[cut:]] == deltas[cut:]
    assert resumed.text == whole.text


@pytest.mark.parametrize(("text", "stop", "expected"), [("one END two", "END", "one "), ("EN", "END", "EN")])
def test_a_possible_stop_string_is_held_back_until_it_is_decided(text: str, stop: str, expected: str) -> None:
    detokenizer = Detokenizer(TOKENIZER, (stop,))
    seen = ""
    for token_id in ids_of(text):
        seen += detokenizer.push(token_id)
        assert "E" not in seen
    assert seen + detokenizer.flush() == expected
