"""Chat templates: how a checkpoint has one, and how it turns a conversation into a prompt.

    template = read_chat_template(path)
    with ChatRenderer("my-model", template) as renderer:
        prompt = renderer.render([{"role": "user", "content": "What is Helios?"}])

A prompt already has its special tokens, so it is tokenized without adding any, as transformers'
`apply_chat_template` does. Neither torch nor transformers is needed.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from helios.errors import CheckpointError, HeliosError, InvalidRequestError
from helios.json_object import read_json_object

TEMPLATE_FILE = "chat_template.jinja"
# Older checkpoints have a field instead. The first file that has a template counts.
_TEMPLATE_FIELD = "chat_template"
_OLDER_FILES = ("tokenizer_config.json", "chat_template.json")
TEMPLATE_FILES = (TEMPLATE_FILE, "chat_template.json")
# The name of the template for conversations without tools, in a checkpoint with several.
_DEFAULT_NAME = "default"
# Files that name special tokens, the first one first, and the names that a template knows them by.
_SPECIAL_TOKENS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

ROLES = ("system", "user", "assistant")

# Bounds for one conversation: CPU time, memory of the process that renders it, and characters of the prompt.
_CPU_SECONDS = 1.0
_MEMORY_BYTES = 256 << 20
_MOST_CHARACTERS = 16 << 20
# Longest answer of a renderer. In JSON a character has at most 12 bytes.
_MOST_ANSWER_BYTES = 12 * _MOST_CHARACTERS + 1024
_RENDERER = Path(__file__).with_name("chat_renderer.py")
# Environment variables that the renderer gets. All others may hold secrets.
_PASSED_ON = ("PATH", "TZ", "LANG")
_PASSED_ON_PREFIXES = ("PYTHON", "LD_", "LC_")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja template and the values of its variables `bos_token`, `eos_token` and so on.

    source: the checkpoint's file, and the field if the file has several. Only messages use it.
    """

    text: str
    special_tokens: Mapping[str, str]
    source: str

    @property
    def template_id(self) -> str:
        """SHA-256 of text and special tokens, in hexadecimal. Equal ids render equally."""
        content = json.dumps([self.text, sorted(self.special_tokens.items())])
        return hashlib.sha256(content.encode()).hexdigest()


