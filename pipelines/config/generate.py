"""The settings of `generate`."""

from __future__ import annotations

from pydantic import Field

from pipelines.config.section import Section


class GenerateSection(Section):
    """Answers to a few prompts, here and now."""

    prompts: tuple[str, ...] = Field((), description="user turns, answered one after the other; none: standard input is one")
    model: str | None = Field(
        None, description="models:/NAME@alias, a folder, `bundled` or `plain`; default: champion, else the package's own heads")
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0)
    seed: int = 0
    threads: int | None = Field(None, ge=1, description="torch threads; default: torch's own choice")
