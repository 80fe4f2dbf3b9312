"""The table of the kinds of draft heads."""

from __future__ import annotations

from hydra_core.base.vocabulary import BaseVocabulary
from hydra_core.heads.base import HeadDrafter
from hydra_core.heads.config import HeadsConfig
from hydra_core.heads.draft_vocab import DraftVocab
from hydra_core.heads.eagle import Eagle
from hydra_core.heads.hydra import Hydra
from hydra_core.heads.hydra_plus import HydraPlusPlus
from hydra_core.heads.medusa import Medusa

KINDS: dict[str, type[HeadDrafter]] = {"medusa": Medusa, "hydra": Hydra, "hydra++": HydraPlusPlus, "eagle": Eagle,
                                       "eagle3": Eagle}


def build_drafter(config: HeadsConfig, vocabulary: BaseVocabulary, draft_vocab: DraftVocab) -> HeadDrafter:
    """Untrained heads in float32 on the vocabulary's device."""
    return KINDS[config.kind](config, vocabulary, draft_vocab).to(vocabulary.embedding.device)
