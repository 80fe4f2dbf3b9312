from .base import Accepted, Proposal, Proposer, StepTimes
from .ngram import Match, NgramDrafter, NgramIndex
from .registry import lookahead_slots, open_proposer
from .settings import AdaptiveDrafter, Drafter
from .suffix import SuffixDrafter

__all__ = ["Accepted", "AdaptiveDrafter", "Drafter", "Match", "NgramDrafter", "NgramIndex", "Proposal", "Proposer", "StepTimes",
           "SuffixDrafter", "lookahead_slots", "open_proposer"]
