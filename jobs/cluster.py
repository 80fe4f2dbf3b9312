"""`hydra-heads cluster PART ...`: manifests for Kubernetes and Ray's cluster launcher, made from the settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra_core.errors import InputError
from hydra_core.storage import as_path, is_remote
from jobs.runner import OneLineParser, read_config, run_command
from jobs.usage import section_details
from pipelines.config import RunConfig
from pipelines.manifests import PARTS, Heads, Target, cluster_files, part_text, write_files

CODE = "/opt/hydra-heads"
"""Where the image has this project."""
EXAMPLES = """examples:
  hydra-heads cluster --config mine.yaml platform | kubectl apply -f -
  hydra-heads cluster --config mine.yaml train cluster.gpus=8 cluster.nodes=4 | kubectl create -f -
  hydra-heads cluster --config mine.yaml --write manifests
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the manifests; returns the exit code."""
    def work() -> None:
        arguments = _parser().parse_intermixed_args(argv)
        parts = [word for word in arguments.words if "=" not in word]
        if not parts and arguments.write is None:
            raise InputError(f"cluster: say what to print ({', '.join(PARTS)}, secrets or a job, as train), or --write FOLDER")
        config = read_config("cluster", arguments.config, [word for word in arguments.words if "=" in word])
        target = Target(config, find_heads(config)).check()
        texts = [part_text(target, part) for part in parts]
        if arguments.write is not None:
            files = cluster_files(target)
            write_files(files, Path(arguments.write))
            print(f"cluster: {len(files)} files below {arguments.write}", file=sys.stderr)
        print("---\n".join(texts), end="")

    return run_command("cluster", work)


def find_heads(config: RunConfig) -> Heads | None:
    """The heads that `serve.model` names by a model of the registry, or as the bundled ones, pinned to that version and those
    files. None: what the settings alone say.

    Raises InputError for a model that is not registered, StoppedError for a registry that does not answer.
    """
    model = config.serve.model
    if model is None or not (model.startswith("models:/") or model == "bundled"):
        return None
    from pipelines.serve.model_identity import configuration_digest  # torch and MLflow, which the other manifests do not need
    from pipelines.tracking.lookup import find_model

    found = find_model(config, model)
    here, folder = Path(__file__).resolve().parents[1], as_path(str(found.folder))
    # of the package itself, which lies elsewhere in the image
    inside = not is_remote(folder) and folder.is_relative_to(here)
    return Heads(f"{CODE}/{folder.relative_to(here)}" if inside else str(folder), found.label, found.version,
                 configuration_digest(str(folder)))


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="hydra-heads cluster", formatter_class=argparse.RawDescriptionHelpFormatter,
                           description="manifests for Kubernetes (KubeRay) and Ray's cluster launcher, made from the settings",
                           usage="hydra-heads cluster [--config FILE] [--write FOLDER] [PART ...] [section.field=value ...]",
                           epilog=f"{EXAMPLES}\n{section_details('cluster')}")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; without it the defaults")
    parser.add_argument("--write", metavar="FOLDER", help="write all of it: base, overlays and the launcher's files")
    parser.add_argument("words", nargs="*", metavar="PART",
                        help=f"what to print: {', '.join(PARTS)}, secrets, or a job by the name of its stage, or chain")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
