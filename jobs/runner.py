"""What every job does: arguments to a configuration, one pipeline call, the result on stdout, an exit code.

Exit 0: done; 2: a mistake of the user, 1: anything else; each with one line. That of a fault of this program names the file
with its traceback.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import re
import select
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import as_path
from jobs.paths import with_absolute_paths
from jobs.stages import STAGES
from jobs.summary import summarise
from jobs.usage import stage_details
from pipelines.config import RunConfig, load_config, parse_override, to_yaml
from pipelines.runtime.artifacts import RunPaths, StageResult
from pipelines.runtime.faults import find_cause, first_line, storage_fault
from pipelines.runtime.provenance import without_credentials
from pipelines.runtime.reachability import spare_loopback
from pipelines.runtime.stores import check_stores
from pipelines.runtime.user import complete_user

__all__ = ["STAGES", "OneLineParser", "read_config", "run", "run_command"]


class OneLineParser(argparse.ArgumentParser):
    """argparse, with this project's one-line error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def run(stage: str, argv: Sequence[str] | None = None) -> int:
    """Run `stage` with command-line arguments (default: the process's own) and return the exit code.

    On stdout stands one line of JSON, or the summary for a person where stdout is a terminal and `--json` is not given.
    """
    try:
        arguments = _parser(stage).parse_intermixed_args(argv)  # overrides may stand on both sides of --config
    except InputError as error:
        return _told(error)
    spare_loopback()
    wants_json = arguments.json or not sys.stdout.isatty()
    try:
        with _stdout_for_result() as emit:
            return _run(stage, arguments, wants_json, emit)
    except OSError as error:  # of stdout: `_run` raises none
        print(f"error: {stage}: the result cannot be written to stdout ({error.strerror}): run the same command again",
              file=sys.stderr)
        return 1


def _run(stage: str, arguments: argparse.Namespace, wants_json: bool, emit: Callable[[str], None]) -> int:
    """Run `stage`, and hand its result to `emit`; returns the exit code."""
    config: RunConfig | None = None
    try:
        default = STAGES[stage].config
        config = read_config(stage, arguments.config or (str(default) if default else None),
                             [*_overrides(stage, arguments.overrides), *arguments.flags])
        if arguments.plan:
            emit(_plan_text(config, stage, arguments.json))
            return 0
        complete_user()
        check_stores(config, stage)
        result = _pipeline(stage)(_with_format(config, stage))
        if wants_json and sys.stderr.isatty():
            sys.stderr.write(summarise(result))
        emit(result.to_json() + "\n" if wants_json else summarise(result))
        return 0
    except KeyboardInterrupt:
        print(f"{stage}: interrupted; run the same command again to continue", file=sys.stderr)
        return 1
    except Exception as error:
        cause = find_cause(error) or storage_fault(error, as_path(config.storage) if config else Path.cwd())
        return _told(cause or _unexpected(error, stage, config))


def run_command(name: str, work: Callable[[], None]) -> int:
    """Call `work`, a command that is no stage, and return its exit code; whatever it raises becomes one line on stderr."""
    try:
        work()
        return 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 1
    except OSError as error:
        where = error.filename or "the output"
        return _told(StoppedError(f"{name}: {where} cannot be read or written ({error.strerror or error})"))
    except Exception as error:
        return _told(find_cause(error) or _unexpected(error, name, None))


def _plan_text(config: RunConfig, stage: str, as_json: bool) -> str:
    """The resolved settings as YAML, and as its comments what would run and what that takes; or one line of JSON."""
    from pipelines.sizing import plan_of

    plan = plan_of(config, stage)
    return f"{plan.to_json()}\n" if as_json else to_yaml(config) + "".join(f"# {line}\n" for line in plan.lines())


def _unexpected(error: Exception, stage: str, config: RunConfig | None) -> StoppedError:
    """The one line for a fault of this program. Its traceback goes to a file, in the run's folder if there is one, or, where none
    can be written, to stderr."""
    text = without_credentials("".join(traceback.format_exception(error)))
    folder = RunPaths.of(config).run if config else Path()
    try:
        if config and folder.is_dir():
            path = folder / f"{stage}.traceback.txt"
            path.write_text(text, encoding="utf-8")
        else:
            descriptor, name = tempfile.mkstemp(prefix=f"hydra-heads-{stage}-", suffix=".traceback.txt")
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            path = Path(name)
    except OSError:
        print(text, file=sys.stderr)
        return StoppedError(f"{stage}: {type(error).__name__}: {first_line(error)[:300]}")
    return StoppedError(f"{stage}: {type(error).__name__}: {first_line(error)[:300]}: this is a fault of the program; its "
                        f"traceback is in {path}")


