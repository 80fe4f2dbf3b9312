"""Mutation testing of the modules in which a slip is silent: `python -m tests.mutation NAME...`, by hand (needs `.[mutation]`).

mutmut changes one place of a function at a time and runs the module's fast tests; a change that no test notices "survives".
Everything happens in a copy, `build/mutation/NAME`; what is there is used again, so a second run asks what is new alone.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("hydra_core", "pipelines", "jobs", "tests", "cluster", "pyproject.toml", "README.md")
MUTMUT = [sys.executable, "-c", "from mutmut.__main__ import cli; cli()"]
NOTICED = {1, 3, 24, 36, 152, 255, -9, -11, -24}
"""Ends of pytest with a mutant that a test noticed: failed, crashed, or ran out of processor time."""


@dataclass(frozen=True)
class Target:
    """Files whose functions are changed (patterns), and the fast tests that are to notice; `fast`: an expression as `-k` takes
    it, where not all of these tests are fast enough to be run some hundred times; `slow`: slow tests run too."""

    files: tuple[str, ...]
    tests: tuple[str, ...]
    fast: str = ""
    slow: bool = False


TARGETS = {
    "sampling": Target(("hydra_core/sampling/*.py",), ("tests/hydra_core/sampling",)),
    "acceptance": Target(("hydra_core/decoding/verify.py",), ("tests/hydra_core/decoding/test_verify.py",)),
    "near-ties": Target(("hydra_core/decoding/near_ties.py",), ("tests/hydra_core/decoding/test_near_ties.py",)),
    "proposers": Target(
        tuple(f"hydra_core/proposers/{name}.py" for name in ("acceptance", "calibration", "candidate_tree", "node_budget",
                                                             "ngram")),
        tuple(f"tests/hydra_core/proposers/test_{name}.py" for name in ("estimates", "calibration", "dynamic_tree", "ngram")),
        "not pay and not paths_that_could and not deep and not no_longer and not long_texts"),
    "drafting": Target(
        tuple(f"hydra_core/proposers/{name}.py" for name in ("dynamic", "heads", "head_features")),
        tuple(f"tests/hydra_core/proposers/test_{name}.py" for name in ("drafts", "dynamic_tree", "head_features"))),
    "alignment": Target(("hydra_core/training/alignment.py",), ("tests/hydra_core/training/test_alignment.py",)),
    "losses": Target(("hydra_core/training/losses.py", "hydra_core/training/metrics.py"),
                     ("tests/hydra_core/training/test_losses.py", "tests/hydra_core/training/test_metrics.py")),
    "tree": Target(("hydra_core/tree/*.py",), ("tests/hydra_core/tree",)),
    "losslessness": Target(("pipelines/bench/losslessness.py",), ("tests/pipelines/bench",)),
    "promote": Target(tuple(f"pipelines/promote/{name}.py" for name in ("gates", "decision", "stage")),
                      tuple(f"tests/pipelines/promote/test_{name}.py" for name in ("choice", "winner", "gates", "stage")),
                      slow=True),
    "openai": Target(("pipelines/serve/openai/*.py",),
                     ("tests/pipelines/serve/openai", "tests/pipelines/serve/test_ingress.py")),
    "metrics": Target(("pipelines/serve/metrics.py",), ("tests/pipelines/serve/test_metrics.py",)),
    "batch": Target(("pipelines/batch/reader.py", "pipelines/batch/writer.py", "pipelines/batch/openai_format.py"),
                    ("tests/pipelines/batch",)),
    "config": Target(("pipelines/config/*.py",),
                     ("tests/pipelines/config", "tests/jobs/test_configs.py", "tests/jobs/test_runner.py"),
                     "not heavy and not terminal"),
}
SETTINGS = """
[tool.mutmut]
source_paths = ["hydra_core", "pipelines", "jobs"]
only_mutate = {files}
also_copy = ["README.md", "cluster"]
pytest_add_cli_args = ["-n", "0", "-m", {marked}, "-p", "no:cacheprovider", "-W", "ignore", "-k", {fast}]
pytest_add_cli_args_test_selection = {tests}
process_isolation = "forkserver"
timeout_multiplier = 3.0
timeout_constant = 60.0
use_git_change_detection = false
do_not_mutate_patterns = ['^\\s*raise ', '^\\s*(log|logger|console)\\.', '^\\s*assert ']
"""
"""torch is not safe to fork once it has computed: each mutant is forked from a process that has only imported. Its processor time
is limited for endless loops alone: fixtures that others of the module share are not in the time of the tests that mutmut adds up.
The texts of errors and logs are left as they are."""


class Undecorated(ast.NodeTransformer):
    """Moves the body of each decorated function into a plain one of the module: mutmut changes no decorated functions, and
    properties, validators and `inference_mode` are as easy to get wrong as others."""

    def __init__(self) -> None:
        self.moved: list[ast.stmt] = []
        self.inside: list[str] = []

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        text = ast.unparse(node)
        if not node.decorator_list or "super()" in text or "overload" in text.split("def ")[0]:
            return node
        name = "_".join(("", "body", *self.inside, node.name))
        taken = node.args
        keywords = [ast.keyword(one.arg, ast.Name(one.arg)) for one in taken.kwonlyargs]
        if taken.kwarg:
            keywords.append(ast.keyword(None, ast.Name(taken.kwarg.arg)))
        given: list[ast.expr] = [ast.Name(one.arg) for one in (*taken.posonlyargs, *taken.args)]
        if taken.vararg:
            given.append(ast.Starred(ast.Name(taken.vararg.arg)))
        call: ast.expr = ast.Call(ast.Name(name), given, keywords)
        if isinstance(node, ast.AsyncFunctionDef):
            call = ast.Await(call)
        elif any(isinstance(part, ast.Yield | ast.YieldFrom) for part in ast.walk(node)):
            call = ast.YieldFrom(call)
        plain = type(node)(name=name, args=node.args, body=node.body, decorator_list=[], returns=node.returns, lineno=node.lineno)
        self.moved.append(ast.parse(ast.unparse(plain)).body[0])
        node.body = [ast.Return(call)]
        return node

    visit_AsyncFunctionDef = visit_FunctionDef


def undecorated(text: str) -> str:
    """The module `text` with the bodies of its decorated functions in functions that bear no decorator, at its end."""
    tree, mover = ast.parse(text), Undecorated()
    tree = mover.visit(tree)
    tree.body += mover.moved
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def prepare(name: str) -> Path:
    """The copy in which `name` is changed, up to date; what mutmut knows of earlier runs stays."""
    target, folder = TARGETS[name], ROOT / "build" / "mutation" / name
    (folder / "mutants").mkdir(parents=True, exist_ok=True)  # before Python starts: a folder of its path that is missing stays so
    for part in COPIED:
        shutil.rmtree(folder / part, ignore_errors=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / part, folder / part)
    for path in {path for pattern in target.files for path in folder.glob(pattern)}:
        path.write_text(undecorated(path.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)  # which test comes to which function may have changed
    settings = SETTINGS.format(files=json.dumps(target.files),
                               fast=json.dumps(target.fast), marked=json.dumps("" if target.slow else "not slow"),
                               tests=json.dumps([test for test in target.tests if (ROOT / test).exists()]))
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write(settings)
    return folder


def mutmut(folder: Path, *arguments: str, strict: bool = True) -> str:
    """What a command of mutmut prints; it runs in `folder`. `strict`: end where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(folder / "mutants"), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run([*MUTMUT, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True,
                          stderr=None if strict else subprocess.DEVNULL)
    if done.returncode and strict:
        sys.exit(f"mutmut {arguments[0]} failed in {folder}:\n{done.stdout[-3000:]}")
    return done.stdout


@dataclass(frozen=True)
class Mutant:
    """`end`: how pytest ended, None where it was not tried; `lines`: what was changed, as pairs before and after."""

    name: str
    end: int | None
    lines: tuple[tuple[str, str], ...]

    @property
    def counts(self) -> bool:
        """False for changes that no test on one processor can notice: `strict=` of zips of equal lengths, and devices."""
        return any(GUARDS.sub("", old) != GUARDS.sub("", new) for old, new in self.lines)

    @property
    def noticed(self) -> bool:
        return self.end in NOTICED


GUARDS = re.compile(r",? ?\b(strict|device)=[\w.]+|\.to\([\w.]+\)")


def mutants(folder: Path) -> list[Mutant]:
    """Every mutant of the last run, by name."""
    found = []
    for meta in sorted((folder / "mutants").rglob("*.py.meta")):
        tree = ast.parse(meta.with_suffix("").read_text(encoding="utf-8"))
        bodies = {node.name: ast.unparse(node).splitlines()[1:] for node in ast.walk(tree)
                  if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        for key, end in json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"].items():
            name = key.rpartition(".")[2]
            pairs = zip(bodies[re.sub(r"__mutmut_\d+$", "__mutmut_orig", name)], bodies[name], strict=False)
            found.append(Mutant(key, end, tuple((old, new) for old, new in pairs if old != new)))
    return sorted(found, key=lambda mutant: mutant.name)


def report(name: str, folder: Path) -> str:
    """One line of the table in README, for the mutants that were tried."""
    everything = [mutant for mutant in mutants(folder) if mutant.counts]
    tried = [mutant for mutant in everything if mutant.end is not None]
    noticed = sum(mutant.noticed for mutant in tried)
    return f"| {name} | {len(everything)} | {len(tried)} | {noticed} | {noticed / max(1, len(tried)):.0%} |"


def survivors(folder: Path) -> list[Mutant]:
    return [mutant for mutant in mutants(folder) if mutant.counts and mutant.end is not None and not mutant.noticed]


def differences(folder: Path) -> str:
    """What each survivor changed: its name, then the lines before and after, cut to the place."""
    lines = []
    for mutant in survivors(folder):
        lines.append(f"# {mutant.name}" + ("" if mutant.end == 0 else " (no test comes there)"))
        for old, new in mutant.lines:
            start = next((at for at, (one, other) in enumerate(zip(old, new, strict=False)) if one != other), 0)
            end = max(len(old), len(new)) - start
            lines += [f"{mark} {line[max(start - 60, 0):start + min(end, 60)].strip()}" for mark,
                      line in (("-", old), ("+", new))]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(TARGETS), metavar="NAME", help=", ".join(TARGETS))
    parser.add_argument("--sample", type=int, help="try so many mutants alone, drawn with a fixed seed")
    parser.add_argument("--again", action="store_true", help="try the survivors of the last run again")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the survivors of the last run as diffs, and run nothing")
    options = parser.parse_args()
    for name in options.names:
        if options.show:
            print(differences(ROOT / "build" / "mutation" / name))
            continue
        folder = prepare(name)
        chosen = [mutant.name for mutant in survivors(folder)] if options.again else []
        if options.again and not chosen:  # without names, mutmut would try all
            print(report(name, folder), flush=True)
            continue
        if options.sample:
            mutmut(folder, "run", "--max-children", "1", "none of this name", strict=False)  # makes the mutants and tries none
            everything = [mutant.name for mutant in mutants(folder) if mutant.counts]
            chosen = random.Random(0).sample(everything, min(options.sample, len(everything)))
        mutmut(folder, "run", "--max-children", str(options.processes), *chosen)
        print(report(name, folder), flush=True)


if __name__ == "__main__":
    main()
