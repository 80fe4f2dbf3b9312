"""Writes draft heads as a folder that vLLM reads, and the command that serves with them."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hydra_core.base.vocabulary import BaseVocabulary
from hydra_core.decoding.configuration import FILE, find_heads, read_configuration
from hydra_core.errors import InputError
from hydra_core.files import atomic_folder, file_lock
from hydra_core.heads.base import HeadDrafter
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.heads.config import HeadsConfig
from hydra_core.heads.eagle import Eagle
from hydra_core.interop.eagle_export import check_eagle3, eagle3_config, eagle3_tensors
from hydra_core.interop.vllm_format import BIAS, IDS, KEY, ROWS, ExportedHeads
from hydra_core.storage import scheme_of

EAGLE3 = "eagle3"
"""The kind that is written in EAGLE-3's own layout, and vLLM's name of the method that runs it."""
TAKEN = ("eagle-", "eagle3", "dflash", "dspark")
"""Words in a drafter's path by which vLLM (`SpeculativeConfig`) takes it for one of these, whatever its config.json says."""


@dataclass(frozen=True)
class VllmExport:
    """What was written. `folder`: absolute; `size`: bytes of the tensors."""

    folder: Path
    kind: str
    num_heads: int
    dtype: torch.dtype
    size: int


def export_to_vllm(heads: str | Path, vocabulary: BaseVocabulary, output: str | Path) -> VllmExport:
    """Write `heads` to the folder `output`, whole or not at all; an earlier export there is replaced.

    `heads`: a checkpoint, a decoding configuration with heads, on any storage, or `bundled`; `vocabulary`: of their base, whose
    dtype the exported tensors get.
    Raises InputError for heads that cannot be read or belong to another base, for kinds that the plug-in does not run, and for
    an `output` that vLLM would not read or that holds something else.
    """
    drafter = exportable(heads, vocabulary)
    output = _checked(str(output), () if drafter.config.kind == EAGLE3 else TAKEN)
    if isinstance(drafter, Eagle):
        return _export_eagle3(drafter, vocabulary, output)
    tensors, dtype = exported_tensors(drafter), vocabulary.head.weight.dtype
    about = ExportedHeads(drafter.config.model_copy(update={"draft_vocab_size": len(drafter.draft_vocab)}),
                          {"name": vocabulary.identity.name, "digest": vocabulary.identity.digest}, vocabulary.size,
                          vocabulary.width, vocabulary.norm_eps, drafter.rows.bias is not None)
    with atomic_folder(output) as temporary:
        save_file(tensors, temporary / "model.safetensors")
        text = json.dumps(about.to_config(str(dtype).removeprefix("torch.")), indent=2, sort_keys=True)
        (temporary / "config.json").write_text(text, encoding="utf-8")
    size = sum(tensor.nbytes for tensor in tensors.values())
    return VllmExport(output, drafter.config.kind, drafter.config.num_heads, dtype, size)


def _export_eagle3(drafter: Eagle, vocabulary: BaseVocabulary, output: Path) -> VllmExport:
    """An EAGLE-3 folder, which vLLM reads by itself."""
    check_eagle3(drafter, vocabulary)
    tensors, about = eagle3_tensors(drafter), eagle3_config(drafter, vocabulary)
    with atomic_folder(output) as temporary:
        save_file(tensors, temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(about, indent=2, sort_keys=True), encoding="utf-8")
    size = sum(tensor.nbytes for tensor in tensors.values())
    return VllmExport(output, drafter.config.kind, drafter.config.num_heads, drafter.rows.weight.dtype, size)


def exportable(heads: str | Path, vocabulary: BaseVocabulary) -> HeadDrafter:
    """The heads, as `export_to_vllm` takes them. Raises InputError for heads that cannot be read, belong to another base, or are
    of a kind that the plug-in does not run."""
    found = find_heads(heads, vocabulary.identity)
    if (found / FILE).exists():
        configuration = read_configuration(found)
        if configuration.heads is None:
            raise InputError(f"{found}: has no heads ({configuration.drafter}); vLLM has an n-gram lookup")
        found = configuration.heads
    drafter = load_checkpoint(found, vocabulary).drafter
    if (fault := why_not_in_vllm(drafter.config)) is not None:
        raise InputError(f"{found}: {fault}")
    return drafter


