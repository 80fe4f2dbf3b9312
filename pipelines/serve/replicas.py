"""What all replicas of an application say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import serve

from hydra_core.errors import InputError

SECONDS = 60.0


def together(infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One for all: sums of what each has, a fault or a rejection of any, and what the first decodes with. During an update
    replicas differ: `configurations` names all. Raises ValueError where there is none."""
    if not infos:
        raise ValueError("no replica answers")
    sums = {name: sum(info[name] for info in infos) for name in ("in_flight", "running", "slots")}
    rejected = next((info["rejected"] for info in infos if info["rejected"] is not None), None)
    return infos[0] | sums | {"replicas": len(infos), "failed": any(info["failed"] for info in infos), "rejected": rejected,
                              "configurations": sorted({info["configuration"] for info in infos})}


def ask_replicas(app_name: str) -> dict[str, Any]:
    """The same from outside the application. Raises InputError where no replica answers in a minute, or something else
    runs under that name."""
    try:
        return together(serve.get_deployment_handle("DecodeServer", app_name).broadcast("info").results(timeout_s=SECONDS))
    except KeyError as missing:
        raise InputError(f"serve.app_name={app_name}: runs something else, without {missing}: choose another name") from None
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"serve.app_name={app_name}: its replicas do not answer ({why}): see its log, or delete it") from None
