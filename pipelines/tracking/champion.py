"""Who is champion: the version of a registered model that an alias names, since when, after which, and how that changes.

What MLflow does not record stands in tags of the versions:

    alias                          the alias that the version was promoted to
    promoted_at, promoted_by       when it became champion, by whom; `promoted_reason`: why, in a person's words
    previous_champion              the version that was champion before, or `none`
    not_promoted                   why a registered version did not get the alias
    rolled_back_at, _by, _reason, _to      when the alias was taken back from it, by whom, why, and given to which version
    restored_at, _by, _reason, _from       the same on the version that got it back

MLflow changes an alias whatever it named before. Of several promotions at the same time one wins all the same: a version and its
tags are created at once and numbers are given in order, so of those that replace the same champion the lowest number wins.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError, StoppedError
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.console import say
from pipelines.runtime.faults import first_line
from pipelines.runtime.lock import only_run
from pipelines.tracking.address import registry_uri
from pipelines.tracking.client import MlflowClient, MlflowException
from pipelines.tracking.registry import UNKNOWN, NotRegistered, register, registry_client, resolve
from pipelines.tracking.run_tags import user_name
from pipelines.tracking.runs import Run

NONE = "none"
"""Value of `previous_champion` on the first one."""
WAIT = 120.0
"""Seconds for which a promotion waits for another one of the same model."""
PENDING = 60.0
"""Seconds after which a version that was registered and did not get its alias counts as given up."""
LONGEST_TAG = 1000
"""Characters of a tag, which a table shows in one cell."""
VERSIONS = 1000
"""The latest ones of a model, that are looked at."""


@dataclass(frozen=True)
class Version:
    """A registered version. `created`: seconds since 1970, by the registry's clock."""

    number: int
    created: float
    tags: Mapping[str, str]

    @property
    def since(self) -> float:
        """When it last became champion, seconds since 1970; when it was registered, where no tag says more."""
        return max([self.created, *(_seconds(self.tags[name]) for name in ("promoted_at", "restored_at") if name in self.tags)])


@dataclass(frozen=True)
class Reign:
    """The champion: its version, and the folder of its configuration."""

    model: str
    version: Version
    folder: Path


class AliasMoved(StoppedError):
    """Another promotion was first."""


def alias_uri(config: RunConfig) -> str:
    """`models:/NAME@ALIAS` of the settings."""
    return f"models:/{config.promote.model_name}@{config.promote.alias}"


def reigning(config: RunConfig, field: str = "promote.model_name") -> Reign | None:
    """The present champion, None where the alias names no version.

    Raises InputError for a version whose files are gone, StoppedError for a registry that does not answer.
    """
    try:
        number, folder = resolve(config, alias_uri(config), RunPaths.of(config).storage / "cache" / "models", field)
    except NotRegistered:
        return None
    return Reign(f"models:/{config.promote.model_name}/{number}", _version(_client(config), config, number), folder)


def champion_number(config: RunConfig) -> int | None:
    """The number of the version that the alias names, None without one. Raises StoppedError if the registry does not answer."""
    return _named(_client(config), config)


def promote_version(config: RunConfig, run: Run, artifact_path: str, tags: Mapping[str, str], expected: int | None) -> int:
    """Register a run's artifact folder as a new version and give it the alias in place of version `expected` (None: of none);
    returns its number.

    Raises AliasMoved if another promotion was first: the new version then stands without the alias, and a tag says why.
    """
    client = _client(config)
    if (now := _named(client, config)) != expected:
        raise AliasMoved(_moved(config, now))
    name, alias = config.promote.model_name, config.promote.alias
    number = register(config, name, run, artifact_path, None,
                      {key: _short(value) for key, value in tags.items()}
                      | {"alias": alias, "previous_champion": NONE if expected is None else str(expected)})
    before = _stand_before(versions_of(config), number)
    now = _named(client, config)  # after the list: a version that is not pending there any more has its alias by now
    if not before and now == expected:
        client.set_registered_model_alias(name, alias, str(number))
        now = _named(client, config)
    if now != number:
        why = _moved(config, before[0] if before else now)
        client.set_model_version_tag(name, str(number), "not_promoted", _short(why))
        raise AliasMoved(why)
    for key, value in _event("promoted", config.promote.reason).items():
        client.set_model_version_tag(name, str(number), key, value)
    return number


def roll_back(config: RunConfig, source: int, target: int) -> None:
    """Give the alias of version `source` back to version `target`, and record that in tags of both. Raises AliasMoved if the
    alias names another version by now."""
    client, name = _client(config), config.promote.model_name
    if (now := _named(client, config)) != source:
        raise AliasMoved(_moved(config, now))
    client.set_registered_model_alias(name, config.promote.alias, str(target))
    for number, event, other in ((source, "rolled_back", ("to", target)), (target, "restored", ("from", source))):
        for key, value in (_event(event, config.promote.reason) | {f"{event}_{other[0]}": str(other[1])}).items():
            client.set_model_version_tag(name, str(number), key, value)


