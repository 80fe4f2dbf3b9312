"""`native.cpp` with its headers, compiled once for a machine, kept, and loaded into the process."""

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

log = logging.getLogger(__name__)
MAIN_SOURCE = "native.cpp"
"""The file that is compiled; it includes all the others."""
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-fPIC", "-shared", "-w")


def library_folder() -> Path:
    """Where compiled libraries are kept: with the machine rather than with any storage, since they fit no other."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "hydra-heads"


def sources() -> tuple[Path, ...]:
    """All C++ files of this folder, by name."""
    folder = Path(__file__).parent
    return tuple(sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]))


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """A digest of all C++ sources: one version of the library has another than the next."""
    return hashlib.sha256("\0".join(path.read_text(encoding="utf-8") for path in sources()).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def load_library() -> bool:
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
    parts = [sources_digest(), torch.__version__, version, *FLAGS, _processor()]
    target = folder / f"steps-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            log.info("compiling the decoder's step for this machine, once: half a minute")
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                made = Path(temporary) / target.name
                subprocess.run(
                    [compiler, *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                     *(f"-isystem{path}" for path in include_paths()), str(Path(__file__).with_name(MAIN_SOURCE)),
                     "-o", str(made),
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
