from .base import HeadDrafter
from .checkpoint import load_checkpoint, restrict_checkpoint, save_checkpoint
from .config import HeadsConfig
from .draft_vocab import DraftVocab
from .registry import KINDS, build_drafter

__all__ = [
           "KINDS",
           "DraftVocab",
           "HeadDrafter",
           "HeadsConfig",
           "build_drafter",
           "load_checkpoint",
           "restrict_checkpoint",
           "save_checkpoint",
]
