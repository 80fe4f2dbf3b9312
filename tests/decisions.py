"""What `promote` decides by figures alone, as a pair that is short to compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.config import PromoteSection
from pipelines.promote.decision import decide


def choose_winner(methods: Mapping[str, Any], min_gain: float, proof: str = "fp32") -> tuple[str, str]:
    """The winner and the reason, where nothing is champion yet."""
    decision = decide(methods, PromoteSection(min_gain=min_gain), proof=proof)
    return decision.winner, decision.why
