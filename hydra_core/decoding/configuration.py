"""A decoding configuration as a folder: `promote` registers it and `serve` loads it.

    FOLDER/configuration.json   schema version, drafter (plain, ngram, heads, combined, draft-model), base identity, n-gram
                                settings, and for a draft model its name and the trees that it drafts
    FOLDER/heads/               a heads checkpoint, where the drafter has heads
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from hydra_core.base.model import Base
from hydra_core.base.vocabulary import BaseIdentity, BaseVocabulary
from hydra_core.bundled import BUNDLED, bundled_configuration, is_bundled
from hydra_core.decoding.draft_models import DraftModelSettings, find_draft_model, open_draft_model
from hydra_core.errors import InputError
from hydra_core.files import atomic_folder
from hydra_core.heads import HeadDrafter
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.storage import as_path, local_copy
from hydra_core.tree.costs import StepCosts, unmeasured_costs
from hydra_core.tree.draft_tree import TreeSet

SCHEMA_VERSION = 1
WITH_HEADS = ("heads", "combined")
DRAFT_MODEL = "draft-model"
FILE = "configuration.json"
ANY_FORMAT = "any"
"""Weight format of a configuration that was not measured in a particular one: it fits all formats of its base."""

Costs = Callable[[HeadDrafter | None], StepCosts]


@dataclass(frozen=True)
class DecodingConfiguration:
    """Drafter and settings. `name`: as in reports; `drafter`: heads decode with their fixed trees, combined drafts dynamic
    trees from heads and copied text; `heads`: a checkpoint folder, for those two; `draft_model`: for a draft model, which stays
    where it is."""

    name: str
    drafter: Literal["plain", "ngram", "heads", "combined", "draft-model"]
    base: BaseIdentity
    ngram: NgramDrafter = field(default_factory=NgramDrafter)
    heads: Path | None = None
    draft_model: DraftModelSettings | None = None


def save_configuration(folder: Path, configuration: DecodingConfiguration) -> None:
    """Write the whole folder or nothing, with a copy of the heads. Raises InputError if the folder exists."""
    if folder.exists():
        raise InputError(f"{folder}: already exists")
    values = {"schema_version": SCHEMA_VERSION, "name": configuration.name, "drafter": configuration.drafter,
              "base": asdict(configuration.base), "ngram": asdict(configuration.ngram)}
    if configuration.draft_model is not None:
        values["draft_model"] = configuration.draft_model.to_json()
    with atomic_folder(folder) as temporary:
        if configuration.drafter in WITH_HEADS:
            assert configuration.heads is not None
            shutil.copytree(local_copy(configuration.heads), temporary / "heads")
        (temporary / FILE).write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def read_configuration(folder: Path) -> DecodingConfiguration:
    """Read configuration.json. Raises InputError when the folder is not a configuration."""
    folder = as_path(folder)
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["schema_version"] != SCHEMA_VERSION:
            raise InputError(f"{path}: schema_version {values['schema_version']} is not {SCHEMA_VERSION}")
        if values["drafter"] not in ("plain", "ngram", *WITH_HEADS, DRAFT_MODEL):
            raise InputError(f"{path}: drafter: {values['drafter']!r} is not plain, ngram, heads, combined or {DRAFT_MODEL}")
        heads = folder / "heads" if values["drafter"] in WITH_HEADS else None
        model = DraftModelSettings.of(values["draft_model"]) if values["drafter"] == DRAFT_MODEL else None
        return DecodingConfiguration(values["name"], values["drafter"], BaseIdentity(**values["base"]),
                                     NgramDrafter(**values["ngram"]), heads, model)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): name a configuration folder") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is not a decoding configuration ({error})") from None


def load_heads(folder: str | Path, base: Base,
               costs: Costs | None = None) -> tuple[Drafter | None, TreeSet | None]:
    """Drafter and trees of a heads checkpoint or of a configuration folder, ready for `Engine`, in the base's dtype; `bundled`
    stands for the folder that is bundled with the package for this base. A folder in an object store is fetched first.

    `costs`: returns the step costs of this machine for the given heads (or None); without it they are a guess.
    Raises InputError for a folder that is neither, or that belongs to another base.
    """
    found = find_heads(folder, base.identity)
    if (found / FILE).exists():
        return load_configuration(found, base, costs)
    loaded = load_checkpoint(found, base.vocabulary, base.dtype)
    return loaded.drafter, loaded.trees


def check_heads(folder: str | Path, vocabulary: BaseVocabulary) -> None:
    """Raise InputError unless `load_heads` succeeds for the base of `vocabulary`; the base itself is not needed."""
    found = find_heads(folder, vocabulary.identity)
    configuration = _configuration_of(found, vocabulary.identity) if (found / FILE).exists() else None
    if configuration is not None and configuration.draft_model is not None:
        find_draft_model(configuration.draft_model)
    heads = found if configuration is None else configuration.heads
    if heads is not None:
        load_checkpoint(heads, vocabulary)


def find_heads(folder: str | Path, identity: BaseIdentity) -> Path:
    """`folder`, fetched from an object store, or the one that `bundled` stands for. Raises InputError where none comes with the
    package for this base."""
    if not is_bundled(str(folder)):
        return local_copy(folder)
    if (found := bundled_configuration(identity.digest)) is None:
        raise InputError(f"{BUNDLED}: no heads are bundled for {identity.name} ({identity.digest[:16]}): train some")
    return found


def _configuration_of(folder: Path, identity: BaseIdentity) -> DecodingConfiguration:
    configuration = read_configuration(folder)
    measured = configuration.base
    same = measured.digest == identity.digest if measured.weight_format == ANY_FORMAT else measured == identity
    if not same:
        raise InputError(f"{folder}: was measured on base {configuration.base}, not on {identity}: "
                         "set base.model and base.dtype to the former")
    return configuration


def load_configuration(folder: Path, base: Base,
                       costs: Costs | None = None) -> tuple[Drafter | None, TreeSet | None]:
    """Drafter and trees of a configuration folder, ready for `Engine`, in the base's dtype; `costs` as in `load_heads`.

    Raises InputError for a broken folder, another base (digest or weight format) or heads that do not load.
    """
    configuration = _configuration_of(folder, base.identity)
    if configuration.drafter == "plain":
        return None, None
    if configuration.draft_model is not None:
        return open_draft_model(configuration.draft_model, base), None
    heads: HeadDrafter | None = None
    if configuration.heads is not None:
        loaded = load_checkpoint(configuration.heads, base.vocabulary, base.dtype)
        if configuration.drafter == "heads":
            return loaded.drafter, loaded.trees
        heads = loaded.drafter
    measured = costs(heads) if costs is not None else unmeasured_costs()
    return AdaptiveDrafter(heads, configuration.ngram, measured), None
