"""What every section of the configuration is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Size = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of settings; a name it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
