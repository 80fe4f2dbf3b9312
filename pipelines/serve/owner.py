"""An application that a command has started ends with that command, also where it is killed: nobody else would stop it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import ray
from ray import serve

OWNER_SECONDS = 10.0
"""Between two questions whether the owner lives."""
POLL_SECONDS = 0.5
log = logging.getLogger("ray.serve")


def this_job() -> str:
    """Ray's id of the connected driver, as an owner."""
    return str(ray.get_runtime_context().get_job_id())


def has_ended(job: str) -> bool:
    """Whether the driver `job` has ended, however; False where the cluster does not say."""
    try:
        known = ray._private.worker.global_worker.gcs_client.get_all_job_info(
            job_or_submission_id=job, skip_submission_job_info_field=True, skip_is_running_tasks_field=True,
            timeout=OWNER_SECONDS)
    except Exception as error:  # the head node is away: it may come back with this application
        log.warning(f"nobody says whether the owner of this application lives: {error}")
        return False
    return all(found.is_dead for found in known.values())  # Ray forgets old jobs, and none that lives


async def end_with(job: str, app_name: str, close: Callable[[], int], seconds: float) -> None:
    """Wait until the driver `job` has ended; then accept nothing more, finish what was accepted, for at most `seconds`, and
    delete the application. It runs in the front of the application itself.

    `close`: stops accepting and returns the answers in flight.
    """
    while not await asyncio.to_thread(has_ended, job):
        await asyncio.sleep(OWNER_SECONDS)
    log.warning(f"the command that started {app_name} has ended: the application ends too")
    end = time.monotonic() + seconds
    while close() and time.monotonic() < end:
        await asyncio.sleep(POLL_SECONDS)
    serve.delete(app_name, _blocking=False)
