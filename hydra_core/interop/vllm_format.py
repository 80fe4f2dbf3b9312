"""The folder that carries draft heads into vLLM: written by `vllm_export`, read inside vLLM by `vllm_model`.

    FOLDER/config.json        what vLLM reads of a Medusa drafter, and under `KEY` what the heads are
    FOLDER/model.safetensors  the heads' tensors by their own names, `IDS`, `ROWS` and, where the base has one, `BIAS`

The vocabulary rows of the drafted tokens are written here. Those that vLLM holds may be quantised, packed for the processor or
shared out among devices; these few are not, so that every device drafts by itself. Embeddings are read from vLLM's own table,
which holds many more tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from hydra_core.errors import InputError
from hydra_core.heads.config import HeadsConfig

ARCHITECTURE = "HydraHeadsChain"
"""The architecture under which vLLM knows the class that drafts."""
KEY = "hydra_heads"
"""The part of config.json that is this project's. Its name must not hold `num`: vLLM renames such keys of a Medusa drafter."""
SCHEMA_VERSION = 1
IDS, ROWS, BIAS = "draft_vocab.ids", "draft_vocab.rows", "draft_vocab.bias"


@dataclass(frozen=True)
class ExportedHeads:
    """What the heads are. `base`: name and digest of the base; `vocab_size`: V of the base; `width`: D; `norm_eps`: of the
    base's norms; `bias`: whether the base's vocabulary projection has one."""

    heads: HeadsConfig
    base: dict[str, str]
    vocab_size: int
    width: int
    norm_eps: float
    bias: bool

    def to_config(self, dtype: str) -> dict[str, Any]:
        """The content of config.json. `dtype`: of the tensors, as torch names it."""
        return {
            "architectures": [ARCHITECTURE], "model_type": "medusa", "dtype": dtype,
            "hidden_size": self.width, "vocab_size": self.vocab_size, "truncated_vocab_size": self.heads.draft_vocab_size,
            "num_heads": self.heads.num_heads, "num_hidden_layers": self.heads.num_blocks,
            KEY: {"schema_version": SCHEMA_VERSION, **asdict(self), "heads": self.heads.model_dump()},
        }

    @classmethod
    def from_config(cls, values: object) -> ExportedHeads:
        """Read the part `KEY` of config.json. Raises InputError for another schema or for fields that are missing or wrong."""
        if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
            found = values.get("schema_version") if isinstance(values, dict) else None
            raise InputError(f"config.json: {KEY}: schema_version {found} is not {SCHEMA_VERSION}: export the heads again")
        fields = {name: value for name, value in values.items() if name != "schema_version"}
        try:
            return cls(**{**fields, "heads": HeadsConfig.model_validate(fields["heads"])})
        except (KeyError, TypeError, ValidationError) as error:
            raise InputError(f"config.json: {KEY}: {str(error).splitlines()[0]}: export the heads again") from None


def check_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise InputError unless the names and shapes of `found` are those of `wanted`. A missing tensor that nobody notices is a
    drafter that loads and accepts nothing."""
    if missing := sorted(wanted.keys() - found.keys()):
        raise InputError(f"model.safetensors: tensor {missing[0]} is missing ({len(missing)} in all): export the heads again")
    if extra := sorted(found.keys() - wanted.keys()):
        raise InputError(f"model.safetensors: unexpected tensor {extra[0]} ({len(extra)} in all): export the heads again")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise InputError(f"model.safetensors: tensor {name} has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}")
