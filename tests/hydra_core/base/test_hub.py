"""A base of the hub: a revision, a token from the environment, and weights that are hashed once. The hub is a server here."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from hydra_core.base import load_vocabulary, resolve, resolve_base
from hydra_core.errors import InputError
from tests.tiny import save_tiny

TOKEN = "hf_word_of_a_test"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub:
    """Two revisions of `org/tiny`, for those who have the token. `folders`: commit -> files; `asked`: paths."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                if self.headers.get("authorization") != f"Bearer {TOKEN}":
                    self.give(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to org/tiny is restricted"})
                elif path.startswith("/api/models/org/tiny"):
                    revision = path.rpartition("/")[2]
                    commit = COMMITS.get(revision, revision if revision in folders else None)
                    if commit is None:
                        self.give(404, b"", {"X-Error-Code": "RevisionNotFound"})
                        return
                    files = sorted(folders[commit].iterdir())
                    about = {"id": "org/tiny", "sha": commit, "siblings": [{"rfilename": file.name} for file in files]}
                    tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": f"{commit}{file.name}"}
                            for file in files]
                    self.give(200, json.dumps(tree if "/tree/" in path else about).encode(), {})
                else:
                    commit, _, name = path.removeprefix("/org/tiny/resolve/").partition("/")
                    self.give(200, (folders[commit] / name).read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{commit}{name}"'})

            def give(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub({commit: save_tiny(tmp_path / "hub" / name, seed=number) for number, (name, commit) in enumerate(COMMITS.items())})
    address = f"http://127.0.0.1:{made.server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "downloads"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_revision_is_a_base_of_its_own(hub: Hub, tmp_path: Path) -> None:
    """Under a name that says so, with the digest of what it holds."""
    cache = tmp_path / "cache"
    for model, revision in (("org/tiny", "main"), ("org/tiny@v2", "v2"), (f"org/tiny@{'b' * 40}", "v2")):
        found = resolve_base(model, cache)
        assert (found.name, found.folder.name) == (model, COMMITS[revision])
        assert found.digest == resolve_base(str(tmp_path / "hub" / revision), cache).digest
    assert load_vocabulary("org/tiny@v2", dtype="fp32", cache=cache).identity.name == "org/tiny@v2"
    for model, told in (("org/tiny@v3", r"base\.model=org/tiny@v3: no such folder, and the hub download failed \(.*"),
                        ("org/tiny@", r"base\.model=org/tiny@: a branch, a tag or a commit is missing after the @")):
        with pytest.raises(InputError, match=told):
            resolve_base(model, cache)


def test_a_folder_with_such_a_name_is_a_folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "org" / "tiny@v2", seed=5)
    monkeypatch.chdir(tmp_path)
    assert resolve_base("org/tiny@v2", tmp_path / "cache").folder == tmp_path / "org" / "tiny@v2" and not hub.asked


def test_the_token_is_that_of_the_environment(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no message and no file of ours holds it."""
    resolve_base("org/tiny", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(InputError) as caught:
        resolve_base("org/tiny@v2", tmp_path / "cache")
    assert "restricted" in str(caught.value) or "401" in str(caught.value)
    assert "hf_of_somebody_else" not in str(caught.value)


def test_weights_are_hashed_once_for_all_nodes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a copy of its own, with other times; the storage, and the digests in it, they share."""
    wanted = resolve_base("org/tiny", tmp_path / "cache").digest
    resolve._digest.cache_clear()  # another process
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "downloads of another node"))
    monkeypatch.setattr(resolve, "open", lambda *_: pytest.fail("the weights are read again"), raising=False)
    assert resolve_base("org/tiny", tmp_path / "cache").digest == wanted
    with pytest.raises(pytest.fail.Exception, match="read again"):
        resolve_base("org/tiny@v2", tmp_path / "cache")
