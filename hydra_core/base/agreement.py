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
HEAD_ERROR = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.004, torch.bfloat16: 0.015}
"""Largest difference of the logits of the same hidden states, relative to the logits' size; by the dtype of the computation.
float16 is what some quantised bases compute in: its steps are an eighth of bfloat16's, and its sums may be rounded too."""
ERROR = {torch.float64: 1e-4, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.25}
"""The same for the whole forward, at the median position of each of its parts. In 16 bits it is larger than any rounding that was
seen and smaller than a wrong factor: 0.5 is off by 50 % at every position, 2 by 100 %."""
WORST = {torch.float64: 1e-4, torch.float32: 2e-3, torch.float16: 0.75, torch.bfloat16: 0.75}
"""The same at the worst position. Rounding of 16 bits grows with the depth and unevenly: a few positions of a right base may be
far off. Where a token sees what it should not, its logits turn to others: those that have nothing in common are off by 140 %."""


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
    except Exception as error:  # a model class is a program of others
        if _of_the_machine(error):
            raise
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
        found = float(_errors(vocabulary.head(reference.hidden[0]), reference.logits[0]).max())
    except RuntimeError as error:  # shapes that do not fit
        if _of_the_machine(error):
            raise
        raise InputError(f"{_other_head(asked)} ({_line(error)}): this architecture is not supported") from None
    if not found <= HEAD_ERROR[vocabulary.embedding.dtype]:
        raise InputError(f"{_other_head(asked)} (they differ by {found:.1%}): this architecture is not supported")


def _other_head(asked: str) -> str:
    return f"base.model={asked}: its logits are not its hidden states times its vocabulary matrix, with a scale or a soft cap"


@torch.inference_mode()
def why_different(base: Base, reference: Reference) -> str | None:
    """How the logits of `base` differ from transformers' own by more than rounding, or None.

    Raises what the machine is to blame for (no memory, a device that fails): that says nothing about the decoder.
    """
    try:
        parts = _by_tree(base, reference) if base.supports_tree else _by_token(base, reference)
        errors = [_errors(base.logits(hidden), wanted) for hidden, wanted in parts]
    except Exception as error:  # a family whose modules do not fit what this decoder expects of them
        if _of_the_machine(error):
            raise
        return _line(error)
    usual, worst = max(map(_upper_median, errors)), max(float(part.max()) for part in errors)
    log.debug("%s differs from transformers' own forward by %.2g, at the worst position by %.2g", type(base.decoder).__name__,
              usual, worst)
    if usual <= ERROR[base.dtype] and worst <= WORST[base.dtype]:
        return None
    return f"logits differ by {usual:.1%}, at the worst position by {worst:.1%}"


Part = tuple[Tensor, Tensor]
"""Hidden states of a base [N, D], and transformers' logits [N, V] at the same positions."""


def _by_tree(base: Base, reference: Reference) -> tuple[Part, ...]:
    """The prompt in one row, a whole path in another, then the tree after the prompt."""
    whole = reference.ids[0].tolist()
    cache = base.allocate(2, len(whole) + TREE.size)
    prompts = base.prefill([whole[:PROMPT], whole], cache, (0, 2))
    nodes = torch.stack([reference.ids[path, place] for path, place in SEEN])
    drafted = base.forward(nodes[None], cache, (0, 1), TREE.as_batch)[0]
    wanted = torch.stack([reference.logits[path, place] for path, place in SEEN])
    return (prompts[0, :PROMPT], reference.logits[0, :PROMPT]), (prompts[1], reference.logits[0]), (drafted, wanted)


def _by_token(base: Base, reference: Reference) -> tuple[Part, ...]:
    """The prompt, then one token after another, of both paths."""
    ids = reference.ids.tolist()
    cache = base.allocate(2, len(ids[0]))
    states = [base.prefill([row[:PROMPT] for row in ids], cache, (0, 2))]
    for place in range(PROMPT, len(ids[0])):
        states.append(base.forward(reference.ids[:, place:place + 1], cache, (0, 2), chain(1)))
        cache.lengths += 1
    return tuple(zip(torch.cat(states, dim=1), reference.logits, strict=True))


def _errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """The distance of each position's logits [N, V], relative to their usual size: [N] float64. An offset of all logits does not
    count: it changes no probability."""
    ours, theirs = (logits.double() - logits.double().mean(-1, keepdim=True) for logits in (ours, theirs))
    size = theirs.norm(dim=-1).square().mean().sqrt()
    found: Tensor = (ours - theirs).norm(dim=-1) / (size if size else 1.0)
    return found


def _upper_median(errors: Tensor) -> float:
    return float(errors.sort().values[len(errors) // 2])


def _of_the_machine(error: Exception) -> bool:
    """Whether `error` tells of memory or of the device, not of what is computed; a decoder that goes on would meet it again."""
    return (isinstance(error, MemoryError | InputError | torch.OutOfMemoryError | torch.AcceleratorError)
            or any(sign in str(error) for sign in ("CUDA error", "can't allocate memory")))


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
