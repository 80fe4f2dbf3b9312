"""Compiles the C++ sources of this folder once per machine, keeps the library, and loads it into the process."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock

from hydra_core.errors import InputError

log = logging.getLogger(__name__)
MAIN_SOURCE = "native.cpp"
"""The file that is compiled; it includes all the others."""
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-fPIC", "-shared", "-w")

LIMIT = "HYDRA_HEADS_INSTRUCTIONS"
"""Environment variable: the widest instructions that compiled kernels may use, one of `LIMITS`. Unset: all that the processor
has. It is there to run on a new machine what an older one runs."""
LIMITS = {"avx512": ("-mno-amx-tile", "-mno-amx-bf16"),
          "avx2": ("-mno-amx-tile", "-mno-amx-bf16", "-mno-avx512bf16", "-mno-avx512f"),
          "avx": ("-mno-amx-tile", "-mno-amx-bf16", "-mno-avx512bf16", "-mno-avx512f", "-mno-avx2")}
"""Limit -> what the compiler is told, as far as it knows these options: one that does not know an instruction makes none of it.
With avx the kernels of bfloat16 are left out, and PyTorch's are used."""


def instruction_limit() -> str | None:
    """The limit that `LIMIT` asks for, or None. Raises InputError for any other word."""
    asked = os.environ.get(LIMIT) or None
    if asked is not None and asked not in LIMITS:
        raise InputError(f"{LIMIT}={asked}: must be one of {', '.join(LIMITS)}, or unset")
    return asked


def library_folder() -> Path:
    """The folder of compiled libraries. It belongs to the machine, not to a storage, since a library runs on no other."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "hydra-heads"


def sources() -> tuple[Path, ...]:
    """All C++ files of this folder, by name."""
    folder = Path(__file__).parent
    return tuple(sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]))


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """A digest of all C++ sources and of the instructions that are turned off: one version of the library has another than the
    next."""
    parts = [*(path.read_text(encoding="utf-8") for path in sources()), *filter(None, [instruction_limit()])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def load_library() -> bool:
    """Load the library, after compiling it if needed; returns whether it is loaded. A failure is logged once."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        log.warning("there is no C++ compiler: decoding steps use PyTorch's operators, which are slower")
        return False
    try:
        torch.ops.load_library(  # type: ignore[no-untyped-call]
            str(_compiled(compiler, library_folder())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.warning("native.cpp cannot be compiled here (%s): decoding steps use PyTorch's operators, which are slower",
                    reason[0] if reason else type(error).__name__)
        return False
    return True


def _compiled(compiler: str, folder: Path) -> Path:
    """Path of the shared library in `folder`, compiled now if it is missing. Raises OSError or CalledProcessError."""
    from torch.utils.cpp_extension import include_paths, library_paths

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    limit = instruction_limit()
    flags = (*FLAGS, *(flag for flag in LIMITS[limit] if _accepts(compiler, flag))) if limit else FLAGS
    parts = [sources_digest(), torch.__version__, version, *flags, _processor()]
    target = folder / f"steps-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            log.info("compiling the C++ kernels for this machine, once; this takes about half a minute")
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                made = Path(temporary) / target.name
                subprocess.run(
                    [compiler, *flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                     *(f"-isystem{path}" for path in include_paths()), str(Path(__file__).with_name(MAIN_SOURCE)),
                     "-o", str(made),
                     *(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"],
                    capture_output=True, text=True, check=True)
                os.replace(made, target)
    return target


def _accepts(compiler: str, flag: str) -> bool:
    """Whether `compiler` knows the option `flag`; it reads an empty source and writes nothing."""
    asked = subprocess.run([compiler, flag, "-Werror", "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True)
    return asked.returncode == 0


def _processor() -> str:
    """The processor's features, on which the meaning of `-march=native` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
