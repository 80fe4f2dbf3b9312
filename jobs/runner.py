"""What every job does: arguments to a configuration, one pipeline call, one JSON line, an exit code.

Exit 0: done; 2: the user's mistake, told in one line; 1: anything else, with its traceback (an interrupt, and work that stopped
itself: with one line).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from hydra_core.bundled import BUNDLED, EARLIER
from hydra_core.errors import InputError, StoppedError
from pipelines.config import RunConfig, load_config, parse_override, to_yaml
from pipelines.runtime.artifacts import StageResult
from pipelines.runtime.dry_run import describe

STAGES = {
    "quickstart": "every stage below, small, on this machine",
    "distill": "prompts in; the base's own answers and hidden states out",
    "train": "train draft heads on those rows",
    "ablate": "variants of training on the same rows, side by side",
    "tree": "find the draft tree that pays best on this machine",
    "bench": "plain, transformers, n-gram lookup and every drafter on the same prompts",
    "compare": "benches from MLflow side by side",
    "promote": "register the fastest lossless configuration as champion",
    "generate": "answer prompts here and now, as fast as a champion or the package's own heads draft",
    "serve": "OpenAI-compatible endpoint that decodes speculatively",
    "batch": "offline generation over a prompt file",
    "load": "requests at a constant rate, up to twice what the endpoint can answer",
}
ALIASES = {"bench": {"prompts": "bench.prompts", "heads": "bench.heads", "limit": "bench.limit",
                     "max_new_tokens": "bench.max_new_tokens"},
           "generate": {"model": "generate.model", "max_new_tokens": "generate.max_new_tokens"}}
POSITIONAL = {"compare": "compare.runs", "generate": "generate.prompts"}
"""Stages whose words without `=` are a list of their own."""
FLAGS = {"train": (("--dry-run", "train.dry_run=true", "train nothing; save untrained heads, to try serving with"),),
         "serve": (("--update", "serve.update=true", "give the running application other heads, and end"),)}
"""Stage -> flags, the overrides that they stand for, what they do."""
DEFAULT_CONFIGS = {"quickstart": str(Path(__file__).parent / "configs" / "quickstart.yaml")}
PATH_FIELDS = ("prompts.path", "distill.heads", "bench.prompts", "bench.heads", "batch.input", "batch.output", "load.prompts",
               "serve.model", "generate.model", "serve.api_keys_file", "base.model")
WORDS = {"serve.model": ("plain", BUNDLED, EARLIER), "generate.model": ("plain", BUNDLED, EARLIER),
         "bench.heads": (BUNDLED, EARLIER), "distill.heads": (BUNDLED, EARLIER), "train.start": (BUNDLED, EARLIER)}
"""What such a field may say that is no path."""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray (to this very name) for the entry point of a submitted job."""
UNPACKED = "/runtime_resources/working_dir_files/"
"""Part of the path of every working directory that Ray has unpacked."""


