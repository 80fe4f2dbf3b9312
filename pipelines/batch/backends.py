"""The choice of a backend for `batch`: the deployment's handle, an endpoint over HTTP, or an engine in this process.

A request waits while the queue is full and while Serve replaces a replica that died. A row that cannot be answered gets a
response that says why.
"""

from __future__ import annotations

from pipelines.batch.backend import Backend, RequestSettings
from pipelines.batch.deployment import Deployment, DeploymentBackend, Embedded
from pipelines.batch.http_backend import HttpBackend


def open_backend(settings: RequestSettings) -> Backend:
    """The backend that `settings` names. Raises InputError for an API key that is not set."""
    if settings.address:
        return HttpBackend(settings)
    return DeploymentBackend(settings, Embedded(settings.embedded) if settings.embedded else Deployment(str(settings.app_name)))
