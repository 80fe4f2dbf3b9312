"""What every worker of a local Ray runs as it starts. It must import next to nothing."""

import logging

_CLEANER = "ray.train.v2._internal.execution.controller.placement_group_cleaner"


def quieten_worker() -> None:
    """Ray Train's cleaner asks the dashboard whether its controller lives, and a local Ray is started without one:
    every second it would tell of that in the middle of our progress."""
    logging.getLogger(_CLEANER).setLevel(logging.ERROR)
