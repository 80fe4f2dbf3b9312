"""Drafters: one file each, shared parts beside them, put together in `registry`."""

from hydra_core.drafters.adaptive import AdaptiveDrafter
from hydra_core.drafters.config import HeadsConfig
from hydra_core.drafters.heads import HeadDrafter
from hydra_core.drafters.ngram import Match, NgramDrafter, NgramIndex
from hydra_core.drafters.registry import KINDS, build_drafter
from hydra_core.drafters.vocab import DraftVocab

Drafter = HeadDrafter | NgramDrafter | AdaptiveDrafter

__all__ = ["KINDS", "AdaptiveDrafter", "DraftVocab", "Drafter", "HeadDrafter", "HeadsConfig", "Match", "NgramDrafter",
           "NgramIndex", "build_drafter"]
