"""What a process needs before it joins Ray or starts one: an address that answers, the cluster's token, a private folder.

A Ray that `ray.init` starts asks for a token, which lies in the home of the user who started it; one that `ray start` has
started asks for none unless RAY_AUTH_MODE says so. A driver with an explicit address finds out here which of the two it is:
Ray itself would try the wrong one for a minute.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError, StoppedError
from pipelines.runtime.reachability import PROBE_SECONDS, why_silent

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""The call with which every client of Ray begins."""
TRAVEL = ("HYDRA_HEADS_STORAGE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE",
          "MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH")
"""Variables that change what a worker does. No key or password: Ray shows a runtime environment to everybody on the cluster."""
CHECKPOINT = "hydra-heads-checkpoint-"
"""How the temporary folder of a checkpoint begins that is being written."""
OLD_SECONDS = 24 * 3600
"""After which a folder that a killed process has left is removed."""
SYSTEM_FOLDERS = ("/tmp", "/var/tmp")
LONGEST_SOCKET = 107
"""Bytes of the path of a Unix socket."""
BELOW = len("/r/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store.123")
"""Characters that Ray adds to the path of its folder for its longest socket."""


def prepare_to_join(address: str, field: str) -> None:
    """Check that a Ray cluster answers at `address`, and set RAY_AUTH_MODE as that cluster has it, unless it is set.

    `field`: the setting that `address` comes from. Raises StoppedError, within seconds, if nothing answers, InputError if the
    cluster wants a token that this process does not have, or has no tokens where RAY_AUTH_MODE asks for one.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return  # `auto`, or no address: Ray says so
    if fault := why_silent(host.strip("[]"), int(port)):
        raise StoppedError(f"{field}={address}: no Ray cluster answers there ({fault}): start it or correct the address")
    if address.startswith("ray://") or os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # not the server that is asked below, or not without its certificates
    mode = os.environ.get(MODE)
    if _lets_in(address, field, None):
        if (mode or "").lower() == "token":
            raise InputError(f"{field}={address}: this cluster has no token authentication, and {MODE}=token asks for it: "
                             f"unset {MODE}")
        return
    if mode is not None and mode.lower() != "token":
        raise InputError(f"{field}={address}: this cluster wants a token: unset {MODE}, which is {mode}")
    found = next(_tokens(), None)
    if found is None:
        raise InputError(f"{field}={address}: this cluster wants a token, and there is none in {_home_token() or '~'}: export "
                         f"{TOKEN_PATH}=FILE, a copy of ~/.ray/auth_token of the user who started the cluster")
    source, token = found
    if not _lets_in(address, field, token):
        raise InputError(f"{field}={address}: this cluster wants another token than that of {source}: export "
                         f"{TOKEN_PATH}=FILE, a copy of ~/.ray/auth_token of the user who started the cluster")
    if mode is None:
        _use_token(source)


def prepare_to_start() -> Path:
    """Make a token that this user alone can read, if there is none; return the folder for the files of a new local Ray, which
    this user alone can reach: Ray opens the folder itself and all below it to everybody.

    Raises StoppedError if there is no folder with a path short enough for Ray's sockets that can be written.
    """
    folder = private_folder()
    _sweep(folder / "r")
    if (os.environ.get(MODE) or "token").lower() == "token" and not os.environ.get(TOKEN) and not os.environ.get(TOKEN_PATH):
        home = _home_token()
        if home is None or not _make_token(home):
            _make_token(folder / "auth_token")
            os.environ[TOKEN_PATH] = str(folder / "auth_token")
    return folder / "r"


def _sweep(folder: Path) -> None:
    """Remove the sessions below `folder` whose Ray was killed before it could, and checkpoints that were being written then. A
    session is named after its time and the process that made it; one that is young or whose process lives is left alone."""
    for session in folder.glob("session_*"):
        with suppress(OSError):
            maker = re.search(r"_(\d+)$", session.name)
            if maker and not session.is_symlink() and not Path(f"/proc/{maker[1]}").exists() and _age(session) > OLD_SECONDS:
                shutil.rmtree(session, ignore_errors=True)
    for left in Path(tempfile.gettempdir()).glob(f"{CHECKPOINT}*"):
        with suppress(OSError):
            if left.stat().st_uid == os.getuid() and _age(left) > OLD_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _age(folder: Path) -> float:
    """Seconds since something was written into `folder` or, of a session, into its logs."""
    return time.time() - max(path.stat().st_mtime for path in (folder, *folder.glob("logs"), *folder.glob("logs/*")))


def worker_environment(address: str | None) -> dict[str, Any]:
    """The runtime environment of workers on the cluster at `address`: those of `TRAVEL` that are set here. Empty for a Ray that
    this process has started, whose workers have all variables of this process."""
    found = {name: os.environ[name] for name in TRAVEL if name in os.environ}
    return {"env_vars": found} if address and found else {}


def private_folder() -> Path:
    """A folder `ray-UID` that this user alone can open, below RAY_TMPDIR, TMPDIR or /tmp."""
    tried = []
    for root in _roots():
        folder = Path(root).absolute() / f"ray-{os.getuid()}"
        if len(os.fsencode(folder)) + BELOW > LONGEST_SOCKET:
            tried.append(f"{root} (its path is too long)")
        elif fault := _why_not_private(folder):
            tried.append(f"{root} ({fault})")
        else:
            return folder
    raise StoppedError(f"no folder for the files of Ray among {', '.join(tried)}: export RAY_TMPDIR=FOLDER, a short path of a "
                       "folder that you can write")


def _roots() -> list[str]:
    """Where a private folder may lie, the best place first."""
    return [root for root in dict.fromkeys((os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), *SYSTEM_FOLDERS)) if root]


def _why_not_private(folder: Path) -> str | None:
    """Why `folder`, which is made if it is missing, is not one that its owner, this user, alone can open; None if it is."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True, parents=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return f"{folder} belongs to another user"
        if found.st_mode & 0o077:
            folder.chmod(0o700)
        return None if os.access(folder, os.W_OK | os.X_OK) else "cannot be written"
    except OSError as error:
        return error.strerror or str(error)


