"""Settings are read with clear errors and printed without secrets."""

import logging

import pytest

from helios.settings import ServiceSettings


class Example(ServiceSettings):
    url: str


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:6379/0", "redis://user:***@host:6379/0"),
        ("redis://:secret@host", "redis://:***@host"),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_settings_are_printed_without_passwords(
    url: str, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        Example(url=url).log_all()
    assert shown in caplog.text
    assert "secret" not in caplog.text
