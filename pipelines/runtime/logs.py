"""What Ray's worker processes say. It must import next to nothing: every worker of a local Ray runs it as it starts."""

import logging
import sys

_CLEANER = "ray.train.v2._internal.execution.controller.placement_group_cleaner"


def quieten_worker() -> None:
    """Ray Train's cleaner asks the dashboard whether its controller lives, and a local Ray is started without one:
    every second it would tell of that in the middle of our progress."""
    logging.getLogger(_CLEANER).setLevel(logging.ERROR)


def speak() -> None:
    """Let `hydra_core` say on stderr what memory it is about to take and how a base will run, one line each."""
    logger = logging.getLogger("hydra_core")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
