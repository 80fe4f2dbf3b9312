"""`promote --rollback`: the alias goes back to the version that was champion before."""

from __future__ import annotations

from hydra_core.decoding import read_configuration
from hydra_core.errors import InputError
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths, StageResult
from pipelines.runtime.console import say
from pipelines.tracking import resolve
from pipelines.tracking.champion import (
    alias_uri,
    champion_number,
    champions_before,
    only_promotion,
    roll_back,
    versions_of,
)

STAGE = "promote"


def run_rollback(config: RunConfig) -> StageResult:
    """Give the alias to the champion before the present one, and record on both versions when, by whom and why
    (`promote.reason`).

    Done again, it goes further back. A version whose files are gone or that was deleted is passed over, with a line. Raises
    InputError where nothing is registered under the alias, and where there is nothing to go back to.
    """
    with only_promotion(config):
        now = champion_number(config)
        if now is None:
            raise InputError(f"promote.rollback: {alias_uri(config)} names no version: promote one first")
        earlier = champions_before(versions_of(config), now, config.promote.alias)
        for number in earlier:
            model = f"models:/{config.promote.model_name}/{number}"
            try:
                _, folder = resolve(config, model, RunPaths.of(config).storage / "cache" / "models", "promote.rollback")
                name = read_configuration(folder).name
            except InputError as error:
                say("promote", f"version {number} is passed over: {error}")
                continue
            why = f"rolled back from version {now}" + (f": {config.promote.reason}" if config.promote.reason else "")
            if config.promote.dry_run:
                say("promote", f"{alias_uri(config)} would go from version {now} to version {number} ({name})")
            else:
                roll_back(config, now, number)
                say("promote", f"{alias_uri(config)} is version {number} ({name}) again, {why}")
            return StageResult(STAGE, None, {"model": alias_uri(config)}, {
                "champion": name, "version": number, "rolled_back": now, "why": why,
                **({"dry_run": True} if config.promote.dry_run else {})})
    raise InputError(f"promote.rollback: version {now} has no champion before it that could be restored: there is nothing to go "
                     "back to")
