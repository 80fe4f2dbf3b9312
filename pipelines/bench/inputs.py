"""What a bench measures: the heads it finds, the contenders they make, and the fingerprint of all inputs and settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_core.base import load_vocabulary, resolve_base
from hydra_core.bundled import BUNDLED, EARLIER, is_bundled
from hydra_core.decoding import DraftModelSettings, find_draft_model
from hydra_core.decoding import check_heads as check_folder
from hydra_core.decoding.configuration import DRAFT_MODEL
from hydra_core.errors import InputError
from hydra_core.storage import as_path
from pipelines.bench.champion import HEADS_FILES, BenchChampion, find_champion, heads_digest
from pipelines.bench.llama_cpp import check_llama
from pipelines.bench.plan import (
    CHAMPION,
    COMBINED,
    LLAMA,
    LOOKUP,
    NGRAM,
    PLAIN,
    SUFFIX,
    SWEEP,
    TRANSFORMERS,
    contender,
    drafts_in_vllm,
    own_heads,
    split_sweep,
    sweep_tree,
)
from pipelines.bench.vllm_setup import check_vllm
from pipelines.config import BenchSection, RunConfig
from pipelines.config.bench import VLLM, is_vllm
from pipelines.runtime.artifacts import (
    RunPaths,
    file_digest,
    fingerprint,
    input_digest,
    read_manifest,
    recorded_settings,
    require_manifest,
)
from pipelines.runtime.ray_cluster import measuring_device
from pipelines.serve.model_identity import model_digest
from pipelines.serve.stage import find_args
from pipelines.tracking.lookup import bundled_heads


def find_heads(config: RunConfig) -> dict[str, str]:
    """Drafter name -> checkpoint folder: `bench.heads`, else what `tree` (or `train`) left in this run; and `bundled` where
    the package has heads for this base.

    Raises InputError for a folder that is not a heads checkpoint.
    """
    packaged = bundled_heads(config)
    last = {} if packaged is None else {BUNDLED: packaged}
    if config.bench.heads:
        folder = Path(packaged) if is_bundled(config.bench.heads) and packaged else as_path(config.bench.heads)
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["heads"]["kind"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"bench.heads={folder}: is not a heads checkpoint (no readable config.json)") from None
        return {str(kind): str(folder)} | ({} if str(folder) == packaged else last)
    found = {}
    for name in config.train.drafters:
        for stage in ("tree", "train"):
            folder = RunPaths.of(config).stage(stage, name)
            if read_manifest(folder) is not None and (folder / "heads").is_dir():
                found[name] = str(folder / "heads")
                break
    return found | last


def find_methods(config: RunConfig, heads: dict[str, str]) -> tuple[str, ...]:
    """The contenders, plain decoding first; the champion only if `bench.methods` names it. Raises InputError for a name in
    `bench.methods` that is none."""
    theirs, others = ((), ()) if config.bench.temperature else ((TRANSFORMERS, LOOKUP), (LLAMA, VLLM))
    in_vllm = tuple(f"{VLLM}+{name}" for name in (NGRAM, *heads)) if others else ()
    model = (DRAFT_MODEL,) if config.draft_model.model else ()
    known = (PLAIN, *theirs, NGRAM, *model, *heads, *((COMBINED,) if own_heads(heads) else ()), *others, *in_vllm, SUFFIX)
    asked = tuple(contender(method) if is_bundled(method.partition("@")[0]) else method for method in config.bench.methods)
    asked = asked or tuple(method for method in known if method not in (LOOKUP, *others, *in_vllm, SUFFIX))
    for method in asked:
        if method == DRAFT_MODEL and not model:
            raise InputError(f"bench.methods: {method} needs draft_model.model: name a small model with the base's tokenizer")
        if method not in (*known, CHAMPION) and _without_number(method, heads) not in (*heads, *in_vllm):
            raise InputError(f"bench.methods: {method!r} is none of {', '.join(known)} (heads must be trained first), "
                             "nor NAME@N of a trained drafter NAME and a number N, of nodes or in vLLM of drafted tokens")
    first = next((place for place, method in enumerate(asked) if is_vllm(method)), None)
    if first is not None:  # what drafts there is compared with it
        asked = (*asked[:first], VLLM, *asked[first:])
    return tuple(dict.fromkeys((PLAIN, *asked)))


def _without_number(method: str, heads: Mapping[str, str]) -> str:
    """NAME of a contender `NAME@N`, with N at least 1; else the contender."""
    if not is_vllm(method):
        return split_sweep(method, heads)[0]
    name, count = drafts_in_vllm(method, heads)
    return f"{VLLM}+{name}" if name and count else method


def with_champion(config: RunConfig, heads: dict[str, str],
                  methods: tuple[str, ...]) -> tuple[tuple[str, ...], BenchChampion | None]:
    """The contenders with the registry's champion as the last one, unless one of them is the same; and the champion. Raises
    InputError and StoppedError as `find_champion` does."""
    champion = find_champion(config, heads, methods)
    others = tuple(method for method in methods if method != CHAMPION)
    return (*others, CHAMPION) if champion is not None and champion.method == CHAMPION else others, champion


def check_contenders(config: RunConfig, methods: tuple[str, ...], heads: dict[str, str]) -> None:
    """Raise InputError, before anything runs, unless llama.cpp and vLLM can run and the draft model is there where they are asked
    for, and every checkpoint loads on this base."""
    if LLAMA in methods:
        check_llama(config.base.model)
    if DRAFT_MODEL in methods:
        _draft_digest(config)
    for name, nodes in (split_sweep(method, heads) for method in methods if not is_vllm(method)):
        if nodes is not None:
            sweep_tree(as_path(heads[name]), nodes)
    check_heads(config, heads)
    check_vllm(config, methods, heads)


def check_heads(config: RunConfig, heads: Mapping[str, str]) -> None:
    """Raise InputError unless every checkpoint loads on this base."""
    if not heads:
        return
    vocabulary = load_vocabulary(config.base.model, dtype=config.base.dtype, cache=RunPaths.of(config).cache)
    for folder in heads.values():
        try:
            check_folder(folder, vocabulary)
        except InputError as error:
            raise InputError(f"bench.heads: {error}") from None


def input_digests(config: RunConfig, heads: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Name -> digest and path of everything that is read."""
    distilled = RunPaths.of(config).stage("distill")
    if config.bench.prompts:
        found = {"prompts": (file_digest(as_path(config.bench.prompts)), config.bench.prompts)}
    else:
        found = {"prompts": (str(require_manifest(distilled, "distill")["fingerprint"]), str(distilled / "prompts"))}
    return found | {f"{name} heads": (heads_digest(as_path(folder)), folder) for name, folder in heads.items()}