class _Parser(argparse.ArgumentParser):
    """argparse, with our one-line error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run(stage: str, argv: Sequence[str] | None = None) -> int:
    """Run `stage` with command-line arguments (default: the process's own) and return the exit code."""
    try:
        arguments = _parser(stage).parse_intermixed_args(argv)  # overrides may stand on both sides of --config
    except InputError as error:
        return _mistake(error)
    with _stdout_for_result() as emit:
        try:
            config = read_config(stage, arguments.config or DEFAULT_CONFIGS.get(stage),
                                 [*_overrides(stage, arguments.overrides), *arguments.flags])
            if arguments.plan:
                emit(to_yaml(config) + "".join(f"# {line}\n" for line in describe(config, stage)))
                return 0
            emit(_pipeline(stage)(_with_format(config, stage)).to_json() + "\n")
            return 0
        except KeyboardInterrupt:
            print(f"{stage}: interrupted; run the same command again to go on", file=sys.stderr)
            return 1
        except StoppedError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        except Exception as error:
            if (mistake := find_mistake(error)) is not None:
                return _mistake(mistake)
            traceback.print_exc()
            return 1


def find_mistake(error: BaseException) -> InputError | None:
    """The InputError that `error` is or was made of, or None.

    Ray makes other exceptions of one that leaves a task, a training worker or an actor; their text is a traceback. What was
    being handled counts for those alone: a fault of ours in the middle of handling a mistake is a fault.
    """
    seen: list[BaseException] = []
    todo: list[Any] = [error]
    while todo:
        found = todo.pop(0)
        if not isinstance(found, BaseException) or found in seen:
            continue
        inner = getattr(found, "cause", None)  # of a RayTaskError, which is an InputError itself when that is its cause
        if isinstance(found, InputError) and not isinstance(inner, BaseException):
            return found
        seen.append(found)
        todo += [inner, *getattr(found, "worker_failures", {}).values(), found.__cause__]
        todo += [found.__context__] if type(found).__module__.startswith("ray.") else []
    return None


def _overrides(stage: str, words: Sequence[str]) -> list[str]:
    """`words` with those of a stage's own list turned into an override; a text with `=` somewhere in it is one of those."""
    field = POSITIONAL.get(stage)
    own = [word for word in words if not re.match(r"[\w.+-]+=", word)] if field else []
    return [word for word in words if word not in own] + ([f"{field}={json.dumps(own)}"] if own else [])


def _mistake(error: InputError) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def read_config(stage: str, path: str | None, overrides: Sequence[str]) -> RunConfig:
    """YAML and overrides to a checked configuration whose paths are absolute. Raises InputError."""
    pairs = dict(parse_override(text) for text in overrides)
    aliases = ALIASES.get(stage, {})
    values = {aliases.get(name, name): value for name, value in pairs.items()}
    return _with_absolute_paths(load_config(path, values), path, values)


def _with_absolute_paths(config: RunConfig, path: str | None, values: Mapping[str, Any]) -> RunConfig:
    """Relative paths are the caller's; inside a submitted job they would point into Ray's unpacked copy."""
    changed = dict(values)
    for dotted in PATH_FIELDS:
        section, name = dotted.split(".")
        value = getattr(getattr(config, section), name)
        if isinstance(value, str) and _is_relative_path(dotted, value, config):
            changed[dotted] = _absolute(dotted, value)
    start = {name: _absolute(f"train.start.{name}", value) if _is_relative_path("train.start", value, config) else value
             for name, value in config.train.start.items()}
    if start != config.train.start:
        changed["train.start"] = start
    return load_config(path, changed) if changed != dict(values) else config


def _absolute(dotted: str, value: str) -> str:
    if inside_submitted_job():
        raise InputError(f"{dotted}={value}: is a relative path, which means nothing inside a submitted job: make it absolute")
    return str(Path(value).expanduser().resolve())


def _is_relative_path(dotted: str, value: str, config: RunConfig) -> bool:
    if os.path.isabs(value) or value.startswith(("models:/", "embedded:")):
        return False
    if dotted == "base.model":
        return value.startswith((".", "~")) or value.endswith(".gguf") or Path(value).is_dir()
    if dotted == "prompts.path" and config.prompts.source == "datasets":
        return value.startswith((".", "~")) or Path(value).exists()
    return value not in WORDS.get(dotted, ())


def inside_submitted_job() -> bool:
    """Whether this process is the entry point of a Ray job, or runs in a working directory that Ray unpacked.

    RAY_ADDRESS says nothing: people export it where they submit from.
    """
    return bool(os.environ.get(JOB_VARIABLE)) or UNPACKED in f"{Path.cwd().as_posix()}/"


def _with_format(config: RunConfig, stage: str) -> RunConfig:
    """`config` with the weight format chosen, where that is left to us and the stage has a base."""
    if config.base.dtype != "auto" or stage == "compare":
        return config
    from pipelines.profiling.weight_format import resolve_format  # which needs Ray, as few commands do that fail or only plan

    return resolve_format(config, stage)


def _pipeline(stage: str) -> Callable[[RunConfig], StageResult]:
    return getattr(importlib.import_module(f"pipelines.{stage}"), f"run_{stage}")


def _parser(stage: str) -> argparse.ArgumentParser:
    aliases = ALIASES.get(stage, {})
    short = f" Short for this stage: {', '.join(f'{name}=' for name in aliases)}." if aliases else ""
    parser = _Parser(prog=f"hydra-heads {stage}", description=STAGES[stage],
                     epilog="Overrides are section.field=value, read as YAML." + short)
    parser.add_argument("--config", metavar="FILE",
                        help="YAML configuration; without it the defaults (quickstart: its own)")
    parser.add_argument("--plan", action="store_true",
                        help="print the resolved configuration and what would run; start nothing")
    for flag, override, text in FLAGS.get(stage, ()):
        parser.add_argument(flag, action="append_const", const=override, dest="flags", help=text)
    parser.set_defaults(flags=[])
    words = {"compare": "RUN ... ", "generate": "PROMPT ... "}.get(stage, "")
    parser.add_argument("overrides", nargs="*", metavar=f"{words}section.field=value")
    return parser


@contextmanager
def _stdout_for_result() -> Iterator[Callable[[str], None]]:
    """Keep stdout for the result alone: whatever else writes to it, C code included, goes to stderr meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    pending: list[str] = []
    try:
        with redirect_stdout(sys.stderr):
            yield pending.append
    finally:
        sys.stderr.flush()
        ctypes.CDLL(None).fflush(None)  # what C code still holds back would follow the result
        os.dup2(kept, 1)
        os.close(kept)
        for text in pending:
            os.write(1, text.encode())
