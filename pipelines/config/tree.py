"""The settings of `tree`, of prompt lookup and of a draft model."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from pipelines.config.section import Section, Size


class TreeSection(Section):
    """The draft tree that pays best on this machine."""

    batch_sizes: tuple[Size, ...] = Field((1, 4, 16, 64), min_length=1, description="batch sizes that get a tree of their own")
    node_counts: tuple[Size, ...] = Field((1, 2, 3, 4, 6, 8, 9, 12, 16, 24, 32, 48), min_length=1,
                                          description="tree sizes to time, root included")
    context: int = Field(256, ge=1, description="committed tokens of each sequence while timing")
    far_contexts: tuple[Size, ...] = Field((2048,), description="longer contexts, at which a few sizes are timed")
    repeats: int = Field(5, ge=3, description="rounds of timing; the lower quartile counts")
    curves: bool = Field(False, description="also time steps up to the base's longest context; gives a table and a figure")
    threads: int = Field(2, ge=1, description="torch threads")
    max_rows: int = Field(128, ge=1, description="held-out rows on which trees are evaluated")
    draft_vocab_sizes: tuple[Size, ...] = Field(
        (), description="smaller draft vocabularies to try with the same heads; the size with the most tokens a second at "
                        "the smallest batch is kept")


class NgramSection(Section):
    """Prompt lookup: drafts are copied from where the last tokens occurred before. Needs no training."""

    max_match: int = Field(3, ge=1, description="longest match to look for, in tokens")
    min_match: int = Field(2, ge=1, description="shortest match to draft after, in tokens")
    length: int = Field(15, ge=1, description="most tokens drafted after a match; fewer where they do not pay")

    @model_validator(mode="after")
    def _shortest_first(self) -> NgramSection:
        if self.min_match > self.max_match:
            raise ValueError(f"ngram.min_match={self.min_match} is more than ngram.max_match={self.max_match}")
        return self


class DraftModelSection(Section):
    """A separate draft model: any small model with the base's tokenizer. Needs no training."""

    model: str | None = Field(None, description="the draft model, as base.model names one; default: none")
    depth: int = Field(5, ge=1, le=32, description="most tokens ahead: so many forwards of the draft model a step")
    beam: int = Field(3, ge=1, description="nodes of one depth below which it drafts; 1 with width=1: a chain")
    width: int = Field(4, ge=1, description="candidates below a node")
    nodes: int = Field(12, ge=1, le=63, description="candidates that are verified, the most probable ones")
    floor: float = Field(0.05, ge=0, lt=1, description="where no path is as probable, it drafts no further; 0: to the full depth")

    def values(self) -> dict[str, Any] | None:
        """Plain values for `DraftModelSettings.of`, or None without a model."""
        return None if self.model is None else self.model_dump()
