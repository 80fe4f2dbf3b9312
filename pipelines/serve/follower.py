"""Heads that follow the registry: when the alias of a running application names another version, that one decodes.

    front (asks now and then, or when a webhook comes) -> Follower, an actor beside it -> MLflow
                                                             `-> update_app: checks the heads, then swaps them in every replica

The actor is the front's child, and so ends with the application, whoever deployed it. It is a process of its own, because
MLflow's client, downloads and the check of heads would hold up answers in the front.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from hydra_core.errors import InputError, StoppedError
from pipelines.config import RunConfig
from pipelines.runtime.faults import find_cause, first_line
from pipelines.runtime.logs import speak
from pipelines.serve.following import Follow
from pipelines.serve.instance import ask_front
from pipelines.serve.messages import AppArgs
from pipelines.serve.stage import check_args, update_app
from pipelines.tracking.lookup import Model, find_model

Outcome = Literal["same", "changed", "rejected", "unnamed", "later", "silent"]
"""What a look at the registry gave: the version that decodes already (or was rejected before); another one, which decodes now;
another one that was rejected, so that the earlier one stays; an alias that names nothing; another one that no replica could take
at this moment; no answer."""


@dataclass(frozen=True)
class Look:
    """What one look gave. `version`: that the alias names, where the registry said so; `why`: one line, where something is
    wrong."""

    outcome: Outcome
    version: int | None = None
    why: str = ""


class Follower:
    """Looks at the registry for one application; an actor. What the alias names decodes: heads that somebody has given to the
    application otherwise go at the next look. Those that were rejected are not tried again until the alias names others."""

    def __init__(self, args: AppArgs) -> None:
        speak()
        assert args.follow is not None
        follow = Follow(**args.follow)
        self.args, self.follow = args, follow
        self.config = RunConfig.model_validate({
            "storage": follow.storage, "tracking": follow.tracking, "promote": follow.promote, "base": args.base,
            "serve": {"model": follow.model}})
        self._rejected: tuple[str | None, int | None] | None = None

    def look(self) -> dict[str, Any]:
        """The fields of a `Look`. Raises nothing: whatever the registry does, the application goes on."""
        try:
            return asdict(self._look())
        except Exception as error:
            return asdict(Look("silent", None, first_line(error)))

    def _look(self) -> Look:
        try:
            model = find_model(self.config, self.follow.model)
        except StoppedError as error:
            return Look("silent", None, str(error))
        except InputError as error:
            return Look("unnamed", None, str(error))
        wanted = (None if model.folder is None else str(model.folder), model.version)
        if wanted == self._rejected:
            return Look("same", model.version)
        try:
            outcome = self._change(model, wanted)
        except Exception as error:
            cause = find_cause(error)
            if isinstance(cause, InputError):
                self._rejected = wanted
                return Look("rejected", model.version, str(cause))
            return Look("later", model.version, first_line(cause or error))
        self._rejected = None
        return Look(outcome, model.version)

    def _change(self, model: Model, wanted: tuple[str | None, int | None]) -> Outcome:
        """Let the application decode with `model` unless it does so already. Raises as `check_args` and `update_app`."""
        running = ask_front(self.args.app_name)["replicas"]
        if running and (running[0]["heads"]["configuration"], running[0]["heads"]["version"]) == wanted:
            return "same"
        update_app(check_args(with_model(self.args, model)))
        return "changed"


def with_model(args: AppArgs, model: Model) -> AppArgs:
    """`args` with these heads, unchecked."""
    return replace(args, configuration=None if model.folder is None else str(model.folder), label=model.label,
                   version=model.version, digest=None)
