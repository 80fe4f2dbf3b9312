"""MLflow's webhooks: who sent a delivery, whether it is fresh, and that it was not sent before.

The scheme is that of MLflow 3 (mlflow/webhooks/delivery.py), which follows Standard Webhooks: the header X-MLflow-Signature holds
`v1,` and the base64 of HMAC-SHA256(secret, "DELIVERY.TIMESTAMP.BODY"), with the other two headers in it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Callable

from hydra_core.errors import InputError
from pipelines.serve.api_keys import private_text
from pipelines.serve.openai.errors import ApiError

PATH = "/registry/webhook"
SIGNATURE, TIMESTAMP, DELIVERY = "X-MLflow-Signature", "X-MLflow-Timestamp", "X-MLflow-Delivery-Id"
VERSION = "v1"
FRESH_SECONDS = 300.0
"""By which the clocks of MLflow and of this machine may differ; the retries of a delivery have its first timestamp."""
MOST_BYTES = 64 << 10
"""Of a delivery's body: the payload of an alias has a few hundred."""
MOST_DELIVERIES = 10_000
"""Signed deliveries within `FRESH_SECONDS`; more of them are refused, as they could not be told from repeated ones."""
SHORTEST = 16


def read_secret(path: str | None) -> str | None:
    """The secret in the file `path`, without white space around it; None without a file.

    Raises InputError, whose message never has the secret, for a file that cannot be read or is open to others, and for a
    secret that could be guessed.
    """
    if path is None:
        return None
    secret = private_text("serve.webhook_secret_file", path).strip()
    if len(secret) < SHORTEST:
        raise InputError(f"serve.webhook_secret_file={path}: the secret must have {SHORTEST} characters or more")
    return secret


def signature(secret: str, delivery: str, timestamp: str, body: bytes) -> str:
    """What MLflow puts into X-MLflow-Signature."""
    signed = f"{delivery}.{timestamp}.".encode() + body
    return f"{VERSION},{base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()}"


class Deliveries:
    """The deliveries that were signed with `secret`, each taken once. `clock`: Unix time."""

    def __init__(self, secret: str, clock: Callable[[], float] = time.time) -> None:
        self._secret, self._clock = secret, clock
        self._taken: dict[str, float] = {}

    def take(self, body: bytes, given: str | None, timestamp: str | None, delivery: str | None) -> None:
        """Take one. Raises ApiError 401 for one that this secret has not signed or that is too old or too new, 409 for one that
        was taken before, 429 for too many. What the body says is not read."""
        if given is None or timestamp is None or delivery is None:
            raise _refused(f"{SIGNATURE}, {TIMESTAMP} and {DELIVERY} are needed: give the webhook in MLflow a secret")
        wanted = signature(self._secret, delivery, timestamp, body)
        if not hmac.compare_digest(wanted.encode(), given.encode("utf-8", "replace")):
            raise _refused(f"{SIGNATURE} is not that of this endpoint's secret")
        now = self._clock()
        if not timestamp.isdecimal() or abs(now - int(timestamp[:18])) > FRESH_SECONDS:
            raise _refused(f"{TIMESTAMP} is more than {FRESH_SECONDS:g} s off this machine's clock")
        self._taken = {name: until for name, until in self._taken.items() if until >= now}
        if delivery in self._taken:
            raise ApiError(409, "this delivery was taken before", code="repeated_delivery")
        if len(self._taken) >= MOST_DELIVERIES:
            raise ApiError(429, "too many deliveries", code="too_many_requests", headers={"Retry-After": "60"})
        self._taken[delivery] = now + 2 * FRESH_SECONDS  # a timestamp of the future is fresh for longer


def _refused(why: str) -> ApiError:
    return ApiError(401, why, code="invalid_signature")
