"""Conversations with a chat model, to tune its exits on: `python -m training.answers MODEL FILE.jsonl`.

The model answers the prompts of `training/prompts.py` at temperature 0.7. Each line of the file is one
conversation: {"name": what is asked, "prompt": the same as the model's chat template writes it, "text": the
answer}. The last tenth has topics of its own, and `add-exits` holds it out. An interrupted run goes on after
the last whole batch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from helios.engine import Engine, EngineSettings, Output, SamplingParams
from helios.errors import HeliosError
from training.prompts import prompts

_BATCH = 64  # conversations that are sampled together
_MEMORY = 2 << 30


def write_answers(source: Path, target: Path, count: int, max_tokens: int, seed: int) -> None:
    """Append to `target` the conversations of the first `count` prompts that it lacks."""
    tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True)
    engine = Engine.load(source, None, EngineSettings(precision="bfloat16", memory_bytes=_MEMORY))
    asked = prompts(count, seed)
    done = len(target.read_text(encoding="utf-8").splitlines()) if target.exists() else 0
    for start in range(done, count, _BATCH):
        lines = []
        batch = {number: asked[number] for number in range(start, min(start + _BATCH, count))}
        conversations = {number: _conversation(tokenizer, prompt) for number, prompt in batch.items()}
        answers = _answers(engine, tokenizer, conversations, max_tokens, seed)
        for number, prompt in batch.items():
            line = {"name": prompt, "prompt": conversations[number], "text": answers[number]}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        with target.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        print(f"{start + len(batch)}/{count} conversations", flush=True)


def _conversation(tokenizer: Any, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _answers(
    engine: Engine, tokenizer: Any, conversations: dict[int, str], max_tokens: int, seed: int
) -> dict[int, str]:
    """The model's answers as they would be in a conversation, with the token that ends them."""
    outputs: dict[int, list[Output]] = {number: [] for number in conversations}
    for number, text in conversations.items():
        ids = tokenizer.encode(text, add_special_tokens=False)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.7, top_p=0.95, seed=seed + number)
        engine.submit(str(number), ids, sampling, outputs[number].append)
    while engine.step():
        pass
    return {
        number: tokenizer.decode([token.token_id for output in found for token in output.tokens])
        for number, found in outputs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.answers", description=__doc__)
    parser.add_argument("model", type=Path, help="a chat model, a checkpoint directory")
    parser.add_argument("target", type=Path, help="the .jsonl file to write")
    parser.add_argument("--count", type=int, default=2000, help="of conversations (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=160, help="of an answer (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_answers(arguments.model, arguments.target, arguments.count, arguments.max_tokens, arguments.seed)


if __name__ == "__main__":
    try:
        main()
    except HeliosError as error:
        sys.exit(f"error: {error}")
