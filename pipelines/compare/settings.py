"""The settings in which runs differ, stage by stage, as each stage recorded them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipelines.bench.plan import contender
from pipelines.compare.lineage import StageRun
from pipelines.compare.records import SettingRow

SECTIONS = {"distill": ("prompts", "distill", "base"), "train": ("train", "base"), "tree": ("tree", "base"),
            "bench": ("bench", "ngram", "draft_model", "base"), "ablate": ("ablate", "train", "base"),
            "load": ("load", "serve", "base"), "batch": ("batch", "serve", "base"), "promote": ("promote",)}
"""Stage -> the sections that it reads. Another stage reads its own, `train` and `base`."""
PLACES = {"batch.output", "train.only", "train.dry_run"}
"""Settings that say where something goes or which part runs, and nothing about how."""
INPUTS = {"distill": "prompts", "bench": "prompts", "batch": "input"}
"""Stage -> the input that no earlier stage has made."""
ANY_DRAFTER = "DRAFTER"
"""Stands for a drafter's own name in the name of a setting, so that two drafters can be compared."""
WHOLE = "(the whole stage)"


def setting_rows(runs: Sequence[Sequence[StageRun]]) -> tuple[SettingRow, ...]:
    """The settings that differ between `runs`, of each of which all stages are given.

    A stage that has several runs, one for each drafter, is compared drafter by drafter. Rows that say the same of several stages
    become one. A stage that some runs lack is one row.
    """
    several = {one.stage for stages in runs for one in stages if sum(other.stage == one.stage for other in stages) > 1}
    keyed = [{f"{one.stage} {one.part}" if one.stage in several and one.part else one.stage: one for one in stages}
             for stages in runs]
    rows: dict[tuple[str, tuple[str | None, ...]], list[str]] = {}
    for key in dict.fromkeys(key for stages in keyed for key in stages):
        present = [stages.get(key) for stages in keyed]
        if None in present:
            rows.setdefault((WHOLE, tuple(None if one is None else "yes" for one in present)), []).append(key)
            continue
        settings = [own_settings(one) for one in present if one is not None]
        for name in sorted({name for found in settings for name in found}):
            values = tuple(found.get(name) for found in settings)
            if len(set(values)) > 1:
                rows.setdefault((name, values), []).append(key)
    return tuple(SettingRow(tuple(stages), name, values) for (name, values), stages in rows.items())


def own_settings(one: StageRun) -> dict[str, str]:
    """What a stage reads of the configuration that it recorded, and the digest of what was brought from outside."""
    sections = SECTIONS.get(one.stage, (one.stage, "train", "base"))
    found = {}
    for name, value in one.params.items():
        if name.split(".")[0] not in sections or name in PLACES:
            continue
        if one.part is not None and (inner := re.match(r"train\.(drafters|start)\.", name)):
            own = f"{inner.group()}{one.part}"
            if name != own and not name.startswith(f"{own}."):
                continue
            name = name.replace(own, f"{inner.group()}{ANY_DRAFTER}", 1)
        found[name] = contender(value)
    if one.run is not None and found.get("bench.prompts", "") != "None":
        found |= {f"content of {INPUTS[one.stage]}": given.digest[:8] for given in one.run.inputs
                  if given.name == INPUTS.get(one.stage)}
    return found
