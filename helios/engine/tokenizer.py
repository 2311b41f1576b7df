"""The tokenizer of a checkpoint."""

import hashlib
from pathlib import Path
from typing import NamedTuple, cast

from tokenizers import Tokenizer, processors

from helios.architectures.registry import read_config
from helios.catalog import FACTS_FILE, SLOW_TOKENIZER_FILES, TOKENIZER_FILE, EarlyExitFacts
from helios.errors import CheckpointError


class LoadedTokenizer(NamedTuple):
    """A tokenizer, and its id: the SHA-256 of its tokenizer.json, in hexadecimal."""

    tokenizer: Tokenizer
    tokenizer_id: str
    tokenizer_json: bytes


def load_tokenizer(path: Path, facts: EarlyExitFacts) -> LoadedTokenizer:
    """The tokenizer of a checkpoint directory: tokenizer.json, or else vocab.json with merges.txt.

    tokenizer.json itself decides which tokens are put before a text. Without that file it is the model's BOS
    token. Nothing is truncated or padded.

    Raises CheckpointError when there is none, when it is corrupt, or when it is not the one that `facts`
    name.
    """
    file = path / TOKENIZER_FILE
    if file.is_file():
        content = file.read_bytes()
    elif all((path / name).is_file() for name in SLOW_TOKENIZER_FILES):
        content = _convert(path).to_str().encode()
    else:
        raise CheckpointError(
            f"{path} holds neither {TOKENIZER_FILE} nor {' and '.join(SLOW_TOKENIZER_FILES)}; fetch them"
        )
    tokenizer_id = hashlib.sha256(content).hexdigest()
    if facts.tokenizer_id not in (None, tokenizer_id):
        raise CheckpointError(
            f"{file} is not the tokenizer that the model was trained with: its SHA-256 is {tokenizer_id}, "
            f"{FACTS_FILE} asks for {facts.tokenizer_id}; fetch the model again"
        )
    try:
        tokenizer = Tokenizer.from_buffer(content)
    # The tokenizers library raises plain Exception and ValueError.
    except Exception as error:
        raise CheckpointError(f"{file} is corrupt ({error}); fetch it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return LoadedTokenizer(tokenizer, tokenizer_id, content)


def _convert(path: Path) -> Tokenizer:
    """A fast tokenizer from the slow tokenizer files that OPT checkpoints have on the hub."""
    # Only these checkpoints need transformers, which takes seconds to import.
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        slow = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # transformers raises many kinds of errors for files that it cannot parse.
    except Exception as error:
        raise CheckpointError(
            f"{path}: {' and '.join(SLOW_TOKENIZER_FILES)} are not a tokenizer ({error}); fetch them again"
        ) from error
    tokenizer = cast("Tokenizer", slow.backend_tokenizer)
    start_id = read_config(path).bos_token_id
    if slow.bos_token_id != start_id:
        raise CheckpointError(
            f"{path}: the tokenizer starts texts with id {slow.bos_token_id}, config.json's bos_token_id is "
            f"{start_id}; fetch tokenizer_config.json and special_tokens_map.json"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{slow.bos_token} $A", special_tokens=[(slow.bos_token, start_id)]
    )
    return tokenizer
