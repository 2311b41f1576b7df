"""Conversations with a chat model, to tune its exits on: `python -m training.answers MODEL FILE.jsonl`.

The model answers the prompts of `training/prompts.py` at temperature 0.7. Each line of the file is one
conversation as the model's chat template writes it: {"name": prompt, "text": conversation}. The last tenth
has topics of its own, and `add-exits` holds it out. An interrupted run goes on after the last whole batch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.prompts import prompts

_ROWS = 32  # conversations that are sampled together
_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 1.0}


def write_answers(source: Path, target: Path, count: int, max_tokens: int, seed: int) -> None:
    """Append to `target` the conversations of the first `count` prompts that it lacks."""
    tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    asked = prompts(count, seed)
    done = len(target.read_text(encoding="utf-8").splitlines()) if target.exists() else 0
    for start in range(done, count, _ROWS):
        rows = asked[start : start + _ROWS]
        conversations = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in rows
        ]
        torch.manual_seed(seed + start)
        given = tokenizer(conversations, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**given, max_new_tokens=max_tokens, **_SAMPLING)
        answers = out[:, given["input_ids"].size(1) :].tolist()
        lines = []
        for prompt, conversation, answer in zip(rows, conversations, answers, strict=True):
            end = tokenizer.eos_token_id  # what follows it is padding
            ids = answer[: answer.index(end) + 1] if end in answer else answer
            text = conversation + tokenizer.decode(ids, skip_special_tokens=False)
            lines.append(json.dumps({"name": prompt, "text": text}, ensure_ascii=False) + "\n")
        with target.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        print(f"{start + len(rows)}/{count} conversations", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.answers", description=__doc__)
    parser.add_argument("model", type=Path, help="a chat model, a transformers checkpoint directory")
    parser.add_argument("target", type=Path, help="the .jsonl file to write")
    parser.add_argument("--count", type=int, default=2000, help="of conversations (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=160, help="of an answer (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_answers(arguments.model, arguments.target, arguments.count, arguments.max_tokens, arguments.seed)


if __name__ == "__main__":
    main()
