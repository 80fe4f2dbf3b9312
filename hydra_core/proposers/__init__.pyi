from .base import Accepted, Proposal, Proposer, StepTimes
from .draft_model import DraftModel
from .drafter import Context, DrafterKind
from .growing import Growth
from .ngram import Match, NgramDrafter, NgramIndex
from .registry import kind_of, lookahead_slots, open_proposer
from .settings import AdaptiveDrafter, Drafter
from .suffix import SuffixDrafter

__all__ = ["Accepted", "AdaptiveDrafter", "Context", "DraftModel", "Drafter", "DrafterKind", "Growth", "Match", "NgramDrafter",
           "NgramIndex", "Proposal", "Proposer", "StepTimes", "SuffixDrafter", "kind_of", "lookahead_slots", "open_proposer"]
