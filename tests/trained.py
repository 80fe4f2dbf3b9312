"""Heads overfitted to the tiny base's own greedy answers, so that tests see accepted drafts, not only rejected ones."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from hydra_core.base import Base, load_base
from hydra_core.decoding import naive_generate
from hydra_core.heads import DraftVocab, HeadDrafter, HeadsConfig, build_drafter
from hydra_core.sampling import Request


def random_prompts(count: int, seed: int = 0, longest: int = 24) -> list[tuple[int, ...]]:
    """Prompts of 1 to `longest` byte tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, 259, (length,), generator=generator).tolist()) for length in lengths]


def draft_vocab_of(base: Base, size: int = 0) -> DraftVocab:
    counts = torch.arange(base.vocab_size, 0, -1)
    return DraftVocab.rank(counts, size, base.stop_ids)


def random_heads(base: Base, kind: str, seed: int = 0, draft_vocab_size: int = 0, **fields: object) -> HeadDrafter:
    """Untrained heads; `fields`: further ones of `HeadsConfig`."""
    torch.manual_seed(seed)
    config = HeadsConfig.model_validate({"kind": kind, "num_heads": 3, "draft_vocab_size": draft_vocab_size, **fields})
    return build_drafter(config, base.vocabulary, draft_vocab_of(base, draft_vocab_size)).eval().requires_grad_(False)


def overfit_heads(base: Base, kind: str, prompts: list[tuple[int, ...]], tokens: int = 40, steps: int = 150,
                  **fields: object) -> HeadDrafter:
    """Train a drafter of `kind` on the base's greedy answers to `prompts` until its drafts are often right."""
    heads = random_heads(base, kind, **fields).train().requires_grad_(True)  # type: ignore[arg-type]
    rows = []
    for i, prompt in enumerate(prompts):
        answer = naive_generate(base, Request(str(i), prompt, tokens)).token_ids
        ids = torch.tensor(prompt + answer)
        rows.append((ids, base.hidden_states([ids.tolist()], heads.taps)[0].clone()))
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    for step in range(steps):
        ids, hidden = rows[step % len(rows)]
        loss = teacher_forced_loss(heads, ids, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.eval().requires_grad_(False)


def teacher_forced_loss(heads: HeadDrafter, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Sum over heads of the cross-entropy of x_{t+2+i} (whole vocabulary drafted, so ids are classes)."""
    length = len(ids)
    positions = torch.arange(length)[None]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    outputs = heads.outputs(ids[None], hidden[None], positions, mask, torch.ones(1, length, dtype=torch.bool))
    loss = hidden.new_zeros(())
    for i in range(heads.num_heads):
        count = length - 2 - i
        at = torch.arange(count)
        logits = heads.head_logits(i, outputs(i, at, at[:, None] + torch.arange(1, i + 2)))
        loss = loss + F.cross_entropy(logits, ids[2 + i:2 + i + count])
    return loss


def noisy_copy(folder: Path, target: Path, share: float = 0.05, seed: int = 0) -> Base:
    """A draft model for the tiny base in `folder`: the base itself with noise of `share` of each matrix's size, so that it
    agrees with it often and not always. Saved to `target`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += share * weight.std() * torch.randn(weight.shape, generator=generator) if weight.ndim == 2 else 0
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).exists():
            (target / name).write_bytes((folder / name).read_bytes())
    return load_base(str(target), dtype="fp32", cache=target.parent / "cache")
