"""The settings of `datacard`."""

from __future__ import annotations

from pydantic import Field

from pipelines.config.section import Section


class DatacardSection(Section):
    """What this run's rows are: lengths, languages, sources, tasks, and how well heads draft each."""

    task_fields: tuple[str, ...] = Field(
        ("task", "category"), description="columns of prompts that name a task; the first one that a row has counts")
    acceptance_rows: int = Field(512, ge=0, description="held-out rows whose acceptance is measured with heads that are trained; "
                                                        "0: none")
    language_prompts: int = Field(5000, ge=0, description="prompts whose language is detected (`pip install "
                                                          "'hydra-heads[datacard]'`); 0: none")
    groups: int = Field(24, ge=1, description="sources, and tasks, that the page lists: those with the most prompts")