def bench_fingerprint(config: RunConfig, heads: dict[str, str], device: str | None = None, champion: str | None = None) -> str:
    """Digest of what a bench measures: settings, prompts and the heads' files. `device`: what an earlier version would have put
    into it, `base.device` as it is written; default: `auto` wherever that comes to the same. `champion`: digest of the
    configuration that is timed as `@champion`.

    Settings and contenders that were renamed have their earlier names in it, so that a bench that an earlier version finished
    is still found. Raises InputError for missing files.
    """
    resolved = resolve_base(config.base.model, RunPaths.of(config).cache)
    upstream = {"base": resolved.digest}
    for name, folder in heads.items():
        recorded = EARLIER if name == BUNDLED else name
        upstream |= {f"{recorded}/{file}": _digest(as_path(folder) / file) for file in HEADS_FILES}
        if any(split_sweep(method, heads)[0] == name != method for method in map(contender, config.bench.methods)):
            upstream[f"{recorded}/{SWEEP}"] = _digest(as_path(folder) / SWEEP)
    if config.bench.prompts:
        path = as_path(config.bench.prompts)
        if not path.is_file():
            raise InputError(f"bench.prompts={path}: no such file")
        upstream["prompts"] = input_digest("bench.prompts", path)
    elif (manifest := read_manifest(RunPaths.of(config).stage("distill"))) is not None:
        upstream["prompts"] = manifest["fingerprint"]
    if champion is not None:
        upstream[CHAMPION] = champion
    if config.bench.batch_job:
        upstream["batch"] = str(model_digest(find_args(config)))
    draft = {} if config.draft_model.model is None else {"draft_model": config.draft_model.model_dump(exclude={"model"})}
    if draft and DRAFT_MODEL in find_methods(config, heads):
        upstream[DRAFT_MODEL] = _draft_digest(config)
    settings = {"bench": _recorded_settings(config.bench), "ngram": config.ngram.model_dump(), **draft,
                "base": config.base.model_dump(exclude={"model"}) | {"device": device or _device(config)}}
    return fingerprint("bench", settings, upstream)


def _draft_digest(config: RunConfig) -> str:
    """Digest of the draft model's files. Raises InputError when there is none."""
    return find_draft_model(DraftModelSettings.of(config.draft_model.model_dump()), RunPaths.of(config).cache).digest


def _device(config: RunConfig) -> str:
    return "auto" if measuring_device(config) == measuring_device(config, "auto") else config.base.device


def fingerprints(config: RunConfig, heads: dict[str, str], champion: dict[str, Any] | None) -> set[str]:
    """The fingerprints that a bench of these settings may have; `champion`: the one that took part (see `recorded_champion`)."""
    digest = str(champion["digest"]) if champion and champion["method"] == CHAMPION else None
    return {bench_fingerprint(config, heads, device, digest) for device in (None, config.base.device)}


LATER = (("shared_answers", 0), ("prefix_cache_tokens", 0), ("vllm_python", None), ("vllm_settings", {}))
"""Settings that came later, with the value that all benches before them had."""


def _recorded_settings(section: BenchSection) -> dict[str, Any]:
    """Without `champion`: what counts is which one took part; and without what is left at the default that all earlier versions
    had."""
    values = {name: value for name, value in recorded_settings(section).items()
              if name != "champion" and (name, value) not in LATER}
    return values | {"heads": EARLIER if values["heads"] == BUNDLED else values["heads"],
                     "methods": tuple(re.sub(rf"^{BUNDLED}(?=@|$)", EARLIER, method) for method in values["methods"])}


def _digest(path: Path) -> str:
    if not path.is_file():
        again = ": run `hydra-heads tree` again" if path.name == SWEEP else ""
        raise InputError(f"bench.heads={path.parent}: is not a complete heads checkpoint: {path.name} is missing{again}")
    return input_digest("bench.heads", path)