def export_once(heads: str | Path, vocabulary: BaseVocabulary, cache: Path) -> VllmExport:
    """An export of `heads` in a folder of `cache` that is named after their content and the dtype: written by the first process
    that asks for it, and whole for every other one. Raises InputError as `export_to_vllm` does."""
    found = find_heads(heads, vocabulary.identity)
    if exportable(heads, vocabulary).config.kind == EAGLE3:
        raise InputError(f"{found}: {EAGLE3} heads were not tried with engine=vllm: export them, and give vLLM itself the folder")
    digest = hashlib.sha256(str(vocabulary.identity).encode())
    for path in sorted(path for path in found.rglob("*") if path.is_file()):
        digest.update(path.relative_to(found).as_posix().encode())
        digest.update(path.read_bytes())
    output = cache / "vllm-heads" / digest.hexdigest()[:16]
    output.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(output.with_name(f".{output.name}.lock")):
        return export_to_vllm(found, vocabulary, output) if not output.exists() else read_export(output)


def read_export(folder: Path) -> VllmExport:
    """What `export_to_vllm` has written to `folder`. Raises InputError for one of another schema."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    about = ExportedHeads.from_config(values.get(KEY))
    return VllmExport(folder, about.heads.kind, about.heads.num_heads, getattr(torch, values["dtype"]),
                      (folder / "model.safetensors").stat().st_size)


def check_count(count: int | None, heads: int) -> None:
    """Raise InputError for more drafted tokens than there are heads; `count` None: one for each."""
    if count is not None and count > heads:
        raise InputError(f"vllm.num_speculative_tokens={count}: there are {heads} heads, one for each token")


def speculative_of(export: VllmExport, count: int | None = None) -> dict[str, Any]:
    """vLLM's `speculative_config` for an export; `count`: drafted tokens. Raises InputError as `check_count` does."""
    check_count(count, export.num_heads)
    method = EAGLE3 if export.kind == EAGLE3 else "medusa"
    return {"method": method, "model": str(export.folder), "num_speculative_tokens": count or export.num_heads}


def why_not_in_vllm(heads: HeadsConfig) -> str | None:
    """Why the plug-in does not run such heads, and what to do; None where it does."""
    if heads.prefix_layer:
        return (f"kind={heads.kind}: its prefix layer needs a KV cache, which vLLM gives to no drafter of this method: export "
                "medusa or hydra heads")
    if heads.own_rows:
        return "its heads end in vocabulary rows of their own, which the plug-in does not run: train medusa or hydra heads here"
    return None


def taken_word(folder: str | Path) -> str | None:
    """The word in a drafter's path by which vLLM takes it for another kind, if there is one."""
    return next((word for word in TAKEN if word in str(folder).lower()), None)


def exported_tensors(drafter: HeadDrafter) -> dict[str, Tensor]:
    """The heads' own tensors by their names, `ROWS` [Vd, D] and `BIAS` [Vd] of the vocabulary projection, all in its dtype, and
    `IDS` [Vd] int64. Scale and soft cap of the projection are left out: they do not move an argmax."""
    dtype = drafter.rows.weight.dtype
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in drafter.state_dict().items()}
    tensors[ROWS] = drafter.rows.weight.detach().cpu().contiguous()
    if drafter.rows.bias is not None:
        tensors[BIAS] = drafter.rows.bias.detach().cpu().contiguous()
    return tensors | {IDS: drafter.draft_vocab.ids.cpu()}


def serve_command(export: VllmExport, base: str) -> str:
    """The command that serves `base`, a folder or a hub id with or without `@revision`, with the exported heads."""
    name, _, revision = base.partition("@") if not Path(base).exists() else (base, "", "")
    words = ["vllm", "serve", name, *(["--revision", revision] if revision else []),
             "--dtype", str(export.dtype).removeprefix("torch."), "--speculative-config", json.dumps(speculative_of(export))]
    return shlex.join(words)


def _checked(asked: str, taken: Sequence[str]) -> Path:
    """The folder `asked` as an absolute path, in which none of the words `taken` occurs."""
    if scheme_of(asked):
        raise InputError(f"{asked}: vLLM reads drafters from a folder of its machine: name one, and copy it where it is needed")
    output = Path(asked).expanduser().absolute()
    if word := next((word for word in taken if word in str(output).lower()), None):
        raise InputError(f"{output}: vLLM takes a drafter with {word!r} in its path for another kind: name another folder")
    if not output.exists():
        return output
    try:
        earlier = not any(output.iterdir()) or KEY in json.loads((output / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = False
    if not earlier:
        raise InputError(f"{output}: exists and is no earlier export: name a new folder")
    return output
