"""`python -m jobs.curve --config FILE section.field=value ...`"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.runner import run


def main(argv: Sequence[str] | None = None) -> int:
    return run("curve", argv)


if __name__ == "__main__":
    raise SystemExit(main())
