"""`hydra-heads export --to ENGINE HEADS [OUTPUT]`: draft heads as a folder that another engine reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra_core.bundled import is_bundled
from hydra_core.errors import InputError
from hydra_core.storage import scheme_of
from jobs.runner import OneLineParser, read_config, run_command
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths

if TYPE_CHECKING:
    from hydra_core.interop import VllmExport

ENGINES = ("vllm",)
EXAMPLES = """examples:
  hydra-heads export --to vllm bundled /data/heads-vllm
  hydra-heads export --to vllm /data/heads base.model=/models/mine      into /data/heads-vllm
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the export and print the command that serves with it; returns the exit code."""
    def work() -> None:
        arguments = _parser().parse_intermixed_args(argv)
        if arguments.to not in ENGINES:
            raise InputError(f"export --to{f' {arguments.to}' if arguments.to else ''}: choose the engine: {', '.join(ENGINES)}")
        names = [word for word in arguments.words if "=" not in word]
        if not 1 <= len(names) <= 2:
            raise InputError(f"export: {len(names)} folders are named: name the heads' folder, or bundled, and the OUTPUT")
        config = read_config("export", arguments.config, [word for word in arguments.words if "=" in word])
        output = _output_of(names)
        from hydra_core.interop import serve_command  # torch, which --help does without

        export, base = _export(config, names[0], output)
        kind = f"{export.kind} heads for {export.num_heads} tokens, {export.size / 1e6:.1f} MB"
        needs = "vLLM reads it by itself" if export.kind == "eagle3" else "where vLLM runs, this project is installed too"
        print(f"export: {kind} in {export.folder}; {needs}", file=sys.stderr)
        print(serve_command(export, base))

    return run_command("export", work)


def _export(config: RunConfig, heads: str, output: str) -> tuple[VllmExport, str]:
    """The export, and the base as `vllm serve` takes it: its hub id, or the folder of what came from a file."""
    from hydra_core.base import load_vocabulary, resolve_base
    from hydra_core.interop import export_to_vllm

    cache = RunPaths.of(config).cache
    dtype = "fp32" if config.base.dtype == "fp32" else "bf16"
    vocabulary = load_vocabulary(config.base.model, dtype=dtype, cache=cache)
    resolved = resolve_base(config.base.model, cache)
    base = config.base.model if resolved.name == config.base.model else str(resolved.folder)
    return export_to_vllm(heads, vocabulary, output), base


def _output_of(names: Sequence[str]) -> str:
    """The second name, or the first one with `-vllm` after it."""
    if len(names) == 2:
        return names[1]
    if is_bundled(names[0]) or scheme_of(names[0]):
        raise InputError(f"export {names[0]}: name the OUTPUT folder too")
    return f"{names[0].rstrip('/')}-vllm"


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="hydra-heads export", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES,
                           usage="hydra-heads export --to vllm HEADS [OUTPUT] [section.field=value ...]",
                           description="write draft heads as a folder that another engine reads, and print the command that "
                                       "serves with them")
    parser.add_argument("--to", metavar="ENGINE", help=f"the engine: {', '.join(ENGINES)}")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; without it the defaults")
    parser.add_argument("words", nargs="*", metavar="HEADS [OUTPUT]",
                        help="a folder of heads, or bundled, and the folder to write (without it HEADS-vllm). base.model= names "
                             "their base, base.dtype=fp32 writes float32 instead of bfloat16")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
