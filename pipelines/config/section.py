"""The class of every section of the configuration."""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

log = logging.getLogger(__name__)
Size = Annotated[int, Field(ge=1)]
HIDDEN = "(hidden)"
"""Stands for a secret in what is written beside outputs."""
_told: set[tuple[str, str]] = set()


class Section(BaseModel):
    """A frozen group of settings; an unknown name is an error.

    `renamed`: earlier name of a setting -> its present name. The earlier one is still read, with one warning per process.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_names(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not cls.renamed.keys() & values.keys():
            return values
        values = dict(values)
        for earlier, now in cls.renamed.items():
            if earlier not in values:
                continue
            if now in values:
                raise ValueError(f"{earlier} is the earlier name of {now}: give one of them")
            values[now] = values.pop(earlier)
            if (cls.__name__, earlier) not in _told:
                _told.add((cls.__name__, earlier))
                log.warning("%s: the setting `%s` is called `%s` now", cls.__name__.removesuffix("Section").lower(), earlier, now)
        return values
