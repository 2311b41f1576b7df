"""Settings are read with clear errors and printed without secrets."""

import logging

import pytest
from pydantic import ValidationError

from helios import redis_url
from helios.errors import SettingsError
from helios.redis_url import RedisUrl
from helios.settings import ServiceSettings


class Example(ServiceSettings):
    url: RedisUrl


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@host:6379/0", "redis://user:***@host:6379/0"),
        ("redis://:secret@host", "redis://:***@host"),
        ("redis://user:sec@ret:secret@host", "redis://user:***@host"),
        ("redis://user:%73ecret@[::1]:6379", "redis://user:***@[::1]:6379"),
        ("redis://host/0?password=secret", "redis://host/0?password=***"),
        (
            "redis://host?db=1&password=se@cret&socket_timeout=3",
            "redis://host?db=1&password=***&socket_timeout=3",
        ),
        ("rediss://host?ssl_password=secret", "rediss://host?ssl_password=***"),
        ("redis://host?password=a&secret", "redis://host?password=***&***"),
        ("redis://host?password=a#secret", "redis://host?password=***#***"),
        ("unix:///tmp/a@b?password=secret", "unix:///tmp/a@b?password=***"),
        ("redis://host:6379/0", "redis://host:6379/0"),
    ],
)
def test_settings_are_printed_without_passwords(
    url: str, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        Example(url=url).log_all()
    assert f'"{shown}"' in caplog.text
    for part in ("secret", "cret", "73ecret"):
        assert part not in caplog.text


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("redis://:sec@ret@host", "'@' as it is; write %40"),
        ("redis://:50%off@host", "'%' as it is; write %25"),
        ("redis://host?password=sec+ret", "'+' as it is; write %2B"),
    ],
)
def test_a_password_that_is_not_encoded_gets_a_hint(
    url: str, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    Example(url=url).log_all()
    assert hint in caplog.text
    assert redis_url.hint("redis://user:%40%2F@host:1/0") == ""


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("redis://user:sec/ret@host", "'/' as it is; write %2F"),
        ("redis://user:12#ret@host", "'#' as it is; write %23"),
        ("redis://user:12?ret@host", "'?' as it is; write %3F"),
        ("redis://user:sec[ret@host", "'[' as it is; write %5B"),
        ("redis://:secret", "write it as redis://USER:PASSWORD@HOST"),
        ("http://user:secret@host", "redis://, rediss://, unix://"),
    ],
)
def test_a_url_that_is_refused_is_not_quoted(url: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["example", "--url", url])
    with pytest.raises(SettingsError) as refused:
        Example.from_command_line()
    assert hint in str(refused.value)
    assert isinstance(refused.value.__cause__, ValidationError)
    for text in (str(refused.value), str(refused.value.__cause__), redis_url.shown(url)):
        assert "ret" not in text
