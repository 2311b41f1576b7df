"""The bundled models' tokenizer: byte-level BPE of 4,096 entries with OPT's special ids.

`python -m training.tokenizer` trains it on the corpora and prints how it encodes each domain.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from helios.errors import HeliosError
from training.corpora import DEFAULT_DIRECTORY, DOMAINS, read_documents

VOCAB_SIZE = 4096
END_OF_TEXT = 2  # "</s>": starts a prompt and ends a text, as in OPT
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3

# Most bytes of a domain that decide the merges, so that large domains do not crowd out the smallest.
_BYTES_PER_DOMAIN = {"kjv": 5_000_000, "wordnet": 2_000_000}
_BYTES_OTHERWISE = 4_000_000


def train_tokenizer(texts: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Trains byte-level BPE on `texts`. Encoding puts `</s>` in front, as OPT's own tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", END_OF_TEXT)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, context: int) -> None:
    """Write tokenizer.json and the tokenizer_config.json that `transformers.AutoTokenizer` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def tokenizer_id(path: Path) -> str:
    """The hash of tokenizer.json. Streams move only between models with the same hash."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.tokenizer", description=__doc__)
    parser.add_argument("--corpora", type=Path, default=DEFAULT_DIRECTORY)
    parser.add_argument("--context", type=int, default=512, help="tokens; goes into tokenizer_config.json")
    arguments = parser.parse_args()
    texts: list[str] = []
    for domain in DOMAINS:
        left = _BYTES_PER_DOMAIN.get(domain.name, _BYTES_OTHERWISE)
        documents = read_documents(arguments.corpora, domain.name, "train")
        stride = max(1, sum(len(document.text) for document in documents) // left)
        texts += [document.text for document in documents[::stride]]
    tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, arguments.corpora / "tokenizer", arguments.context)
    for domain in DOMAINS:
        held = [document.text for document in read_documents(arguments.corpora, domain.name, "held")]
        tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(held, add_special_tokens=False))
        print(f"{domain.name:10} {sum(len(text.encode()) for text in held) / tokens:.2f} bytes a token")


if __name__ == "__main__":
    try:
        main()
    except HeliosError as error:
        raise SystemExit(f"error: {error}") from None
