"""From the name that a user gives for the base model to a folder of safetensors and a digest."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from hydra_core.base.embedded import EMBEDDED_BASE, fetch_embedded
from hydra_core.base.q4_1 import save_codes
from hydra_core.errors import InputError
from hydra_core.files import atomic_file, atomic_folder, file_lock

log = logging.getLogger(__name__)
ORIGIN = "hydra_base.json"  # in the folder of a converted model: the file it was made from
SETTLED_NS = 2 * 10**9  # a file that changed this recently may change again within the same tick of its clock
LAYOUT = 2  # version of a converted folder; version 2 keeps Q4_1 codes beside the dequantised weights


def default_cache() -> Path:
    """The default folder for downloaded and converted models: `cache` in the default storage."""
    storage = os.environ.get("HYDRA_HEADS_STORAGE")
    return (Path(storage) if storage else Path.home() / ".hydra-heads") / "cache"


@dataclass(frozen=True)
class ResolvedBase:
    """A transformers folder on this machine, with the name and the digest (sha256, hex) of the base."""

    folder: Path
    name: str
    digest: str


def resolve_base(model: str, cache: Path) -> ResolvedBase:
    """Find `model`: the embedded one, a folder, a .gguf file or a hub id, `org/name` or `org/name@revision` (a branch, a tag or a
    commit; default: the main branch). A token for the hub comes from the environment (`HF_TOKEN`).

    A .gguf file is dequantised once, to float32 safetensors under `cache`. Raises InputError when there is no such model, or
    when its weights are not safetensors.
    """
    if model == EMBEDDED_BASE:
        return _converted(fetch_embedded(cache), cache)
    if model.startswith("embedded:"):
        raise InputError(f"base.model={model}: the embedded model is called {EMBEDDED_BASE}")
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"base.model={model}: no such file")
        return _converted(path, cache)
    if path.is_dir():
        return _folder(path.resolve(), path.resolve().name, cache)
    if path.is_absolute() or model.startswith((".", "~")):
        raise InputError(f"base.model={model}: no such folder")
    snapshot = _download(model)
    return _folder(snapshot, model, cache, snapshot.name if snapshot.parent.name == "snapshots" else None)


def _folder(folder: Path, name: str, cache: Path, commit: str | None = None) -> ResolvedBase:
    """`commit`: of a snapshot of the hub, whose files never change."""
    if not (folder / "config.json").is_file():
        raise InputError(f"base.model={folder}: has no config.json: it is not a transformers model folder")
    origin = folder / ORIGIN
    if origin.exists():
        made_from = json.loads(origin.read_text(encoding="utf-8"))
        return ResolvedBase(folder, made_from["name"], made_from["digest"])
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"base.model={folder}: has no .safetensors weights (pickled ones are not loaded)")
    return ResolvedBase(folder, name, _digest(_stamps(folder / "config.json", *weights), cache, commit))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights, as transformers chooses them: those of the index, else
    `model.safetensors`. A copy in another format or of another model may lie beside them.

    Raises OSError or ValueError for an index that cannot be read.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists() or not index.exists():
        return [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


Stamp = tuple[str, int, int, int, int]
"""Path, size, times of the last change of content and of anything, inode: another content has another stamp."""


def _stamps(*paths: Path) -> tuple[Stamp, ...]:
    found = [(path, path.stat()) for path in paths]
    return tuple((str(path), at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino) for path, at in found)


@lru_cache(maxsize=32)
def _digest(stamps: tuple[Stamp, ...], cache: Path, commit: str | None = None) -> str:
    """sha256 over the names and bytes of files: read once, then kept under `cache` for other processes, since each stage starts
    some and weights have gigabytes. A changed file has another stamp and is read again. Those of a `commit` of the hub are known
    by it, on every node, whatever times its own copy has."""
    known = stamps if commit is None else [commit, *((Path(path).name, size) for path, size, *_ in stamps)]
    kept = cache / "digests" / hashlib.sha256(json.dumps(known).encode()).hexdigest()
    try:
        return kept.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        pass
    # before the files are read
    settled = commit is not None or time.time_ns() - max(max(stamp[2:4]) for stamp in stamps) > SETTLED_NS
    digest = hashlib.sha256()
    for path, *_ in stamps:
        digest.update(Path(path).name.encode())
        with open(path, "rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    if settled:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(kept) as made:
                made.write_text(digest.hexdigest(), encoding="ascii")
        except OSError as error:
            log.debug("the digest of %s cannot be kept: %s", stamps[0][0], error)
    return digest.hexdigest()


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    hub_id, at, revision = model.partition("@")
    if at and not revision:
        raise InputError(f"base.model={model}: a branch, a tag or a commit is missing after the @")
    try:
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=[
            "*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:  # the hub client raises a dozen types when a download fails
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"base.model={model}: no such folder, and the hub download failed ({reason})") from None


def _converted(gguf: Path, cache: Path) -> ResolvedBase:
    """The float32 transformers copy of a .gguf file. A lock makes one of several processes convert it."""
    digest = _digest(_stamps(gguf), cache)
    folder = cache / "converted" / f"{gguf.stem}-{digest[:12]}-{LAYOUT}"
    if not (folder / ORIGIN).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(f"{folder}.lock"):
            if not (folder / ORIGIN).exists():
                _convert(gguf, folder, digest)
    return ResolvedBase(folder, gguf.stem, digest)


def _convert(gguf: Path, folder: Path, digest: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("dequantising %s, once", gguf.name)
    _quieten()
    try:
        with redirect_stderr(StringIO()):  # a bar that knows no switch
            model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    except Exception as error:  # a parser of arbitrary bytes may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"base.model={gguf}: cannot be read as GGUF ({reason})") from None
    model.hf_quantizer, model.is_quantized = None, False  # otherwise save_pretrained rejects the dequantised copy
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        save_codes(gguf, model, temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / ORIGIN).write_text(json.dumps({"name": gguf.stem, "digest": digest}), encoding="utf-8")


def _quieten() -> None:
    """Leave out transformers' bars, and what DeepSpeed, which saving a model imports, says of a machine without a GPU."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith("Setting accelerator to CPU"))
