"""`hydra-heads STAGE ...`, which is the same as `python -m jobs.STAGE ...`, `hydra-heads config`, `hydra-heads cluster`,
`hydra-heads import` and `hydra-heads export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata

from hydra_core.errors import InputError
from jobs.cluster import main as cluster
from jobs.export import main as export
from jobs.import_heads import main as import_heads
from jobs.runner import STAGES, read_config, run
from jobs.usage import command_help
from pipelines.config import RunConfig, nearest, reference_page, to_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(command_help(), end="")
        return 0
    if arguments[0] == "--version":
        print(metadata.version("hydra-heads"))
        return 0
    if arguments[0] == "config":
        return print_config(arguments[1:])
    if arguments[0] == "cluster":
        return cluster(arguments[1:])
    if arguments[0] == "import":
        return import_heads(arguments[1:])
    if arguments[0] == "export":
        return export(arguments[1:])
    if arguments[0] not in STAGES:
        near = nearest(arguments[0], [*STAGES, "config", "cluster", "import", "export"])
        hint = f"did you mean {near}? " if near else ""
        print(f"error: {arguments[0]!r} is not a stage: {hint}choose one of {', '.join(STAGES)}", file=sys.stderr)
        return 2
    return run(arguments[0], arguments[1:])


def print_config(words: Sequence[str]) -> int:
    """Print the settings that `--config FILE` and overrides make, or with `--describe` the reference of every setting,
    or with `--sizes` the page of what bases take."""
    if "--describe" in words:
        print(reference_page(RunConfig), end="")
        return 0
    if "--sizes" in words:
        from pipelines.sizing import sizes_page  # imports torch

        print(sizes_page(), end="")
        return 0
    if {"-h", "--help"} & set(words):
        print("usage: hydra-heads config [--config FILE] [section.field=value ...]    print the resolved settings as YAML\n"
              "       hydra-heads config --describe                                   print the reference of every setting\n"
              "       hydra-heads config --sizes                                      print what 1B, 8B and 70B bases take")
        return 0
    rest, path = list(words), None
    if "--config" in rest:
        at = rest.index("--config")
        path, rest = (rest[at + 1] if at + 1 < len(rest) else ""), rest[:at] + rest[at + 2:]
        if not path or "=" in path:
            print("error: config --config: name a file: --config FILE", file=sys.stderr)
            return 2
    try:
        print(to_yaml(read_config("config", path, rest)), end="")
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
