"""Text comes whole: no half characters, nothing of a stop string, and the same after a resume."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from helios.engine.detokenizer import Detokenizer, token_texts
from tests.opt_variants import byte_tokenizer

TOKENIZER = byte_tokenizer()  # a token a byte, so every non-ASCII character is split
TEXTS = token_texts(TOKENIZER)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@given(st.text(max_size=40))
def test_deltas_concatenate_to_the_text_and_never_split_a_character(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER, ())
    deltas = [detokenizer.push(token_id) for token_id in ids_of(text)]
    assert "".join(deltas) == text
    assert not any("\ufffd" in delta for delta in deltas) or "\ufffd" in text
    assert detokenizer.flush() == ""


@given(st.lists(st.integers(0, 259), max_size=60))
def test_any_ids_give_the_text_that_the_tokenizer_decodes(ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER, (), TEXTS)
    text = "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.flush()
    assert text == TOKENIZER.decode(ids, skip_special_tokens=True)
    assert text == detokenizer.text


@given(st.lists(st.sampled_from(["a", "▁b", "▁c", "<s>"]), min_size=1, max_size=12))
def test_a_token_whose_text_depends_on_its_place_is_decoded_in_its_place(tokens: list[str]) -> None:
    # Metaspace drops the space before a text's first word.
    vocabulary = {"a": 0, "▁b": 1, "▁c": 2, "<s>": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    ids = [vocabulary[token] for token in tokens]
    detokenizer = Detokenizer(tokenizer, (), token_texts(tokenizer))
    text = "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


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
        # The stop string that is complete first decides; none is in what was sent.
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
