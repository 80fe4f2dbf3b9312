"""Draft heads that are bundled with the package, one configuration folder per base: speculation without training.

    bundled/NAME/configuration.json, heads/    as `hydra_core.decoding.configuration` reads them, for any weight format
    bundled/NAME/recipe.yaml                   the run that made them: `hydra-heads distill|train|tree --config recipe.yaml`
    bundled/NAME/recipe-1.yaml, ...            the runs whose heads that run continued from
    bundled/NAME/curve.json                    metrics on held-out rows during the training
"""

from __future__ import annotations

import json
from pathlib import Path

BUNDLED = "shipped"
"""Stands for the bundled folder of the base wherever heads or a configuration may be named."""
FOLDER = Path(__file__).parent


def bundled_configuration(digest: str) -> Path | None:
    """The configuration folder for the base with this digest, or None."""
    for folder in sorted(path.parent for path in FOLDER.glob("*/configuration.json")):
        if json.loads((folder / "configuration.json").read_text(encoding="utf-8"))["base"]["digest"] == digest:
            return folder
    return None
