"""The licence that a model card names."""

from pathlib import Path

import pytest

from helios.sources.licence import licence_of_card


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("---\nlicense: other\nlicense_name: llama3\nlicense_link: x\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("# A model\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_stands_in_the_metadata_of_the_card(
    tmp_path: Path, card: str, licence: str | None
) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence_of_card(tmp_path) == licence


def test_a_model_without_a_card_names_no_licence(tmp_path: Path) -> None:
    assert licence_of_card(tmp_path) is None
