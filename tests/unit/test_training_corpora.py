"""Texts have no markup, splits do not overlap, and the tokenizer has OPT's special ids."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from helios.errors import UnavailableError
from training.corpora import clean_pod, clean_roff, clean_rst, is_held_out, read_documents, tidy
from training.tokenizer import save_tokenizer, train_tokenizer


def test_rst_becomes_plain_text() -> None:
    source = (
        ".. _label:\n\nTitle\n=====\n\n.. index:: a\n   single: b\n\n.. function:: f(x)\n\n"
        "   See :func:`~os.path` and ``code``, *not* `here <url>`_::\n\n      x = a * b * c\n\n"
        "   .. versionadded:: 3.5\n"
    )
    assert tidy(clean_rst(source)) == (
        "Title\n\nf(x)\n\n   See os.path and code, not here:\n\n      x = a * b * c\n\n   New in version 3.5"
    )


def test_roff_becomes_plain_text() -> None:
    source = (
        '.\\" comment\n.TH X 2\n.SH NAME\nx \\- does\n.SH DESCRIPTION\nThe\n.BR accept ()\n'
        "call \\fIuses\\fP\n"
        ".PP\n.nf\nint a;\n  int b;\n.fi\n.TS\nl l.\ntable\n.TE\nEnd.\n"
    )
    assert tidy(clean_roff(source)) == (
        "NAME\nx - does\n\nDESCRIPTION\nThe accept() call uses\n\nint a;\n  int b;\n\nEnd."
    )


def test_pod_becomes_plain_text() -> None:
    source = (
        "=head1 NAME\n\nE<lt>C<a> and B<I<bold>>, see L<the page|perlop>\nor L<perlre>.X<index>\n\n"
        "  $x = 1;\n\n=cut\n"
    )
    assert clean_pod(source) == "NAME\n\n<a and bold, see the page or perlre.\n\n  $x = 1;"


def test_held_out_documents_are_pairs_of_neighbours_spread_over_the_domain() -> None:
    assert [index for index in range(150) if is_held_out(index)] == [48, 49, 98, 99, 148, 149]


def test_missing_corpus_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"python -m training\.corpora"):
        read_documents(tmp_path, "kjv", "train")


def test_tokenizer_has_opts_ids_and_loads_in_transformers(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(
        ["In the beginning God created the heaven and the earth. é\n"] * 20, vocab_size=300
    )
    save_tokenizer(tokenizer, tmp_path, context=64)
    assert [tokenizer.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "created the ☃\n  heaven"
    ids = loaded(text).input_ids
    assert ids[0] == 2
    assert ids == tokenizer.encode(text).ids
    assert loaded.decode(ids, skip_special_tokens=True) == text
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 64
