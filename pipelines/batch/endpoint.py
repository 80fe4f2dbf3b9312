"""An endpoint that the user gives by address: whether it answers, and which model it decodes."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from hydra_core.errors import InputError, StoppedError
from pipelines.batch.http_client import HttpClient, NoAnswer
from pipelines.serve.model_identity import ModelDigest

SECONDS = 10
FOREIGN = "unknown"


@dataclass(frozen=True)
class Endpoint:
    """What an endpoint says of itself. `digest`: of one of another kind it holds no more than the model's name; `names`: of the
    models that it serves; `ours`: its answers carry `ModelDigest.fingerprint`, as those of earlier versions do not."""

    digest: ModelDigest
    names: tuple[str, ...]
    ours: bool


def ask_endpoint(address: str, model: str, headers: dict[str, str]) -> Endpoint:
    """What the endpoint decodes under the name `model`.

    Raises InputError when the endpoint refuses the key, redirects, or does not serve `model`; StoppedError when nothing answers
    there or when it is not ready.
    """
    with HttpClient(address, headers) as client:
        listed = _get(client, "/v1/models").get("data")
        names = tuple(str(entry.get("id")) for entry in listed if isinstance(entry, dict)) if isinstance(listed, list) else ()
        if model not in names:
            raise InputError(f"batch.address={address}: does not serve {model!r}, only {', '.join(names) or 'nothing'}: set "
                             "serve.app_name")
        try:
            info = _get(client, "/ready")
            return Endpoint(ModelDigest(info["base"], info["context_limit"], info["configuration"]), names,
                            ours="fingerprint" in info)
        except (InputError, KeyError):
            return Endpoint(ModelDigest(model, 0, FOREIGN), names, ours=False)


def _get(client: HttpClient, path: str) -> dict[str, Any]:
    address, url = client.address, client.address + path
    try:
        answer = client.get(path, SECONDS)
    except NoAnswer as error:
        raise StoppedError(f"batch.address={address}: no endpoint answers there ({error})") from None
    if answer.status == 503:
        raise StoppedError(f"batch.address={address}: is not ready (503 from {url}): run again later")
    if 300 <= answer.status < 400:
        raise InputError(f"batch.address={address}: {url} redirects to {answer.headers.get('location', '?')}: set "
                         "batch.address to where the endpoint is")
    if answer.status != 200:
        hint = ": set batch.key_variable" if answer.status in (401, 403) else ""
        name = HTTPStatus(answer.status).phrase if answer.status in set(HTTPStatus) else ""
        raise InputError(f"batch.address={address}: refuses {url} ({answer.status} {name}){hint}")
    try:
        value = answer.value()
    except ValueError as error:
        raise InputError(f"batch.address={address}: {url} is no endpoint's ({error})") from None
    return value if isinstance(value, dict) else {}
