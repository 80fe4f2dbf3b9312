"""Drafters: one file each, shared parts beside them, put together in `registry`."""

from hydra_core.drafters.config import HeadsConfig
from hydra_core.drafters.heads import HeadDrafter
from hydra_core.drafters.ngram import NgramDrafter, NgramIndex
from hydra_core.drafters.registry import KINDS, build_drafter
from hydra_core.drafters.vocab import DraftVocab

__all__ = ["KINDS", "DraftVocab", "HeadDrafter", "HeadsConfig", "NgramDrafter", "NgramIndex", "build_drafter"]
