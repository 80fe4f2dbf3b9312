"""The settings of `ablate`."""

from __future__ import annotations

import re

from pydantic import Field, model_validator

from hydra_core.heads import HeadsConfig
from pipelines.config.section import Section


def folder_name(variant: str) -> str:
    """`variant` as a name of a folder and of a drafter."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", variant)


class Variant(Section):
    """One way to train heads, trained once for each seed."""

    heads: HeadsConfig
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="one training for each, with `train.seed` set to it")
    share: float | None = Field(None, gt=0, le=1, description="share of the training rows; default: train.share")
    epochs: float | None = Field(None, gt=0, description="passes over those rows; default: train.epochs")


class AblateSection(Section):
    """Several trainings on the same rows, which show what each choice is worth."""

    variants: dict[str, Variant] = Field(default_factory=dict, description="name -> how to train")
    studies: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="question -> the variants that answer it; the others are compared with the first")

    @model_validator(mode="after")
    def _names_differ_as_folders(self) -> AblateSection:
        folders = [folder_name(name) for name in self.variants]
        if twice := [name for name, folder in zip(self.variants, folders, strict=True) if folders.count(folder) > 1]:
            raise ValueError(f"ablate.variants: {twice[0]!r} and {twice[1]!r} give the same folder name")
        if wrong := [name for name in self.variants if not name[:1].isalnum()]:
            raise ValueError(f"ablate.variants: {wrong[0]!r}: must begin with a letter or digit")
        return self

    @model_validator(mode="after")
    def _studies_are_of_variants(self) -> AblateSection:
        for question, names in self.studies.items():
            if len(names) < 2:
                raise ValueError(f"ablate.studies: {question!r}: needs two variants or more")
            if unknown := [name for name in names if name not in self.variants]:
                raise ValueError(f"ablate.studies: {question!r}: {unknown[0]!r} is none of ablate.variants")
        return self