def read_config(stage: str, path: str | None, overrides: Sequence[str]) -> RunConfig:
    """YAML and overrides to a checked configuration whose paths are absolute. Raises InputError.

    `stage`: whose short forms the overrides may use; any other word has none.
    """
    pairs = dict(parse_override(text) for text in overrides)
    short = STAGES[stage].short if stage in STAGES else {}
    values = {short.get(name, name): value for name, value in pairs.items()}
    return with_absolute_paths(load_config(path, values), path, values)


def _overrides(stage: str, words: Sequence[str]) -> list[str]:
    """`words`, of which those without `name=` at their beginning become one override where the stage has a setting for them."""
    setting = STAGES[stage].words
    own = [word for word in words if not re.match(r"[\w.+-]+=", word)] if setting else []
    return [word for word in words if word not in own] + ([f"{setting}={json.dumps(own)}"] if own else [])


def _told(error: InputError | StoppedError) -> int:
    """Print the one line of `error`; returns the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1


def _with_format(config: RunConfig, stage: str) -> RunConfig:
    """`config` with a weight format chosen, where `base.dtype=auto` leaves the choice open and the stage has a base."""
    section = getattr(config, stage, None)
    without_base = stage == "compare" or getattr(section, "address", None) or getattr(section, "rollback", False)
    if config.base.dtype != "auto" or without_base:  # an endpoint and the registry have their own
        return config
    from pipelines.profiling.weight_format import resolve_format  # imports Ray, which a wrong setting or a plan does not need

    return resolve_format(config, stage)


def _pipeline(stage: str) -> Callable[[RunConfig], StageResult]:
    function: Callable[[RunConfig], StageResult] = getattr(importlib.import_module(f"pipelines.{stage}"), f"run_{stage}")
    return function


def _parser(stage: str) -> argparse.ArgumentParser:
    about = STAGES[stage]
    words = f"{about.metavar} ... " if about.metavar else ""
    parser = OneLineParser(prog=f"hydra-heads {stage}", description=about.summary, add_help=False,
                     usage=f"hydra-heads {stage} [--config FILE] [--plan] [--json] {words}[section.field=value ...]")
    parser.add_argument("-h", "--help", action=_Help, help="print this help; start nothing")
    default = f"{about.config.name} of the package" if about.config else "the defaults"
    parser.add_argument("--config", metavar="FILE", help=f"YAML file of settings; without it {default}")
    parser.add_argument("--plan", action="store_true",
                        help="print the resolved settings, what would run and what it takes; start nothing")
    parser.add_argument("--json", action="store_true",
                        help="print the result as one line of JSON on a terminal too; with --plan, its numbers")
    for flag in about.flags:
        parser.add_argument(flag.name, action="append_const", const=flag.override, dest="flags", help=flag.text)
    parser.set_defaults(flags=[])
    parser.add_argument("overrides", nargs="*", metavar=f"{words}section.field=value", help=argparse.SUPPRESS)
    return parser


class _Help(argparse.Action):
    """`--help`: argparse's own text, then example and settings."""

    def __init__(self, option_strings: Sequence[str], dest: str, **words: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=words.get("help"))

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        print(f"{parser.format_help()}\n{stage_details(parser.prog.split()[-1])}")
        parser.exit()


@contextmanager
def _stdout_for_result() -> Iterator[Callable[[str], None]]:
    """Keep stdout for the result alone. Whatever else is written to it meanwhile, by C code too, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    pending: list[str] = []
    try:
        with redirect_stdout(sys.stderr):
            yield pending.append
    finally:
        sys.stderr.flush()
        ctypes.CDLL(None).fflush(None)  # C code's buffered text would otherwise follow the result
        os.dup2(kept, 1)
        os.close(kept)
        for text in pending:
            _write_all(text.encode())


def _write_all(data: bytes) -> None:
    """Write `data` to stdout, which may take it in pieces: a pipe whose reader is slow, a terminal that does not block."""
    while data:
        try:
            data = data[os.write(1, data):]
        except BlockingIOError:
            select.select([], [1], [])
