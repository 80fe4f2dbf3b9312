"""Draft heads that are bundled with the package, one configuration folder per base: speculation without training.

    bundled/NAME/configuration.json, heads/    as `hydra_core.decoding.configuration` reads them, for any weight format
    bundled/NAME/recipe.yaml                   the run that made them: `hydra-heads distill|train|tree --config recipe.yaml`
    bundled/NAME/recipe-1.yaml, ...            the runs whose heads that run continued from
    bundled/NAME/curve.json                    metrics on held-out rows during the training
"""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path

BUNDLED = "bundled"
"""Stands for such a folder wherever heads or a configuration may be named."""
EARLIER = "shipped"
"""The earlier word for the same. It is still read, with one warning a process."""
FOLDER = Path(__file__).parent
log = logging.getLogger(__name__)


def is_bundled(name: object) -> bool:
    """Whether `name`, given where heads or a configuration may be named, stands for the package's own heads."""
    if name == EARLIER:
        _warn_once()
    return name in (BUNDLED, EARLIER)


@cache
def _warn_once() -> None:
    log.warning("`%s` is called `%s` now", EARLIER, BUNDLED)


def bundled_configuration(digest: str) -> Path | None:
    """The configuration folder for the base with this digest, or None."""
    for folder in sorted(path.parent for path in FOLDER.glob("*/configuration.json")):
        if json.loads((folder / "configuration.json").read_text(encoding="utf-8"))["base"]["digest"] == digest:
            return folder
    return None
