"""Settings of a service: one typed object, read from flags, then the environment, then defaults."""

import json
import logging
import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict
from redis.connection import parse_url

from helios.errors import SettingsError

log = logging.getLogger(__name__)

# A worker's default, which benches take too: nobody sees eight thousandths of a second.
SERVED_BURST_SECONDS = 0.008

# Of a URL such as redis://user:password@host.
_PASSWORD = re.compile(r"(://[^\s:/@\"]*:)[^\s/@\"]+@")


def _checked_redis_url(url: str) -> str:
    parse_url(url)  # Raises ValueError, which names the schemes there are.
    return url


RedisUrl = Annotated[str, AfterValidator(_checked_redis_url)]


class ServiceSettings(BaseSettings):
    """Base of every service's settings. Subclasses set `env_prefix` and `cli_prog_name`."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True, cli_implicit_flags=True, frozen=True, extra="ignore", env_ignore_empty=True
    )

    stop_seconds: float = Field(
        10,
        gt=0,
        description="longest time after the grace until a process that was told to stop ends by force, "
        "logging what it still waits for",
    )

    @classmethod
    def from_command_line(cls) -> Self:
        """Reads the process's flags and environment.

        Raises SettingsError naming each setting that is wrong. `--help` prints all and exits.
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
        """Prints every setting at start, as one log line; passwords in URLs are not shown."""
        shown = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        log.info("settings %s", without_passwords(shown))


def without_passwords(text: str) -> str:
    """A text whose URLs may be shown."""
    return _PASSWORD.sub(r"\1***@", text)
