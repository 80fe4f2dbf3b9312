"""Weight formats: which of them hold a checkpoint's own values, and the 4-bit codes of those that are packed.

A format is named in the base's identity, so that what was made in one is never taken for another's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hydra_core.base.fused import FusedDecoder
from hydra_core.base.int4 import OUT_MULTIPLE, kernel_missing
from hydra_core.base.q4_1 import FILE, GROUP, NAMES, Q4Matrix, load_codes, quantise
from hydra_core.errors import InputError

LOSSY = "int4-lossy"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int4": torch.bfloat16, LOSSY: torch.bfloat16}
"""Weight format -> dtype of everything that is not packed."""
ROTARY = "inv_freq"  # tables that old checkpoints carry along: no weights


def compute_dtype(dtype: str) -> torch.dtype:
    """What a weight format computes in. Raises InputError for one that is none, `auto` among them: a choice for stages."""
    if dtype not in DTYPES:
        raise InputError(f"base.dtype={dtype}: a base is loaded in one of {', '.join(DTYPES)}; "
                         "auto is chosen by the stages that `hydra-heads` runs")
    return DTYPES[dtype]


def quantised_by(config: Any) -> str | None:
    """The method by which transformers itself will load a quantised model (awq, gptq, torchao, ...), or None."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "an unnamed method")


def own_formats(folder: Path, config: Any, device: str) -> tuple[str, ...]:
    """Formats that hold the values of the checkpoint in `folder`, on a `device` of kind cpu or cuda; the plainest first.

    A Q4_1 file: bf16 (its values rounded, by 0.2 % at most) and its own codes. Anything else: bf16 if all of it is stored
    so, else fp32, which holds fp16 too. What transformers unpacks itself: bf16 around it. Never a format that would
    quantise.
    """
    if quantised_by(config) is not None:
        return ("bf16",)
    if (folder / FILE).exists():
        return ("bf16", "int4") if _why_not_packed(config, device) is None else ("bf16",)
    return ("bf16",) if _stored(folder) == {"BF16"} else ("fp32",)


def own_codes(folder: Path, config: Any, model: str, device: str, fused: bool) -> Mapping[str, Q4Matrix]:
    """The codes that the checkpoint of `model` in `folder` is stored in. Raises InputError where there are none, or
    nothing to multiply them."""
    codes = load_codes(folder)
    if codes is None:
        raise InputError(f"base.dtype=int4: {model} is not stored in Q4_1, and quantising it would change its output: "
                         f"use bf16 or fp32, or {LOSSY} if that may be")
    _check_packed("int4", config, device, fused)
    return codes


def check_lossy(folder: Path, config: Any, model: str, device: str, fused: bool) -> None:
    """Raise InputError unless `model` can be, and needs to be, quantised here."""
    if (folder / FILE).exists():
        raise InputError(f"base.dtype={LOSSY}: {model} is stored in 4 bits already: use int4, which keeps its own codes")
    _check_packed(LOSSY, config, device, fused)


def quantise_layers(model: Any, asked: str) -> Mapping[str, Q4Matrix]:
    """Quantise the matrices of a float32 transformers model's layers, in place: what it holds then is what the codes say.

    transformers' tensor name -> codes. Raises InputError for a shape that the kernel does not take.
    """
    codes = {}
    for number, layer in enumerate(model.model.layers):
        for part in NAMES.values():
            weight, name = layer.get_submodule(part).weight, f"model.layers.{number}.{part}.weight"
            if weight.shape[1] % GROUP or weight.shape[0] % OUT_MULTIPLE:
                raise InputError(f"base.dtype={LOSSY}: {asked}: {name} is {weight.shape[0]} x {weight.shape[1]}, which is "
                                 f"not cut into {OUT_MULTIPLE} rows and groups of {GROUP}: use bf16 or fp32")
            codes[name] = quantise(weight.detach())
            weight.data.copy_(codes[name].dequantise())
    return codes


def _check_packed(dtype: str, config: Any, device: str, fused: bool) -> None:
    reason = _why_not_packed(config, device) if fused else "asked not to fuse"
    if reason is not None:
        raise InputError(f"base.dtype={dtype}: the 4-bit kernel runs in the fused decoder on a CPU ({reason}): "
                         "use bf16 or fp32")


def _why_not_packed(config: Any, device: str) -> str | None:
    """Why packed 4-bit matrices cannot be multiplied, or None."""
    if device != "cpu":
        return f"the device is {device}"
    if (method := quantised_by(config)) is not None:
        return f"the model is quantised by {method}"
    return FusedDecoder.reason_unsupported(config) or kernel_missing()


def _stored(folder: Path) -> set[str]:
    """safetensors' names of the dtypes that the checkpoint's weights are stored in; headers alone are read."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            found |= {handle.get_slice(name).get_dtype() for name in handle.keys()  # noqa: SIM118
                      if not name.endswith(ROTARY)}
    return found
