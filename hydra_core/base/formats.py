"""Weight formats: which of them keep a checkpoint's own values, and where 4-bit codes come from.

The base's identity contains the format, so results of one format are never mistaken for those of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hydra_core.base.fused import FusedDecoder
from hydra_core.base.int4 import OUT_MULTIPLE, kernel_missing
from hydra_core.base.q4_1 import FILE, NAMES, Q4Matrix, load_codes, quantise
from hydra_core.base.resolve import weight_files
from hydra_core.errors import InputError
from hydra_core.kernels.ops import INT4_GROUP

LOSSY = "int4-lossy"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int4": torch.bfloat16, LOSSY: torch.bfloat16}
"""Weight format -> dtype of everything that is not packed."""
ROTARY = "inv_freq"  # tables in old checkpoints, not weights


def compute_dtype(dtype: str) -> torch.dtype:
    """The dtype that a weight format computes in. Raises InputError for an unknown format and for `auto`: stages resolve it."""
    if dtype not in DTYPES:
        raise InputError(f"base.dtype={dtype}: a base is loaded in one of {', '.join(DTYPES)}; "
                         "the stages that `hydra-heads` runs choose one of them for auto")
    return DTYPES[dtype]


def quantised_by(config: Any) -> str | None:
    """The method of a model that transformers itself loads quantised (awq, gptq, torchao, ...), or None."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "an unnamed method")


def own_formats(folder: Path, config: Any, device: str) -> tuple[str, ...]:
    """Formats that keep the values of the checkpoint in `folder`, on a `device` of kind cpu or cuda; the plainest first.

    A Q4_1 file: bf16, which rounds its values by 0.2 % at most, and int4 with its own codes. Other checkpoints: bf16 if all
    weights are stored in it, else fp32, which can hold fp16 too. A model that transformers loads quantised: bf16 for all
    other tensors. A format that would quantise is never returned.
    """
    if quantised_by(config) is not None:
        return ("bf16",)
    if (folder / FILE).exists():
        return ("bf16", "int4") if _why_not_packed(config, device) is None else ("bf16",)
    return ("bf16",) if _stored(folder) == {"BF16"} else ("fp32",)


def own_codes(folder: Path, config: Any, model: str, device: str, fused: bool, limit: int) -> Mapping[str, Q4Matrix]:
    """The 4-bit codes that the checkpoint of `model` in `folder` stores, by tensor name. Raises InputError if it stores none, or
    if there is no kernel to multiply them."""
    codes = load_codes(folder)
    if codes is None:
        raise InputError(f"base.dtype=int4: {model} is not stored in Q4_1, and quantising it would change its output: "
                         f"use bf16 or fp32, or {LOSSY} if its output may change")
    _check_packed("int4", config, device, fused, limit)
    return codes


def check_lossy(folder: Path, config: Any, model: str, device: str, fused: bool, limit: int) -> None:
    """Raise InputError if `model` cannot be quantised here, or is stored in 4 bits already."""
    if (folder / FILE).exists():
        raise InputError(f"base.dtype={LOSSY}: {model} is stored in 4 bits already: use int4, which keeps its own codes")
    _check_packed(LOSSY, config, device, fused, limit)


def quantise_layers(model: Any, asked: str) -> Mapping[str, Q4Matrix]:
    """Quantise the matrices of a float32 transformers model's layers in place, to the values of the codes that are returned.

    Returns transformers' tensor name -> codes. Raises InputError for a shape that the kernel does not support.
    """
    codes = {}
    for number, layer in enumerate(model.model.layers):
        for part in NAMES.values():
            weight, name = layer.get_submodule(part).weight, f"model.layers.{number}.{part}.weight"
            if weight.shape[1] % INT4_GROUP or weight.shape[0] % OUT_MULTIPLE:
                raise InputError(f"base.dtype={LOSSY}: {asked}: {name} is {weight.shape[0]} x {weight.shape[1]}, but "
                                 f"4 bits need a multiple of {OUT_MULTIPLE} rows and of {INT4_GROUP} columns: use bf16 or fp32")
            codes[name] = quantise(weight.detach())
            weight.data.copy_(codes[name].dequantise())
    return codes


def _check_packed(dtype: str, config: Any, device: str, fused: bool, limit: int) -> None:
    reason = _why_not_packed(config, device, limit) if fused else "asked not to fuse"
    if reason is not None:
        raise InputError(f"base.dtype={dtype}: the 4-bit kernel runs in the fused decoder on a CPU ({reason}): "
                         "use bf16 or fp32")


def _why_not_packed(config: Any, device: str, limit: int | None = None) -> str | None:
    """Why packed 4-bit matrices cannot be multiplied for this model on this kind of device, or None."""
    if device != "cpu":
        return f"the device is {device}"
    if (method := quantised_by(config)) is not None:
        return f"the model is quantised by {method}"
    return FusedDecoder.reason_unsupported(config, limit) or kernel_missing()


def _stored(folder: Path) -> set[str]:
    """safetensors' names of the dtypes of a checkpoint's weights. Only file headers are read."""
    found = set()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as handle:
            found |= {handle.get_slice(name).get_dtype() for name in handle.keys()  # noqa: SIM118
                      if not name.endswith(ROTARY)}
    return found
