"""Whether a base gives transformers' own logits: eight token ids go through both, as prompts of two lengths and as a draft tree.

Families differ in multipliers, soft caps and norms under names of their own. No list of them would be complete; a comparison is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hydra_core.base.model import Base
from hydra_core.base.probe import decoder_of
from hydra_core.base.vocabulary import BaseVocabulary
from hydra_core.errors import InputError
from hydra_core.tree import DraftTree
from hydra_core.tree.batch import chain

log = logging.getLogger(__name__)

PROMPT = 4
TREE = DraftTree(((0,), (1,), (0, 0)))
"""Root, two children, and a child of the first."""
PATHS = ((0, 1, 3), (0, 2))
"""The tree's paths, by node."""
SEEN = ((0, 4), (0, 5), (1, 5), (0, 6))
"""For each node the path that it is on, and its position there."""
HEAD_ERROR = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.015}
"""Largest difference of the logits of the same hidden states, relative to the logits' size; by the dtype of the computation."""
ERROR = {torch.float64: 1e-4, torch.float32: 2e-3, torch.bfloat16: 0.25}
"""The same for the whole forward. In bfloat16 it is larger than any rounding that was seen and smaller than a wrong factor."""


@dataclass(frozen=True)
class Reference:
    """What transformers' own forward makes of the two paths. `ids`: [2, 7] int64, prompt and nodes; `hidden`: [2, 7, D] at the
    end of its layers; `logits`: [2, 7, V] float32."""

    ids: Tensor
    hidden: Tensor
    logits: Tensor


@torch.inference_mode()
def reference_of(model: Any, asked: str) -> Reference:
    """Run the transformers model `model`. Raises InputError if it cannot be run, or if its logits are not finite numbers."""
    device = model.get_input_embeddings().weight.device
    size = model.get_input_embeddings().weight.shape[0]
    chosen = [(number + 1) * size // (PROMPT + TREE.size + 2) for number in range(PROMPT + TREE.size)]
    rows = [chosen[:PROMPT] + [chosen[PROMPT + node] for node in path] for path in PATHS]
    longest = max(map(len, rows))
    ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=device)
    seen: list[Tensor] = []

    def keep(_module: Any, _given: Any, output: Any) -> None:
        seen.append(output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0])

    hook = decoder_of(model).register_forward_hook(keep)
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a model class is a program of others
        raise InputError(f"base.model={asked}: transformers' own forward fails ({_line(error)}): use another model or device"
                         ) from None
    finally:
        hook.remove()
    if not bool(torch.isfinite(logits).all()):
        raise InputError(f"base.model={asked}: its logits are not finite numbers: its weights are damaged, or too large for this "
                         "weight format")
    return Reference(ids, seen[0], logits)


def check_head(vocabulary: BaseVocabulary, reference: Reference, asked: str) -> None:
    """Raise InputError unless the vocabulary projection gives transformers' logits for transformers' hidden states."""
    try:
        found = _error(vocabulary.head(reference.hidden[0]), reference.logits[0])
    except RuntimeError as error:  # shapes that do not fit
        raise InputError(f"{_other_head(asked)} ({_line(error)}): this architecture is not supported") from None
    if not found <= HEAD_ERROR[vocabulary.embedding.dtype]:
        raise InputError(f"{_other_head(asked)} (they differ by {found:.1%}): this architecture is not supported")


def _other_head(asked: str) -> str:
    return f"base.model={asked}: its logits are not its hidden states times its vocabulary matrix, with a scale or a soft cap"


@torch.inference_mode()
def why_different(base: Base, reference: Reference) -> str | None:
    """How the logits of `base` differ from transformers' own by more than rounding, or None."""
    try:
        ours, theirs = _by_tree(base, reference) if base.supports_tree else _by_token(base, reference)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a family whose modules do not fit what this decoder expects of them
        return _line(error)
    found = _error(base.logits(ours), theirs)
    log.debug("%s differs from transformers' own forward by %.2g", type(base.decoder).__name__, found)
    return None if found <= ERROR[base.dtype] else f"logits differ by {found:.1%}"


def _by_tree(base: Base, reference: Reference) -> tuple[Tensor, Tensor]:
    """The prompt in one row, a whole path in another, then the tree after the prompt: hidden states and transformers' logits."""
    whole = reference.ids[0].tolist()
    cache = base.allocate(2, len(whole) + TREE.size)
    prompts = base.prefill([whole[:PROMPT], whole], cache, (0, 2))
    nodes = torch.stack([reference.ids[path, place] for path, place in SEEN])
    drafted = base.forward(nodes[None], cache, (0, 1), TREE.as_batch)[0]
    wanted = torch.stack([reference.logits[path, place] for path, place in SEEN])
    return (torch.cat((prompts[0, :PROMPT], prompts[1], drafted)),
            torch.cat((reference.logits[0, :PROMPT], reference.logits[0], wanted)))


def _by_token(base: Base, reference: Reference) -> tuple[Tensor, Tensor]:
    """The prompt, then one token after another, of both paths."""
    ids = reference.ids.tolist()
    cache = base.allocate(2, len(ids[0]))
    states = [base.prefill([row[:PROMPT] for row in ids], cache, (0, 2))]
    for place in range(PROMPT, len(ids[0])):
        states.append(base.forward(reference.ids[:, place:place + 1], cache, (0, 2), chain(1)))
        cache.lengths += 1
    return torch.cat(states, dim=1), reference.logits


def _error(ours: Tensor, theirs: Tensor) -> float:
    """The largest distance of a position's logits, relative to their usual size. An offset of all logits does not count: it
    changes no probability."""
    ours, theirs = (logits.double() - logits.double().mean(-1, keepdim=True) for logits in (ours, theirs))
    size = float(theirs.norm(dim=-1).square().mean().sqrt())
    worst = float((ours - theirs).norm(dim=-1).max())
    return worst / size if size else worst


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
