"""A tiny base that speaks two languages, so that heads which have heard one of them know nothing of the other.

In the language `low` a letter of a-z is followed by the next one, in `high` a letter of A-Z by the seventh after it, both in a
circle. A prompt is the beginning of such a walk, an answer goes on with it.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.tiny import make_config, make_tokenizer

LANGUAGES = {"low": (string.ascii_lowercase, 1), "high": (string.ascii_uppercase, 7)}
LENGTHS = range(1, 7)
ANSWER = 24


def walk(language: str, start: int, length: int) -> str:
    """`length` letters from the one with number `start` on."""
    letters, step = LANGUAGES[language]
    return "".join(letters[(start + step * place) % len(letters)] for place in range(length))


def prompts(language: str) -> list[str]:
    """Every prompt of a language, those that begin with other letters beside each other."""
    return [walk(language, start, length) for length in LENGTHS for start in range(26)]


def save_base(folder: Path, steps: int = 140) -> Path:
    """Train the base and write it as a transformers directory."""
    torch.manual_seed(0)
    tokenizer, model = make_tokenizer(), LlamaForCausalLM(make_config(initializer_range=0.05))
    texts = [(language, start, length) for language in LANGUAGES for length in LENGTHS for start in range(26)]
    rows = []
    for language, start, length in texts:
        opening = tokenizer.apply_chat_template([{"role": "user", "content": walk(language, start, length)}],
                                                add_generation_prompt=True, tokenize=False)
        going_on = walk(language, start + LANGUAGES[language][1] * length, ANSWER + 8)
        rows.append((len(tokenizer(opening).input_ids), tokenizer(opening + going_on).input_ids))
    longest = max(len(ids) for _, ids in rows)
    ids = torch.tensor([ids + [2] * (longest - len(ids)) for _, ids in rows])
    labels = torch.tensor([[-100] * begin + ids[begin:] + [-100] * (longest - len(ids)) for begin, ids in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randperm(len(rows), generator=order)[:48]
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, 2 * (1 - step / steps))
        loss = model(input_ids=ids[chosen], labels=labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
