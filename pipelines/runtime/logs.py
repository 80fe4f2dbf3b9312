"""Log lines of Ray's worker processes. Every worker of a local Ray imports this module as it starts, so it imports little."""

import logging
import sys

_CLEANER = "ray.train.v2._internal.execution.controller.placement_group_cleaner"


def quieten_worker() -> None:
    """Silence Ray Train's cleaner of placement groups. It asks the dashboard every second whether the controller lives, and a
    local Ray has no dashboard: each time it would log that."""
    logging.getLogger(_CLEANER).setLevel(logging.ERROR)


def speak() -> None:
    """Show the log lines of `hydra_core` on stderr: the memory that it takes and how a base runs."""
    logger = logging.getLogger("hydra_core")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
