"""Renders one chat template. It is a separate program, because a template is code that a checkpoint brings.

Reads JSON lines from stdin and answers each with one on stdout. The first line is an `Opening`, each further
one the messages of a conversation. An answer is `{"text": ...}`, or `{"kind": ..., "error": ...}` with a
`FailureKind`; the answer to the opening is `{}` or the latter. `helios.chat_template` runs it.

Jinja's sandbox keeps a template from Python's internals. It cannot bound what a template computes: a single
call may take all memory or run for hours. So the kernel bounds this process: its CPU time for each text, its
memory, and the files that it may open or write (none). It imports nothing of Helios, to stay small.
"""

import contextlib
import enum
import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Makes Python and jinja2 import all that they import when it is first needed. Later no file can be opened.
_WARM_UP = "{{ 'text' | pprint }}{{ lipsum(n=1) }}{{ strftime_now('%c') }}{{ raise_exception() }}"
# Longer reasons are cut.
_REASON_CHARACTERS = 500


class Opening(TypedDict):
    """The template, the values of its variables `bos_token` and so on, and the bounds for one text.

    When `cpu_seconds` are over, SIGPROF ends the process. `memory_bytes` is what it may use beyond the memory
    of the idle process.
    """

    template: str
    special_tokens: dict[str, str]
    cpu_seconds: float
    memory_bytes: int
    most_characters: int


class FailureKind(enum.StrEnum):
    """Why there is no text."""

    # The template is not valid Jinja.
    SYNTAX = "syntax"
    # The template itself refused the messages, with raise_exception.
    REFUSED = "refused"
    # It failed on these messages.
    FAILED = "failed"
    # It needs more memory, or its text has more characters, than allowed.
    TOO_LARGE = "too large"


class _RefusedError(TemplateError):
    """The template called raise_exception."""


class _Generation(Extension):
    """`{% generation %}` marks an assistant's text for training. It changes nothing here."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own type

    def parse(self, parser: Parser) -> nodes.Node:
        """Only the block's body remains."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _SafeNamespace(Namespace):
    """A namespace without names that begin with an underscore, because those lead to Python's internals."""

    def __init__(*args: Any, **fields: Any) -> None:  # `self` may be a field
        Namespace.__init__(*args, **fields)
        for name in dict(*args[1:], **fields):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the name {name!r}")


def _raise_exception(message: object = "") -> None:
    raise _RefusedError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja's own filter this one does not escape HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:  # noqa: A002  # templates may name it
    return datetime.now().strftime(format)


def compile_template(text: str) -> Template:
    """The template, in an environment like that of transformers (`utils/chat_template_utils.py`).

    Raises TemplateSyntaxError.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _SafeNamespace,
    }
    return environment.from_string(text)


def main() -> None:
    """Answers requests until stdin ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    with contextlib.suppress(_RefusedError):
        compile_template(_WARM_UP).render()
    opening: Opening = json.loads(requests.readline())
    _bound(opening["memory_bytes"])
    template: Template | None = None

    def compile_opening() -> dict[str, str]:
        nonlocal template
        template = compile_template(opening["template"])
        return {}

    _write(answers, _within_bounds(opening, compile_opening))
    if template is None:
        return
    for line in requests:
        messages = json.loads(line)
        _write(answers, _within_bounds(opening, partial(_render, template, opening, messages)))


def _render(template: Template, opening: Opening, messages: list[dict[str, str]]) -> dict[str, str]:
    blocks, characters = [], 0
    for block in template.generate(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, **opening["special_tokens"]
    ):
        blocks.append(block)
        characters += len(block)
        if characters > opening["most_characters"]:
            raise MemoryError
    text = "".join(blocks)
    # A template can make text that is not valid Unicode.
    text.encode()
    return {"text": text}


def _within_bounds(opening: Opening, answer: Callable[[], dict[str, str]]) -> dict[str, str]:
    """The answer, or why there is none. SIGPROF ends the process if it takes too long."""
    signal.setitimer(signal.ITIMER_PROF, opening["cpu_seconds"])
    try:
        return answer()
    except _RefusedError as error:
        return _failure(FailureKind.REFUSED, str(error))
    except MemoryError:
        return _failure(FailureKind.TOO_LARGE, "")
    except TemplateSyntaxError as error:
        return _failure(FailureKind.SYNTAX, f"{error.message} in line {error.lineno}")
    # A template can raise anything that Python raises.
    except Exception as error:
        return _failure(FailureKind.FAILED, f"{type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _failure(kind: FailureKind, reason: str) -> dict[str, str]:
    """An answer without a text. The reason becomes one line."""
    return {"kind": kind, "error": " ".join(reason[:_REASON_CHARACTERS].split())}


def _write(answers: BinaryIO, answer: Mapping[str, str]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


def _bound(memory_bytes: int) -> None:
    """Sets this process's limits. They hold until it ends, and nothing in it can lift them."""
    idle_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # If memory runs out, the kernel ends this process and not its parent (proc(5)).
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    for limit, value in {
        resource.RLIMIT_AS: idle_bytes + memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 0,
    }.items():
        resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    main()
