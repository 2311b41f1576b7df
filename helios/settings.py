"""Settings of a service: one typed object, read from flags, then environment variables, then defaults."""

import json
import logging
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

from helios import redis_url
from helios.address import parse
from helios.errors import SettingsError

log = logging.getLogger(__name__)

# Default length of a worker's burst, also used by benches. Nobody notices eight milliseconds.
SERVED_BURST_SECONDS = 0.008
# Default number of prompt positions read out to notice a drift, also used by benches.
SERVED_PROMPT_READINGS = 16


def _checked_address(address: str) -> str:
    parse(address)
    return address


def _checked_listen_address(address: str) -> str:
    parse(address, any_port=True)
    return address


# host:port of another server.
Address = Annotated[str, AfterValidator(_checked_address)]
# host:port to listen on. Port 0 takes any free one.
ListenAddress = Annotated[str, AfterValidator(_checked_listen_address)]


class ServiceSettings(BaseSettings):
    """Base of every service's settings. Subclasses set `env_prefix` and `cli_prog_name`."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True,
        cli_implicit_flags=True,
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        # A URL may contain a password.
        hide_input_in_errors=True,
    )

    stop_seconds: float = Field(
        10,
        gt=0,
        description="longest time after the grace until a process that was told to stop ends by force, "
        "logging what it still waits for",
    )

    @classmethod
    def from_command_line(cls) -> Self:
        """Reads the process's flags and environment variables.

        Raises SettingsError naming each wrong setting. `--help` prints all settings and exits.
        """
        try:
            return CliApp.run(cls)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'settings'}: "
                + item["msg"].removeprefix("Value error, ")
                for item in error.errors()
            )
            raise SettingsError(problems) from error

    def log_all(self) -> None:
        """Logs all settings in one line at the start. Passwords in URLs are hidden."""
        settings = self.model_dump(mode="json")
        urls = {key: value for key, value in settings.items() if isinstance(value, str) and "://" in value}
        shown = settings | {key: redis_url.shown(url) for key, url in urls.items()}
        log.info("settings %s", json.dumps(shown, sort_keys=True))
        for key, url in urls.items():
            if hint := redis_url.hint(url):
                log.warning("%s: %s", key, hint)
