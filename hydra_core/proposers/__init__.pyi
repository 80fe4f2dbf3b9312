from .base import Accepted, Proposal, Proposer, StepTimes
from .drafter import Context, DrafterKind
from .ngram import Match, NgramDrafter, NgramIndex
from .registry import kind_of, lookahead_slots, open_proposer
from .settings import AdaptiveDrafter, Drafter
from .suffix import SuffixDrafter

__all__ = ["Accepted", "AdaptiveDrafter", "Context", "Drafter", "DrafterKind", "Match", "NgramDrafter",
           "NgramIndex", "Proposal", "Proposer", "StepTimes", "SuffixDrafter", "kind_of", "lookahead_slots", "open_proposer"]
