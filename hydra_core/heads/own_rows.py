"""Vocabulary rows that belong to one head, as Medusa (arXiv 2401.10774) and Hydra (arXiv 2402.05109) are published."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hydra_core.base.linear import Packable
from hydra_core.base.vocabulary import VocabHead
from hydra_core.heads.draft_vocab import DraftVocab


class OwnRows(Packable):
    """W x + b over the whole vocabulary, without scale and soft cap; starts as the base's rows `start`.

    All V rows are kept and saved; a draft vocabulary chooses which of them are read, so it can be changed as it can for heads
    that end in the base's rows. In float16 the four matrices of a 7B base's heads take 1 GB.
    """

    def __init__(self, start: VocabHead) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(start.weight.shape))
        self.bias = nn.Parameter(torch.zeros(len(start.weight)))
        with torch.no_grad():
            self.weight.copy_(start.weight)
            if start.bias is not None:
                self.bias.copy_(start.bias)

    def forward(self, hidden: Tensor, vocab: DraftVocab) -> Tensor:
        """[..., D] of any float dtype to logits [..., Vd] float32 of the tokens `vocab`, or of those that were packed."""
        rows = self._restricted(vocab) if self._packed is None or torch.is_grad_enabled() else self._packed
        logits: Tensor = rows(hidden)
        return logits

    def pack(self, vocab: DraftVocab) -> VocabHead:
        """Keep the rows of `vocab` side by side, and packed where this machine has a faster layout; returns them."""
        with torch.no_grad():
            self._packed = packed = self._restricted(vocab).for_drafting()
        return packed

    def _restricted(self, vocab: DraftVocab) -> VocabHead:
        whole = VocabHead(self.weight, self.bias)
        return whole if vocab.whole else whole.restrict(vocab.ids.to(self.weight.device))
