"""A cluster has one Serve: what others run on it stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from ray import serve

from hydra_core.errors import InputError
from pipelines.config import RunConfig, load_config
from pipelines.serve.instance import running_instance
from pipelines.serve.stage import resolve_args, start_app, update_app
from tests.pipelines.serve.test_stage import free_port

pytestmark = pytest.mark.slow


@serve.deployment
class Neighbour:
    """Somebody else's application."""

    async def __call__(self, request: object) -> str:
        return "still here"


@pytest.fixture
def neighbour(local_ray: None) -> Iterator[str]:
    """A Serve that was there before us, with an application on it: its address."""
    port = free_port()
    serve.shutdown()  # one may have been left by a test that kills a driver on the same Ray
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Neighbour.options(ray_actor_options={"num_cpus": 0.1}).bind(), name="neighbour", route_prefix="/neighbour")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def config_for(storage: Path, base: Path, **changes: object) -> RunConfig:
    values = {"storage": str(storage), "base.model": str(base), "base.dtype": "fp32", "serve.model": "plain",
              "serve.port": 0, "serve.workers.threads": 1}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def test_a_neighbour_survives(neighbour: str, tiny_base_dir: Path, storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = start_app(config_for(storage, tiny_base_dir, serve__port=free_port()))
    assert app.url == neighbour and f"runs on this cluster already, at {neighbour}" in capsys.readouterr().err
    assert httpx.get(f"{app.url}/health").status_code == 200
    with pytest.raises(InputError, match=r"serve\.app_name=hydra-heads: an application of that name is RUNNING"):
        start_app(config_for(storage, tiny_base_dir))
    with pytest.raises(InputError, match="application hydra-heads answers at / on this cluster already"):
        start_app(config_for(storage, tiny_base_dir, serve__app_name="second"))
    assert httpx.get(f"{app.url}/health").status_code == 200
    app.stop()
    assert list(serve.status().applications) == ["neighbour"]
    assert httpx.get(f"{neighbour}/neighbour").text == "still here"


def test_a_neighbour_survives_our_failure(neighbour: str, tiny_base_dir: Path, storage: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    run = serve.run

    def fails(*args: object, **kwargs: object) -> None:
        run(*args, **kwargs)  # type: ignore[arg-type]
        raise RuntimeError("too late")

    monkeypatch.setattr(serve, "run", fails)
    with pytest.raises(RuntimeError, match="too late"):
        start_app(config_for(storage, tiny_base_dir))
    assert list(serve.status().applications) == ["neighbour"]
    assert httpx.get(f"{neighbour}/neighbour").text == "still here"


def test_a_free_port_is_told_and_serve_ends_with_its_last_application(local_ray: None, tiny_base_dir: Path,
                                                                      storage: Path) -> None:
    assert running_instance() is None
    app = start_app(config_for(storage, tiny_base_dir))
    assert urlsplit(app.url).port and httpx.get(f"{app.url}/health").status_code == 200
    app.stop()
    assert running_instance() is None
    with pytest.raises(InputError, match=r"serve\.update: no application hydra-heads runs on this cluster"):
        update_app(resolve_args(config_for(storage, tiny_base_dir)))
    app = start_app(config_for(storage, tiny_base_dir))
    serve.run(Neighbour.options(ray_actor_options={"num_cpus": 0.1}).bind(), name="neighbour", route_prefix="/neighbour")
    app.stop()  # the Serve is ours, but somebody has moved in
    assert httpx.get(f"{app.url}/neighbour").text == "still here"
    serve.shutdown()