def champions_before(versions: Sequence[Version], number: int, alias: str) -> list[int]:
    """Numbers of the versions that were champion before version `number`, the latest first.

    `previous_champion` leads from one to the next. Where a version was deleted or has no such tag, as those of an earlier
    release, the highest lower number is the next that was promoted to this alias.
    """
    known = {version.number: version for version in versions}
    found: list[int] = []
    at = number
    while True:
        said = known[at].tags.get("previous_champion") if at in known else None
        if said == NONE:
            return found
        if said is not None and said.isdecimal() and int(said) in known and int(said) < at:
            at = int(said)
        else:
            lower = [other for other, version in known.items() if other < at and _was_champion(version, alias)]
            if not lower:
                return found
            at = max(lower)
        found.append(at)


def versions_of(config: RunConfig) -> list[Version]:
    """Every version of the model, the lowest number first; none where there is no such model."""
    client, quoted = _client(config), config.promote.model_name.replace("'", "")
    with _answers(config):
        found = client.search_model_versions(f"name = '{quoted}'", max_results=VERSIONS, order_by=["version_number DESC"])
        return sorted((_described(one) for one in found), key=lambda version: version.number)


@contextmanager
def only_promotion(config: RunConfig) -> Iterator[None]:
    """One promotion of a registry's model at a time, among those that share the storage; another one is waited for.

    Raises InputError, which names the other one, after `WAIT` seconds.
    """
    paths = RunPaths.of(config)
    name = f"{registry_uri(config)} {config.promote.model_name}"
    folder = paths.storage / "promotions" / sha256(name.encode()).hexdigest()[:16]
    deadline, told = time.monotonic() + WAIT, False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(only_run(folder, paths.storage))
                break
            except InputError as error:
                if time.monotonic() > deadline:
                    raise InputError(f"promote.model_name={config.promote.model_name}: another promotion works: {error}"
                                     ) from None
                if not told:
                    say("promote", f"waits for another promotion of {config.promote.model_name}")
                    told = True
            time.sleep(0.2)
        yield


def _stand_before(versions: Sequence[Version], number: int) -> list[int]:
    """Versions that were registered before version `number` to replace the same champion, and are about to."""
    mine = next(version for version in versions if version.number == number)
    same = ("alias", "previous_champion")
    return [other.number for other in versions
            if other.number < number and all(other.tags.get(name) == mine.tags[name] for name in same)
            and not {"promoted_at", "not_promoted"} & other.tags.keys() and mine.created - other.created < PENDING]


def _was_champion(version: Version, alias: str) -> bool:
    """An earlier release gave the alias to each version that it registered, and wrote no tags about it."""
    tags = version.tags
    if {"not_promoted", "rolled_back_at"} & tags.keys():
        return False
    return tags["alias"] == alias and "promoted_at" in tags if "alias" in tags else True


def _moved(config: RunConfig, now: int | None) -> str:
    named = "no version" if now is None else f"version {now}"
    return (f"promote: {alias_uri(config)} names {named} since another promotion or rollback that ran at the same time: this one "
            "changed nothing; run `hydra-heads bench` again to compare with that version, or `hydra-heads promote` to see")


def _named(client: MlflowClient, config: RunConfig) -> int | None:
    with _answers(config):
        try:
            found = client.get_model_version_by_alias(config.promote.model_name, config.promote.alias)
        except MlflowException as error:
            if error.error_code in UNKNOWN:
                return None
            raise
        return int(found.version)


def _version(client: MlflowClient, config: RunConfig, number: int) -> Version:
    with _answers(config):
        return _described(client.get_model_version(config.promote.model_name, str(number)))


def _described(found: Any) -> Version:
    return Version(int(found.version), float(found.creation_timestamp) / 1000, dict(found.tags))


@contextmanager
def _answers(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise StoppedError(f"{alias_uri(config)}: the registry does not answer ({first_line(error)[:200]}): run the same command "
                           "again when that is mended") from None


def _client(config: RunConfig) -> MlflowClient:
    return registry_client(config)


def _event(name: str, reason: str) -> dict[str, str]:
    """Tags that say when, by whom and why."""
    return {f"{name}_at": datetime.now(UTC).isoformat(timespec="milliseconds"), f"{name}_by": user_name(),
            f"{name}_reason": _short(reason) or "none given"}


def _seconds(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # written by hand
        return 0.0


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TAG else f"{text[:LONGEST_TAG - 3]}..."
