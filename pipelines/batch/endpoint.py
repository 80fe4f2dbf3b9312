"""An endpoint that the user gives by address: whether it answers, and which model it decodes."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from hydra_core.errors import InputError
from pipelines.serve.model_identity import ModelDigest

SECONDS = 10
FOREIGN = "unknown"


def ask_endpoint(address: str, model: str, headers: dict[str, str]) -> ModelDigest:
    """What the endpoint decodes under the name `model`; a server of another kind tells no more than that name.

    Raises InputError when nothing answers there, or when the endpoint is not ready, refuses the key, or does not serve `model`.
    """
    root = address.rstrip("/")
    listed = _get(address, f"{root}/v1/models", headers).get("data")
    names = [str(entry.get("id")) for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if model not in names:
        raise InputError(f"batch.address={address}: does not serve {model!r}, only {', '.join(names) or 'nothing'}: set "
                         "serve.app_name")
    try:
        info = _get(address, f"{root}/ready", headers)
        return ModelDigest(info["base"], info["context_limit"], info["configuration"])
    except Unready:
        raise
    except (InputError, KeyError):
        return ModelDigest(model, 0, FOREIGN)


class Unready(InputError):
    """The endpoint answers, and is not ready yet."""


def _get(address: str, url: str, headers: dict[str, str]) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SECONDS) as answer:
            value = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code == 503:
            raise Unready(f"batch.address={address}: is not ready (503 from {url}): run again later") from None
        hint = ": set batch.key_variable" if error.code in (401, 403) else ""
        raise InputError(f"batch.address={address}: refuses {url} ({error.code} {error.reason}){hint}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"batch.address={address}: no endpoint answers there ({error})") from None
    return value if isinstance(value, dict) else {}
