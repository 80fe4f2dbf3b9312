"""`hydra-heads import FOLDER OUTPUT base.model=...`: published Medusa and Hydra heads as a heads folder."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra_core.errors import InputError
from hydra_core.storage import as_path, scheme_of
from jobs.runner import OneLineParser, read_config, run_command
from jobs.summary import summarise
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths, StageResult

EXAMPLES = """examples:
  hydra-heads import hydra-vicuna-7b-v1.3 heads/hydra-vicuna base.model=lmsys/vicuna-7b-v1.3
  hydra-heads import medusa-vicuna-7b-v1.3/medusa_lm_head.pt heads/medusa-vicuna base.model=lmsys/vicuna-7b-v1.3
  hydra-heads generate "Why is the sky blue?" generate.model=heads/hydra-vicuna base.model=lmsys/vicuna-7b-v1.3

What is imported, and what is not: jobs/README.md, "Heads of others".
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Import, and print one line of JSON, or a summary on a terminal; returns the exit code."""
    def work() -> None:
        arguments = _parser().parse_intermixed_args(argv)
        settings = [word for word in arguments.words if re.match(r"[\w.+-]+=", word)]
        places = [word for word in arguments.words if word not in settings]
        if len(places) != 2:
            raise InputError(f"import: name the published heads and the new folder (FOLDER OUTPUT), got {len(places)} names")
        if arguments.config is None and not any(word.startswith("base.model=") for word in settings):
            raise InputError("import: name the base that these heads belong to: base.model=...")
        source, output = (as_path(place) if scheme_of(place) else Path(place).expanduser().resolve() for place in places)
        result = _import(source, output, read_config("import", arguments.config, settings))
        print(summarise(result) if sys.stdout.isatty() and not arguments.json else f"{result.to_json()}\n", end="")

    return run_command("import", work)


def _import(source: Path, output: Path, config: RunConfig) -> StageResult:
    from hydra_core.base import load_vocabulary  # torch, which help does without
    from hydra_core.interop import check_places, import_official
    from pipelines.runtime.provenance import provenance

    check_places(source, output)  # before a base is fetched
    dtype = "bf16" if config.base.dtype == "auto" else config.base.dtype
    vocabulary = load_vocabulary(config.base.model, dtype=dtype, cache=RunPaths.of(config).cache)
    made = import_official(source, output, vocabulary, provenance(config))
    for note in made.notes:
        print(f"import: {note}", file=sys.stderr)
    figures = {"kind": made.config.kind, "num_heads": made.config.num_heads, "num_blocks": made.config.num_blocks,
               "own_rows": made.config.own_rows, "parameters": made.parameters, "base": str(vocabulary.identity)}
    return StageResult("import", None, {"heads": str(output)}, figures)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="hydra-heads import", formatter_class=argparse.RawDescriptionHelpFormatter,
                           description="published Hydra, Hydra++ and Medusa heads (.pt or .safetensors, with their config.json) "
                                       "as a heads folder of this project",
                           usage="hydra-heads import FOLDER_OR_FILE OUTPUT base.model=... [--config FILE] [--json]",
                           epilog=EXAMPLES)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, of which base is read; without it the defaults")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON, on a terminal too")
    parser.add_argument("words", nargs="*", metavar="FOLDER_OR_FILE OUTPUT",
                        help="the published heads, the folder to write, and settings (section.field=value)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