def _make_token(path: Path) -> bool:
    """Write a new token, unless `path` holds one, in a folder and a file that this user alone can read; whether there is one."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for one, mode in ((path.parent, 0o700), (path, 0o600)):
            if one.exists() and one.stat().st_uid == os.getuid() and stat.S_IMODE(one.stat().st_mode) & 0o077:
                one.chmod(mode)
        if not _read(path):
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            try:
                with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
                    file.write(secrets.token_hex(32))
                if path.exists():  # an empty one
                    os.replace(temporary, path)
                else:
                    with suppress(FileExistsError):  # another process has been quicker, and its Ray uses that token
                        os.link(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError:
        pass
    return bool(_read(path))


def _tokens() -> Iterator[tuple[str, str]]:
    """Source and text of the tokens that this process could use, the one that Ray would take first."""
    if token := os.environ.get(TOKEN, "").strip():
        yield TOKEN, token
    private = [Path(root).absolute() / f"ray-{os.getuid()}" / "auth_token" for root in _roots()]
    paths: list[str | Path | None] = [os.environ.get(TOKEN_PATH), _home_token(), *private]
    for path in paths:
        if path and (token := _read(Path(path))):
            yield str(path), token


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _home_token() -> Path | None:
    """Where Ray keeps its token, None for a user without a home."""
    try:
        return Path.home() / ".ray" / "auth_token"
    except RuntimeError:
        return None


def _use_token(source: str) -> None:
    """Turn Ray's token authentication on in this process and those that it starts."""
    if source not in (TOKEN, os.environ.get(TOKEN_PATH), str(_home_token())):
        os.environ[TOKEN_PATH] = source
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _lets_in(address: str, field: str, token: str | None) -> bool:
    """Whether the cluster answers a caller with this token, or without one. Raises StoppedError if it is no Ray cluster."""
    import grpc  # Ray's own; no plan and no help needs it

    metadata = None if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(CLUSTER_ID)(b"", timeout=PROBE_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise StoppedError(f"{field}={address}: no Ray cluster answers there ({error.code().name.lower()}): correct the "
                               "address") from None
    return True
