"""docs/settings.md matches the settings classes."""

import pytest

from scripts import settings_reference


def test_settings_page_is_current() -> None:
    page = settings_reference.PAGE.read_text(encoding="utf-8")

    assert page == settings_reference.render(page), "run `python scripts/settings_reference.py`"


@pytest.mark.parametrize("service", settings_reference.SERVICES)
def test_every_setting_says_what_it_is(service: str) -> None:
    for name, field in settings_reference.SERVICES[service].model_fields.items():
        assert field.description, f"{service}: {name}"


@pytest.mark.parametrize("service", settings_reference.SERVICES)
def test_every_default_is_a_value_that_the_setting_takes(service: str) -> None:
    settings = settings_reference.SERVICES[service]
    defaults = {name: field.default for name, field in settings.model_fields.items()}

    assert settings(**defaults).model_dump() == defaults


def test_page_without_a_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="settings of the gateway"):
        settings_reference.render("# Settings\n")
