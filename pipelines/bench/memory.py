"""Peak memory of the part of `bench` that decodes single requests."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from pipelines.runtime.files import write_text


class PeakMemory:
    """Peak bytes, kept in a file that a resumed run updates.

    All contenders share one process and one copy of the base, so resident memory is one number for all of them. On a GPU the
    peak allocation while each contender decodes is a number of its own, which includes what the others hold.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.peaks = read_memory(path)
        with suppress(OSError):  # resets the peak: a Ray worker may have done other work before
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    @contextmanager
    def of(self, method: str) -> Iterator[None]:
        """Record the peak GPU allocation while `method` decodes."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        known = self.peaks.setdefault("cuda_peak_bytes", {})
        known[method] = max(known.get(method, 0), torch.cuda.max_memory_allocated(self.device))

    def write(self) -> None:
        resident = max(self.peaks.get("resident_peak_bytes", 0), _resident_peak())
        write_text(self.path, json.dumps(self.peaks | {"resident_peak_bytes": resident}))


def read_memory(path: Path) -> dict[str, Any]:
    """What `PeakMemory` wrote: `resident_peak_bytes`, and on a GPU `cuda_peak_bytes` by contender; empty without a file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def memory_markdown(memory: dict[str, Any]) -> str:
    """A section of the report, or nothing where memory was not measured."""
    if not memory:
        return ""
    lines = [f"Peak resident memory: {memory['resident_peak_bytes'] / 2**30:.2f} GiB, for the one process and the one copy of "
             "the base that all contenders share, vLLM's apart."]
    lines += [f"Peak GPU memory while {method} decoded, including what the others hold: {peak / 2**30:.2f} GiB."
              for method, peak in memory.get("cuda_peak_bytes", {}).items()]
    return "\n" + "\n\n".join(lines) + "\n"


def _resident_peak() -> int:
    """Bytes since the last reset where the system reports it, else since the process began."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
