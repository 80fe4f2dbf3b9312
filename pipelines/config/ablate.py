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


class Distribution(Section):
    """What the values of a setting are drawn from: one of these."""

    choice: tuple[bool | int | float | str, ...] | None = Field(None, min_length=1, description="one of these values")
    uniform: tuple[float, float] | None = Field(None, description="[lowest, highest], all equally likely")
    loguniform: tuple[float, float] | None = Field(None, description="[lowest, highest], logarithms equally likely")
    randint: tuple[int, int] | None = Field(None, description="[lowest, highest] whole number, all equally likely")

    @model_validator(mode="after")
    def _is_one(self) -> Distribution:
        given = {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}, got {', '.join(given) or 'none'}")
        (name, value), = given.items()
        if name != "choice" and not value[0] < value[1]:
            raise ValueError(f"{name}: [{value[0]:g}, {value[1]:g}]: the first must be less than the second")
        if name == "loguniform" and value[0] <= 0:
            raise ValueError(f"loguniform: {value[0]:g} has no logarithm: begin above 0")
        return self


class AblateSection(Section):
    """Several trainings on the same rows, which show what each choice is worth: named variants, or a search."""

    variants: dict[str, Variant] = Field(default_factory=dict, description="name -> how to train")
    studies: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="question -> the variants that answer it; the others are compared with the first")
    space: dict[str, Distribution] = Field(
        default_factory=dict, description="setting of `train` (`train.lr`) -> what its values are drawn from: a search, in place "
                                          "of variants")
    trials: int = Field(16, ge=2, description="trainings of a search; the first one has the settings as they are given")
    seed: int = Field(0, description="of the values that are drawn")
    reduction: float = Field(3.0, gt=1, description="of so many trials that have come as far one goes on; the next comparison "
                                                    "comes after so many times the rows")
    least_steps: int | None = Field(None, ge=1, description="steps of a trial before it may be stopped; default: "
                                                            "train.validate_every")
    best_seeds: int = Field(3, ge=0, description="trainings of the best trial's settings with other seeds, for its spread")

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
        if self.space and self.variants:
            raise ValueError("ablate.space and ablate.variants are two kinds of ablation: give one of them")
        for question, names in self.studies.items():
            if len(names) < 2:
                raise ValueError(f"ablate.studies: {question!r}: needs two variants or more")
            if unknown := [name for name in names if name not in self.variants]:
                raise ValueError(f"ablate.studies: {question!r}: {unknown[0]!r} is none of ablate.variants")
        return self
