"""The registry's champion as a contender of `bench`, so that `promote` compares on one machine in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra_core.base import load_vocabulary, resolve_base
from hydra_core.decoding import DecodingConfiguration, check_heads, read_configuration
from hydra_core.decoding.configuration import ANY_FORMAT, DRAFT_MODEL
from hydra_core.errors import InputError, StoppedError
from hydra_core.proposers import NgramDrafter
from hydra_core.storage import as_path
from pipelines.bench.plan import CHAMPION, COMBINED, DYNAMIC_TREES, NGRAM, PLAIN, combined_heads
from pipelines.config import RunConfig
from pipelines.rows.schemas import content_id
from pipelines.runtime.artifacts import RunPaths, file_digest
from pipelines.runtime.console import say
from pipelines.serve.model_identity import configuration_digest

HEADS_FILES = ("model.safetensors", "tree.json")
FIGURE = "comparison"
"""Figure of a bench: when it was measured, and the champion that took part."""


@dataclass(frozen=True)
class BenchChampion:
    """The champion that takes part in a bench. `model`: `models:/NAME/VERSION`; `digest`: of the files in `folder`, its
    configuration; `method`: the contender that it is timed as, `@champion` or one of the run's own that is the same."""

    model: str
    version: int
    digest: str
    folder: str
    method: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return asdict(self)


def find_champion(config: RunConfig, heads: Mapping[str, str], methods: Sequence[str]) -> BenchChampion | None:
    """The champion to time, None where none takes part.

    `heads`: name -> checkpoint folder; `methods`: the other contenders. With `bench.champion=auto` a registry that does not
    answer and a champion that cannot be timed are told in one line; with `true` they raise StoppedError and InputError.
    """
    asked = config.bench.champion
    if asked is False or (asked == "auto" and not config.bench.single and CHAMPION not in methods):
        return None
    must = asked is True or CHAMPION in methods
    try:
        return _found(config, heads, methods, must)
    except (InputError, StoppedError) as error:
        if must:
            raise
        say("bench", f"the champion is not timed: {error}")
        return None


def recorded_champion(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The champion that took part in a finished bench, as `BenchChampion.to_json` wrote it; None for a bench without one."""
    found = (manifest["result"]["figures"].get(FIGURE) or {}).get("champion")
    return dict(found) if found else None


def _found(config: RunConfig, heads: Mapping[str, str], methods: Sequence[str], must: bool) -> BenchChampion | None:
    from pipelines.tracking.champion import alias_uri, reigning  # MLflow

    reign = reigning(config, "bench.champion")
    if reign is None:
        if must:
            raise InputError(f"bench.champion={config.bench.champion}: {alias_uri(config)} names no version: promote one first, "
                             "or leave it at auto")
        return None
    configuration = read_configuration(reign.folder)
    own = resolve_base(config.base.model, RunPaths.of(config).cache)
    if configuration.base.digest != own.digest or configuration.base.weight_format not in (config.base.dtype, ANY_FORMAT):
        raise InputError(f"bench.champion: {reign.model} is of another base ({configuration.base}) than base.model="
                         f"{config.base.model} in {config.base.dtype}: set promote.model_name or promote.alias, or "
                         "bench.champion=false")
    ngram = NgramDrafter(config.ngram.max_match, config.ngram.min_match, config.ngram.length)
    same = same_contender(configuration, heads, methods, ngram, config.draft_model.values())
    if same is None:
        check_heads(reign.folder, load_vocabulary(config.base.model, dtype=config.base.dtype, cache=RunPaths.of(config).cache))
    return BenchChampion(reign.model, reign.version.number, configuration_digest(reign.folder), str(reign.folder),
                         same or CHAMPION)


def same_contender(configuration: DecodingConfiguration, heads: Mapping[str, str], methods: Sequence[str],
                   ngram: NgramDrafter, draft_model: Mapping[str, Any] | None = None) -> str | None:
    """The contender among `methods` that decodes just as `configuration`: with the same files of heads and the same settings of
    text lookup or of the draft model. None without one."""
    if configuration.drafter == "plain":
        return PLAIN
    if configuration.drafter == "ngram":
        return NGRAM if NGRAM in methods and configuration.ngram == ngram else None
    if configuration.draft_model is not None:
        return DRAFT_MODEL if DRAFT_MODEL in methods and configuration.draft_model.to_json() == draft_model else None
    assert configuration.heads is not None
    dynamic = configuration.drafter == "combined"
    if dynamic and configuration.ngram != ngram:
        return None
    wanted = heads_digest(configuration.heads)
    for method in methods:
        folder = combined_heads(heads) if method == COMBINED else heads.get(method)
        if folder is not None and (method in DYNAMIC_TREES) == dynamic and heads_digest(as_path(folder)) == wanted:
            return method
    return None


def heads_digest(folder: Path) -> str:
    """Digest of the weights and the tree of a heads checkpoint."""
    return content_id(*(file_digest(folder / file) for file in HEADS_FILES))
