"""Checks the URL of a Redis server, which may contain a password, and makes it safe to show."""

import re
from typing import Annotated
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator
from redis.connection import URL_QUERY_ARGUMENT_PARSERS, parse_url

_FORM = "redis://USER:PASSWORD@HOST:PORT/DB"
# A text of this form cannot contain a password.
_HARMLESS = re.compile(r"(?:[a-z]+://)?[\w.-]*(?::\d+)?(?:/\d*)?", re.ASCII | re.IGNORECASE)
_SECRETS = ("password", "ssl_password")
_PASSWORD_ARGUMENT = re.compile(r"[?&]password=([^&]*)")
# Characters that would end or split a part of a URL: before the host, and in the query. A `%` must begin a
# percent code.
_SPECIAL_BEFORE_HOST = re.compile(r"[@/?#\[\]\s]|%(?![0-9A-Fa-f]{2})")
_SPECIAL_IN_QUERY = re.compile(r"[#+\s]|%(?![0-9A-Fa-f]{2})")


def checked(url: str) -> str:
    """Returns the URL. Raises ValueError, which quotes no part of it, if it is not a valid Redis URL."""
    try:
        parse_url(url)
        is_whole = not _is_split_by_password(url)
    except ValueError as error:
        is_whole = False
        # Other messages of the parser may quote the password.
        said = str(error) if "schemes" in str(error) else f"write it as {_FORM}"
    else:
        said = f"write it as {_FORM}"
    if not is_whole:
        raise ValueError(f"not a Redis URL: {hint(url) or said}")
    return url


RedisUrl = Annotated[str, AfterValidator(checked)]


def shown(url: str) -> str:
    """The URL for display, with *** in place of everything that is or may be a password."""
    try:
        parse_url(url)
        parts = urlsplit(url)
        is_whole = not _is_split_by_password(url)
    except ValueError:
        is_whole = False
    if not is_whole:
        return url if _HARMLESS.fullmatch(url) else "***"
    user, at, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    query = "&".join(_shown_argument(argument) for argument in parts.query.split("&"))
    # Nothing uses the part after a `#`, so it may be the rest of a password.
    end = f"{query and '?' + query}{parts.fragment and '#***'}"
    return f"{parts.scheme}://{name}{colon and ':***'}{at}{host}{parts.path}{end}"


def hint(url: str) -> str:
    """Says which character of the password must be percent-encoded, and how. Empty if none must."""
    given = _PASSWORD_ARGUMENT.search(url)
    if given is not None:
        found = _SPECIAL_IN_QUERY.search(given[1])
    else:
        before_host, at, _ = url.partition("://")[2].rpartition("@")
        found = _SPECIAL_BEFORE_HOST.search(before_host.partition(":")[2] if at else "")
    if found is None:
        return ""
    return f"the password holds {found[0]!r} as it is; write {quote(found[0], safe='')} in its place"


def _shown_argument(argument: str) -> str:
    name = argument.partition("=")[0]
    if name in _SECRETS:
        return f"{name}=***"
    # An unknown argument may be the rest of a password that contains an `&`.
    return argument if name in URL_QUERY_ARGUMENT_PARSERS or not argument else "***"


def _is_split_by_password(url: str) -> bool:
    """Whether a character in the password ended the part before the host, so that the host is wrong."""
    parts = urlsplit(url)
    # The path of a Unix socket may contain an @.
    is_socket = parts.scheme == "unix" and not parts.netloc
    return "@" in url and "@" not in parts.netloc and not is_socket and not _PASSWORD_ARGUMENT.search(url)