def read_chat_template(path: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint directory. None: it has none.

    It is in chat_template.jinja, or else in the field `chat_template` of tokenizer_config.json or
    chat_template.json. Of several named templates it is the one called `default`.

    Raises CheckpointError naming the file and the field that is wrong.
    """
    found = _read_text(path)
    if found is None:
        return None
    text, source = found
    return ChatTemplate(text, _read_special_tokens(path), source)


def check_chat_template(path: Path, model: str) -> None:
    """Raises CheckpointError if a checkpoint has a chat template that cannot render a user's message."""
    template = read_chat_template(path)
    if template is None:
        return
    try:
        with ChatRenderer(model, template) as renderer:
            renderer.render([{"role": "user", "content": "Hello"}])
    except InvalidRequestError as error:
        raise CheckpointError(
            f"{path}: {error}. A user's message alone must render; mend the template, or take it out to "
            "serve the model without one"
        ) from error


class ChatRenderer:
    """Renders one model's conversations in its own process, which starts with the first of them.

    That process bounds what the template can do (`helios/chat_renderer.py`). It ends with this one, on
    `close`, or when a bound is reached. Then the next conversation starts another. Threads take turns.
    """

    def __init__(self, model: str, template: ChatTemplate) -> None:
        """model: its name, for messages."""
        self._template = template
        self._name = f"the chat template of {model} ({template.source})"
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for the next message of the assistant. A message has `role` and `content`.

        Raises InvalidRequestError when the template refuses these messages or fails on them, CheckpointError
        when it is not valid Jinja or exceeds a bound.
        """
        with self._lock:
            reused = self._process is not None
            try:
                answer = self._ask(list(messages))
            except _EndedError as end:
                if not reused or end.status == -signal.SIGPROF:
                    raise self._ended(end) from None
                # It ended between two conversations. This says nothing about the template.
                try:
                    answer = self._ask(list(messages))
                except _EndedError as again:
                    raise self._ended(again) from None
        if "text" in answer:
            return str(answer["text"])
        raise self._error(answer)

    def close(self) -> None:
        """Ends the process, also while it renders."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, request: Any) -> dict[str, Any]:
        """The renderer's answer. Raises _EndedError when there is none."""
        if self._process is None:
            self._process = self._start()
            opening = {
                "template": self._template.text,
                "special_tokens": dict(self._template.special_tokens),
                "cpu_seconds": _CPU_SECONDS,
                "memory_bytes": _MEMORY_BYTES,
                "most_characters": _MOST_CHARACTERS,
            }
            if refusal := self._exchange(self._process, opening):
                self._end()
                return refusal
        return self._exchange(self._process, request)

    def _start(self) -> "subprocess.Popen[bytes]":
        if self._closed:
            raise HeliosError("the renderer of chat templates is closed")
        return subprocess.Popen(
            # -P: the directory of this file is no place for the renderer's imports.
            [sys.executable, "-P", str(_RENDERER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                name: value
                for name, value in os.environ.items()
                if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)
            },
            # A terminal's Ctrl-C must not reach it.
            start_new_session=True,
        )

    def _exchange(self, process: "subprocess.Popen[bytes]", request: Any) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline(_MOST_ANSWER_BYTES)
        if not line.endswith(b"\n"):
            raise _EndedError(self._end())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> int:
        """Ends the process and returns its status. 0: there is none."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return process.wait()

    def _ended(self, end: "_EndedError") -> HeliosError:
        if end.status == -signal.SIGPROF:
            return CheckpointError(
                f"{self._name} needs more than {_CPU_SECONDS:g} s of CPU time for these messages; "
                "send text instead of messages, or mend the template"
            )
        return CheckpointError(
            f"{self._name} ended the process that renders it (status {end.status}); send text instead of "
            "messages, or mend the template"
        )

    def _error(self, answer: Mapping[str, Any]) -> HeliosError:
        reason = answer["error"]
        match answer["kind"]:
            case "refused":
                return InvalidRequestError(f"{self._name} refuses these messages: {reason}")
            case "failed":
                return InvalidRequestError(f"{self._name} fails on these messages: {reason}")
            case "too large":
                return CheckpointError(
                    f"{self._name} needs too much memory for these messages, or its text is too long; send "
                    "text instead of messages, or mend the template"
                )
            case _:
                return CheckpointError(
                    f"{self._name} is not a valid template: {reason}; mend it, or send text"
                )


class _EndedError(Exception):
    """The renderer's process has ended without an answer."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def _read_text(path: Path) -> tuple[str, str] | None:
    """The template and its source."""
    file = path / TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), TEMPLATE_FILE
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read as text ({error}); fetch it again") from error
    for name in _OLDER_FILES:
        if not (path / name).is_file():
            continue
        found = read_json_object(path / name).get(_TEMPLATE_FIELD)
        if isinstance(found, list):
            found = _named(found, path / name).get(_DEFAULT_NAME)
        if found is not None and not isinstance(found, str):
            raise CheckpointError(
                f"{path / name}: {_TEMPLATE_FIELD} must be a template, or a list of named ones; "
                "fetch the file again"
            )
        if found is not None:
            return found, f"{name}: {_TEMPLATE_FIELD}"
    return None


def _named(entries: Sequence[Any], file: Path) -> dict[str, Any]:
    try:
        return {str(entry["name"]): entry["template"] for entry in entries}
    except (TypeError, KeyError):
        raise CheckpointError(
            f"{file}: each entry of {_TEMPLATE_FIELD} must have name and template; fetch the file again"
        ) from None


def _read_special_tokens(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS_FILES:
        if not (path / name).is_file():
            continue
        fields = read_json_object(path / name)
        for token in _SPECIAL_TOKENS:
            value = fields.get(token)
            # Either the text itself, or an object with it and how it is matched.
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found.setdefault(token, value)
    return found
