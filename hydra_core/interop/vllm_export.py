"""Writes draft heads as a folder that vLLM reads, and the command that serves with them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hydra_core.base.vocabulary import BaseVocabulary
from hydra_core.decoding.configuration import FILE, find_heads, read_configuration
from hydra_core.errors import InputError
from hydra_core.files import atomic_folder
from hydra_core.heads.base import HeadDrafter
from hydra_core.heads.checkpoint import load_checkpoint
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
    found = find_heads(heads, vocabulary.identity)
    if (found / FILE).exists():
        configuration = read_configuration(found)
        if configuration.heads is None:
            raise InputError(f"{found}: has no heads ({configuration.drafter}); vLLM has an n-gram lookup")
        found = configuration.heads
    drafter = load_checkpoint(found, vocabulary).drafter
    output = _checked(str(output), () if drafter.config.kind == EAGLE3 else TAKEN)
    if isinstance(drafter, Eagle):
        return _export_eagle3(drafter, vocabulary, output)
    if drafter.config.prefix_layer:
        raise InputError(f"{found}: kind={drafter.config.kind}: its prefix layer needs a KV cache, which vLLM gives to no "
                         "drafter of this method: export medusa or hydra heads")
    if drafter.config.own_rows:
        raise InputError(f"{found}: its heads end in vocabulary rows of their own, which the plug-in does not run: train "
                         "medusa or hydra heads here")
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
    method = EAGLE3 if export.kind == EAGLE3 else "medusa"
    settings = {"method": method, "model": str(export.folder), "num_speculative_tokens": export.num_heads}
    words = ["vllm", "serve", name, *(["--revision", revision] if revision else []),
             "--dtype", str(export.dtype).removeprefix("torch."), "--speculative-config", json.dumps(settings)]
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
