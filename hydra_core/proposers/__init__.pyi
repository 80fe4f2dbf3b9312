from .base import Accepted, Proposal, StepTimes
from .ngram import Match, NgramDrafter, NgramIndex
from .settings import AdaptiveDrafter, Drafter

__all__ = ["Accepted", "AdaptiveDrafter", "Drafter", "Match", "NgramDrafter", "NgramIndex", "Proposal", "StepTimes"]
