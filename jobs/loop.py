"""`python -m jobs.loop --config FILE section.field=value ...`"""

from __future__ import annotations

from collections.abc import Sequence

from jobs.runner import run


def main(argv: Sequence[str] | None = None) -> int:
    return run("loop", argv)


if __name__ == "__main__":
    raise SystemExit(main())
