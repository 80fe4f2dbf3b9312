"""The tags that every run has: code, versions, machine, user. They have MLflow's own names where there is one, as its pages show
those."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

from pipelines.config import RunConfig
from pipelines.runtime.commit import this_commit
from pipelines.runtime.hardware import Hardware, this_hardware
from pipelines.runtime.provenance import versions, without_credentials

CHANGED = {True: "yes", False: "no", None: "unknown"}
"""Whether the code differs from the commit."""


def run_tags(config: RunConfig) -> dict[str, str]:
    """Tag -> value, for the run of a stage with these settings in this process."""
    git = this_commit() or {"commit": "unknown", "changed": None}
    job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # set in the driver of `ray job submit`
    tags = {"hydra_heads.commit": str(git["commit"]), "hydra_heads.changed": CHANGED[git["changed"]],
            "hydra_heads.base": without_credentials(config.base.model), "hydra_heads.base_format": config.base.dtype,
            "mlflow.user": user_name(), "mlflow.source.name": _command(), "mlflow.source.type": "JOB" if job else "LOCAL"}
    if git["commit"] != "unknown":
        tags["mlflow.source.git.commit"] = str(git["commit"])
    tags |= {f"hydra_heads.version.{package}": version for package, version in versions().items() if version}
    return tags | hardware_tags(this_hardware())


def hardware_tags(machine: Hardware) -> dict[str, str]:
    """The tags that name the machine: of this process, or in place of that one of the worker that measured."""
    return {"hydra_heads.hardware": machine.label, "hydra_heads.hardware_digest": machine.digest}


def user_name() -> str:
    """The user that this process runs as."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user-{os.getuid()}"


def _command() -> str:
    """The program and its first word, as `hydra-heads train`; of a module its name, as `python -m jobs.train`."""
    program = Path(sys.argv[0] or "python")
    words = [program.name, *(word for word in sys.argv[1:2] if word.isidentifier())]
    return f"python -m {program.parent.name}.{program.stem}" if program.suffix == ".py" else " ".join(words)
