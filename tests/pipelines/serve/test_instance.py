"""A cluster has one Serve: what others run on it stays."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from ray import serve

from hydra_core.errors import InputError
from pipelines.config import RunConfig, load_config
from pipelines.serve.instance import Listen, running_instance, start_instance
from pipelines.serve.messages import Generation
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
                                                                      storage: Path, tmp_path: Path) -> None:
    assert running_instance() is None
    app = start_app(config_for(storage, tiny_base_dir))
    assert urlsplit(app.url).port and httpx.get(f"{app.url}/health").status_code == 200
    app.stop()
    assert running_instance() is None
    with pytest.raises(InputError, match=r"serve\.update: no application hydra-heads runs on this cluster"):
        update_app(resolve_args(config_for(storage, tiny_base_dir)))
    keyfile, certfile = self_signed(tmp_path)
    app = start_app(config_for(storage, tiny_base_dir, serve__tls_keyfile=str(keyfile), serve__tls_certfile=str(certfile)))
    assert app.url.startswith("https://")
    assert httpx.get(f"{app.url}/health", verify=ssl.create_default_context(cafile=certfile)).json() == {"status": "ok"}
    with pytest.raises(httpx.HTTPError):
        httpx.get(app.url.replace("https", "http"))
    serve.run(Neighbour.options(ray_actor_options={"num_cpus": 0.1}).bind(), name="neighbour", route_prefix="/neighbour")
    app.stop()  # the Serve is ours, but somebody has moved in
    assert httpx.get(f"{app.url}/neighbour", verify=ssl.create_default_context(cafile=certfile)).text == "still here"
    serve.shutdown()


def test_jobs_need_no_http_port_and_leave_nothing(local_ray: None, tiny_base_dir: Path, storage: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # taken by somebody else: as good
            taken.bind(("127.0.0.1", 8000))
            taken.listen()
        first, second = (config_for(storage, tiny_base_dir, serve__port=8000, serve__app_name=name) for name in ("one", "two"))
        app, other = start_app(first, route=None), start_app(second, route=None)
    instance = running_instance()
    assert instance is not None and instance.url is None and app.url == other.url == ""
    with pytest.raises(InputError, match="Serve runs on this cluster without HTTP, for one, two: wait"):
        start_app(config_for(storage, tiny_base_dir, serve__app_name="three"))
    app.stop()
    found = serve.get_deployment_handle("DecodeServer", "two").answers.remote(
        Generation("g", 3, prompt_ids=[5, 6])).result(timeout_s=60)
    assert [len(answer.token_ids) for answer in found] == [3]
    other.stop()  # the last one ends Serve, though the first had started it
    assert running_instance() is None
    serve.start(proxy_location="Disabled")  # as a killed job leaves it
    app = start_app(config_for(storage, tiny_base_dir))
    assert httpx.get(f"{app.url}/health").status_code == 200
    app.stop()
    assert running_instance() is None


@pytest.mark.parametrize("files", [("key", "nowhere"), ("nowhere", "cert"), ("key", "key"), ("cert", "cert")])
def test_a_certificate_is_checked_before_serve_starts(tmp_path: Path, files: tuple[str, str]) -> None:
    self_signed(tmp_path)
    listen = Listen("127.0.0.1", 0, *(str(tmp_path / name) for name in files))
    with pytest.raises(InputError, match=r"serve\.tls_(cert|key)file="):
        start_instance(listen)


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Key and certificate of 127.0.0.1."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1) \
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1)).add_extension(address, False) \
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256())
    (folder / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "cert").write_bytes(certificate.public_bytes(Encoding.PEM))
    return folder / "key", folder / "cert"
