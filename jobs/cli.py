"""`hydra-heads <stage> ...`: the same as `python -m jobs.<stage> ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata

from jobs.runner import STAGES, run


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: hydra-heads <stage> [--config FILE] [--plan] [section.field=value ...]\n")
        print("\n".join(f"  {name:<11} {text}" for name, text in STAGES.items()))
        return 0
    if arguments[0] == "--version":
        print(metadata.version("hydra-heads"))
        return 0
    if arguments[0] not in STAGES:
        print(f"error: {arguments[0]!r} is no stage: choose one of {', '.join(STAGES)}", file=sys.stderr)
        return 2
    return run(arguments[0], arguments[1:])


if __name__ == "__main__":
    raise SystemExit(main())
