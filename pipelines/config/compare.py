"""The settings of `compare`."""

from __future__ import annotations

from pydantic import Field

from pipelines.config.section import Section


class CompareSection(Section):
    """Runs that MLflow recorded, side by side."""

    runs: tuple[str, ...] = Field(
        (), description="what is compared: names of runs (`name=`), MLflow run ids of stages, or of the runs that hold them")
    stage: str | None = Field(
        None, description="which of their stages is compared: bench, load, batch, ablate, train, tree, ...; default: the first "
                          "of these that all of them have finished")
    output: str | None = Field(
        None, description="folder for compare.html, compare.md and compare.json; default: one under `storage`/comparisons")
