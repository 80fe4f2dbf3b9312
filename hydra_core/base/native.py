"""`native.cpp`, compiled once for a machine and kept: decoding steps and draft heads without Python between their operations.

A step of a small model is some thousand operations of a few microseconds each, and Python takes as long between them. Where
there is no C++ compiler the same steps run through PyTorch's operators, with one log line.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from hydra_core.base.int4 import MOST_ROWS
from hydra_core.base.linear import FrozenLinear
from hydra_core.base.q4_1 import GROUP

if TYPE_CHECKING:
    from hydra_core.base.fused import LayerWeights

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-std=c++20", "-fPIC", "-shared", "-w")
WIDEST_HEAD = 512
"""As in the source."""
MOST_TOKENS = 256
"""Tokens of all rows together that a native step takes: its own loops run on one core, PyTorch's on all of them."""


def native_decoder(layers: Sequence[LayerWeights], heads: int, kv_heads: int, width: int, eps: float) -> Any | None:
    """The layers as an object with the C++ `run`, or None where it cannot be had: off the CPU, in float64, without a
    compiler."""
    weight = layers[0].input_norm
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or width > WIDEST_HEAD or not _load():
        return None
    head_eps = next((layer.head_norms.eps for layer in layers if layer.head_norms), eps)
    made = torch.classes.hydra_heads.Decoder(heads, kv_heads, width, eps, head_eps)
    for layer in layers:
        norms = layer.head_norms
        matrices = [layer.qkv, layer.output, layer.gate_up, layer.down]
        made.add([layer.input_norm, layer.mlp_norm, norms.query if norms else None, norms.key if norms else None],
                 [_parts(matrix) for matrix in matrices], [int(matrix.packed) for matrix in matrices], MOST_ROWS, GROUP)
    return made


def native_head(blocks: Sequence[Sequence[FrozenLinear]], widens: Sequence[bool], norm: Tensor | None, eps: float,
                rows: FrozenLinear, scale: float, softcap: float | None) -> Any | None:
    """A draft head as an object with the C++ `logits` and `likeliest`, or None where it cannot be had: in another dtype than
    bfloat16, off the CPU, without a compiler.

    `blocks`: the one or two matrices of each, as the source has them; `widens`: whether its input is wider than its output;
    `norm`: [D] that ends the head; `rows`: the base's vocabulary projection, with its `scale` and `softcap`.
    """
    first = blocks[0][0]
    if first.weight.device.type != "cpu" or first.weight.dtype != torch.bfloat16 or not _load():
        return None
    made = torch.classes.hydra_heads.Head(None if norm is None else norm.float().contiguous(), eps, scale, softcap or 0.0)
    for matrices, widened in zip(blocks, widens, strict=True):
        made.add([_parts(matrix) for matrix in matrices], [int(matrix.packed) for matrix in matrices], widened, MOST_ROWS, GROUP)
    made.end(_parts(rows), int(rows.packed), MOST_ROWS, GROUP)
    return made


def _parts(matrix: FrozenLinear) -> list[Tensor | None]:
    few = matrix.few
    return [matrix.weight, matrix.bias, few.packed if few else None, few.scales if few else None]


def library_folder() -> Path:
    """Where compiled libraries are kept: with the machine rather than with any storage, since they fit no other."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "hydra-heads"


@lru_cache(maxsize=1)
def _load() -> bool:
    """Whether the library is in this process, compiled now if nobody has yet."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        log.warning("no C++ compiler: decoding steps run through PyTorch's operators, which is slower")
        return False
    try:
        torch.ops.load_library(str(_compiled(compiler, library_folder())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.warning("native.cpp: not to be had here (%s): decoding steps run through PyTorch's operators, which is slower",
                    reason[0] if reason else type(error).__name__)
        return False
    return True


def _compiled(compiler: str, folder: Path) -> Path:
    """The shared library, from `folder` or compiled into it. Raises OSError or CalledProcessError."""
    from torch.utils.cpp_extension import include_paths, library_paths

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([SOURCE.read_text(encoding="utf-8"), torch.__version__, version, *FLAGS, _processor()])
                         .encode()).hexdigest()[:16]
    target = folder / f"steps-{key}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            log.info("compiling the decoder's step for this machine, once: half a minute")
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                made = Path(temporary) / target.name
                subprocess.run(
                    [compiler, *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                     *(f"-isystem{path}" for path in include_paths()), str(SOURCE), "-o", str(made),
                     *(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"],
                    capture_output=True, text=True, check=True)
                os.replace(made, target)
    return target


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
