"""Deliveries of MLflow's webhook: only what its secret has signed, fresh, and once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.webhooks.constants import WEBHOOK_DELIVERY_ID_HEADER, WEBHOOK_SIGNATURE_HEADER, WEBHOOK_TIMESTAMP_HEADER
from mlflow.webhooks.delivery import _generate_hmac_signature
from starlette.testclient import TestClient

from hydra_core.errors import InputError
from pipelines.config import load_config
from pipelines.serve import webhook
from pipelines.serve.following import Following
from pipelines.serve.middleware import RequestMiddleware
from pipelines.serve.openai.errors import ApiError
from pipelines.serve.webhook import FRESH_SECONDS, MOST_BYTES, Deliveries, read_secret
from tests.pipelines.serve.front import Handle, made_front

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .*__del__")  # Serve's wrapper around a front that no Serve made
SECRET = "a secret of this test"
BODY = '{"entity": "model_version_alias", "action": "created", "data": {"name": "x", "alias": "champion"}}'
NOW = 1_700_000_000.0


def signed(body: str = BODY, delivery: str = "d-1", at: float = NOW, secret: str = SECRET) -> dict[str, str]:
    """Headers as MLflow itself makes them."""
    return {WEBHOOK_SIGNATURE_HEADER: _generate_hmac_signature(secret, delivery, str(int(at)), body),
            WEBHOOK_TIMESTAMP_HEADER: str(int(at)), WEBHOOK_DELIVERY_ID_HEADER: delivery}


def taken(deliveries: Deliveries, headers: dict[str, str], body: str = BODY) -> int:
    """The status of a delivery."""
    try:
        deliveries.take(body.encode(), *(headers.get(name) for name in (webhook.SIGNATURE, webhook.TIMESTAMP, webhook.DELIVERY)))
    except ApiError as error:
        assert SECRET not in error.message
        return error.status
    return 202


def test_what_mlflow_signs_is_taken_once() -> None:
    now = [NOW]
    deliveries = Deliveries(SECRET, lambda: now[0])
    assert taken(deliveries, signed()) == 202
    assert taken(deliveries, signed()) == 409  # the same again
    assert taken(deliveries, signed(delivery="d-2")) == 202
    now[0] += FRESH_SECONDS + 1
    assert taken(deliveries, signed()) == 401  # now it is too old
    ahead = signed(delivery="d-3", at=now[0] + FRESH_SECONDS - 1)
    assert taken(deliveries, ahead) == 202
    now[0] += FRESH_SECONDS + 5  # by then it is still fresh, and still known
    assert taken(deliveries, ahead) == 409


@pytest.mark.parametrize("change", [
    {webhook.SIGNATURE: "v1,AAAA"}, {webhook.SIGNATURE: ""}, {webhook.SIGNATURE: None}, {webhook.TIMESTAMP: None},
    {webhook.DELIVERY: None}, {webhook.DELIVERY: "d-9"}, {webhook.TIMESTAMP: str(int(NOW) + 1)},
    {webhook.SIGNATURE: "v1,\u00e9"}])
def test_what_is_not_signed_is_refused(change: dict[str, Any]) -> None:
    headers = {name: value for name, value in {**signed(), **change}.items() if value is not None}
    assert taken(Deliveries(SECRET, lambda: NOW), headers) == 401


@pytest.mark.parametrize("at", [NOW - FRESH_SECONDS - 2, NOW + FRESH_SECONDS + 2])
def test_what_is_signed_and_stale_is_refused(at: float) -> None:
    assert taken(Deliveries(SECRET, lambda: NOW), signed(at=at)) == 401


def test_another_body_or_secret_is_refused() -> None:
    deliveries = Deliveries(SECRET, lambda: NOW)
    assert taken(deliveries, signed(), BODY.replace("champion", "other")) == 401
    assert taken(deliveries, signed(secret="another secret of no one")) == 401
    assert taken(deliveries, signed()) == 202  # none of them has used up the delivery


def test_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "MOST_DELIVERIES", 2)
    deliveries = Deliveries(SECRET, lambda: NOW)
    assert [taken(deliveries, signed(delivery=str(number))) for number in range(3)] == [202, 202, 429]


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> tuple[TestClient, list[str]]:
    """A front with a key that takes deliveries, and when it was woken."""
    client, _ = made_front(monkeypatch, Handle(...), keys=("0" * 64,))
    calls: list[str] = []
    client.front.deliveries = Deliveries(SECRET, lambda: NOW)  # type: ignore[attr-defined]
    client.front.following = SimpleNamespace(wake=lambda: calls.append("woken"))  # type: ignore[attr-defined]
    limits = RequestMiddleware.limits
    assert limits is not None
    monkeypatch.setattr(RequestMiddleware, "limits", type(limits)(limits.bodies, limits.key_digests, webhook=True))
    return client, calls


def test_the_path_needs_a_signature_and_no_key(woken: tuple[TestClient, list[str]]) -> None:
    client, calls = woken
    json = {"Content-Type": "application/json"}
    assert client.post(webhook.PATH, content=BODY, headers=json).status_code == 401 and not calls
    assert client.post(webhook.PATH, content=BODY, headers=json | signed(secret="another secret of no one")).status_code == 401
    assert client.post(webhook.PATH, content="x" * (MOST_BYTES + 1), headers=json).status_code == 413 and not calls
    answer = client.post(webhook.PATH, content=BODY, headers=json | signed())
    assert (answer.status_code, calls) == (202, ["woken"])
    assert client.post(webhook.PATH, content=BODY, headers=json | signed()).status_code == 409 and calls == ["woken"]
    assert client.get("/v1/models").status_code == 401  # all else needs the key


def test_without_a_secret_there_is_no_such_path(monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = made_front(monkeypatch, Handle(...))
    client.front.deliveries = client.front.following = None  # type: ignore[attr-defined]
    assert client.post(webhook.PATH, json={}).status_code == 404
    client, _ = made_front(monkeypatch, Handle(...), keys=("0" * 64,))
    client.front.deliveries = client.front.following = None  # type: ignore[attr-defined]
    assert client.post(webhook.PATH, json={}, headers=signed()).status_code == 401


def test_secrets_that_are_no_secrets(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with pytest.raises(InputError, match=r"serve\.webhook_secret_file=.*secret: cannot be read as text"):
        read_secret(str(path))
    path.write_text(f"{SECRET}\n", encoding="utf-8")
    path.chmod(0o644)
    with pytest.raises(InputError, match="others may read it"):
        read_secret(str(path))
    path.chmod(0o600)
    assert read_secret(str(path)) == SECRET and read_secret(None) is None
    path.write_text("short", encoding="utf-8")
    with pytest.raises(InputError, match="16 characters or more"):
        read_secret(str(path))


def test_which_settings_follow() -> None:
    def section(**given: Any) -> Any:
        return load_config(None, {f"serve.{name}": value for name, value in given.items()}).serve

    assert not section().follows and not section(model="/heads").follows and not section(model="models:/x/3").follows
    assert section(model="models:/x@champion").follow_seconds == 30 and section(follow_registry=5).follow_seconds == 5
    assert not section(model="models:/x@champion", follow_registry=0).follows
    pushed = section(model="models:/x@champion", follow_registry=0, webhook_secret_file="/s")
    assert pushed.follows and pushed.follow_seconds == 0
    with pytest.raises(InputError, match=r"serve\.follow_registry: serve\.model=/heads never names other heads"):
        section(model="/heads", follow_registry=5)


class Told:
    """Metrics and a registry that gives `looks`, one after the other."""

    def __init__(self, *looks: Any) -> None:
        self.looks, self.changes, self.asked = list(looks), list[str](), 0

    def followed(self, result: str) -> None:
        self.changes.append(result)

    async def look(self) -> dict[str, Any]:
        self.asked += 1
        if not self.looks:
            await asyncio.Event().wait()
        found = self.looks.pop(0)
        if isinstance(found, Exception):
            raise found
        return {"outcome": found, "version": 3, "why": f"because {found}"}


def test_an_outage_is_one_line_and_one_metric(caplog: pytest.LogCaptureFixture) -> None:
    told = Told("same", "silent", RuntimeError("the actor died"), "silent", "same", "changed", "rejected", "same", "unnamed",
                "unnamed")
    caplog.set_level("INFO", "ray.serve")

    async def run() -> list[bool | None]:
        following = Following(told.look, 0.001, told)  # type: ignore[arg-type]
        task, seen = asyncio.create_task(following.run()), []
        while told.looks:
            seen.append(following.answers)
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        task.cancel()
        return seen

    seen = asyncio.run(run())
    assert {None, True, False} == set(seen) and told.changes == ["changed", "rejected"]
    lines = [record.message for record in caplog.records if record.name == "ray.serve"]
    assert lines == ["the registry does not say what to decode with, the present heads stay: because silent",
                     "the registry answers again",
                     "the registry names other heads, which decode now",
                     "the registry names heads that are rejected, the earlier ones stay: because rejected",
                     "the registry does not say what to decode with, the present heads stay: because unnamed"]


def test_without_seconds_only_a_webhook_leads_to_a_look() -> None:
    async def run() -> list[int]:
        told = Told("same", "same", "same")
        following, counts = Following(told.look, 0.0, told), []  # type: ignore[arg-type]
        task = asyncio.create_task(following.run())
        for wake in (False, True, True):
            if wake:
                following.wake()
            await asyncio.sleep(0.05)
            counts.append(told.asked)
        task.cancel()
        return counts

    assert asyncio.run(run()) == [0, 1, 2]
