"""The languages of prompts, by py3langid (the extra `datacard`): 97 languages, by byte n-grams (Lui and Baldwin 2012)."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

LEAST_LETTERS = 20
"""Letters below which a detector of n-grams guesses."""
SHORT = "too short to tell"


def can_detect() -> bool:
    """Whether the detector is installed."""
    return importlib.util.find_spec("py3langid") is not None


def languages_of(texts: Iterable[str]) -> dict[str, int]:
    """ISO 639-1 code -> number of texts, most frequent first."""
    import py3langid

    found: Counter[str] = Counter()
    for text in texts:
        letters = sum(map(str.isalpha, text))
        found[py3langid.classify(text)[0] if letters >= LEAST_LETTERS else SHORT] += 1
    return dict(found.most_common())


def text_of(prompt: str | None, messages: str | None) -> str:
    """What the user wrote, of a prompt row's columns: the raw prompt, or the last user turn of the chat."""
    if messages is None:
        return prompt or ""
    turns: list[dict[str, Any]] = json.loads(messages)
    content = next((turn.get("content") for turn in reversed(turns) if turn.get("role") == "user"), "")
    if isinstance(content, list):  # parts of a message
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")
