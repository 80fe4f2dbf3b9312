"""Hydra++: Hydra whose hidden state is the output of a prefix attention layer (arXiv 2402.05109, section 4)."""

from __future__ import annotations

from torch import Tensor

from hydra_core.base.linear import draft_bytes
from hydra_core.base.vocabulary import BaseVocabulary
from hydra_core.heads.config import HeadsConfig
from hydra_core.heads.draft_vocab import DraftVocab
from hydra_core.heads.hydra import Hydra
from hydra_core.heads.prefix import PrefixLayer


class HydraPlusPlus(Hydra):
    """Sequential heads over a prefix layer; its config defaults to deeper MLPs and the teacher's distribution."""

    def __init__(self, config: HeadsConfig, vocabulary: BaseVocabulary, draft_vocab: DraftVocab) -> None:
        super().__init__(config, vocabulary, draft_vocab)
        self.prefix = PrefixLayer(vocabulary.config)

    def features(self, hidden: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor | None = None) -> Tensor:
        features: Tensor = self.prefix(super().features(hidden, positions, mask), positions, mask, wanted)
        return features

    def bytes_read(self, depth: int) -> int:
        prefix = sum(draft_bytes(weight) for weight in self.prefix.parameters() if weight.ndim == 2)
        return super().bytes_read(depth) + (prefix if depth else 0)

    def pack(self) -> None:
        super().pack()
        self.prefix.pack()
