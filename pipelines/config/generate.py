"""The settings of `generate`."""

from __future__ import annotations

from pydantic import Field

from pipelines.config.section import Section


class GenerateSection(Section):
    """Answers to a few prompts, in this process."""

    prompts: tuple[str, ...] = Field((), description="user turns, answered one after the other; none: standard input")
    model: str | None = Field(
        None, description="models:/NAME@alias, a folder, `bundled` or `plain`; default: champion, else the bundled heads")
    max_new_tokens: int = Field(256, ge=1, description="length limit of an answer, in tokens")
    temperature: float = Field(0.0, ge=0, description="sampling temperature; 0: greedy")
    seed: int = Field(0, description="of sampled answers")
    threads: int | None = Field(None, ge=1, description="torch threads; default: torch's own choice")
