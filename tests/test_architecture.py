"""The layout's promises, kept by reading the code."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from jobs.runner import STAGES, read_config
from tests.conftest import ROOT
from tests.trained import random_heads

PACKAGES = {"hydra_core": set(), "pipelines": {"hydra_core"}, "jobs": {"hydra_core", "pipelines"}}
"""Package -> packages of this project that it may import."""
HEAVY = {"ray", "deepspeed", "mlflow"}
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
QUESTIONS = ["What is a draft tree?", "Count to ten."]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_direction(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imports(path)}
    assert tops & (PACKAGES.keys() - {package}) <= PACKAGES[package]
    if package == "hydra_core":
        assert not tops & HEAVY
    if "mlflow" in tops:
        assert path.parent == ROOT / "pipelines" / "tracking"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_small_documented_files_without_pickles(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    assert not text.strip() or ast.get_docstring(tree), "a module says what it is for"
    assert "pickle" not in {name.split(".")[0] for name in imports(path)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno <= 60, f"{node.name} cannot be seen whole"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(word.arg == "weights_only" for word in node.keywords)


def test_every_test_folder_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_readme_library_lines_run(tiny_base_dir: Path, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    """As printed, but for the model and the heads."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code
    lines = [line for line in code[1].splitlines() if line.strip()]
    assert len(lines) <= 5
    save_checkpoint(tmp_path / "heads", random_heads(tiny_base, "hydra++"), tiny_base.identity,
                    TreeSet({1: DraftTree(((0,), (0, 0)))}), {})
    monkeypatch.setenv("HYDRA_HEADS_STORAGE", str(tmp_path))
    text = "\n".join(lines).replace('"embedded:smollm2-135m"', f'"{tiny_base_dir}", dtype="fp32"')
    exec(text.replace("/data/heads", str(tmp_path / "heads")), {})
    with_heads = capsys.readouterr().out
    assert with_heads.startswith("[") and with_heads == f"{Engine(tiny_base).answer(QUESTIONS, max_new_tokens=64)}\n"


def test_every_file_of_the_packages_is_installed() -> None:
    """An installation that is not editable holds what `package-data` names, and no more."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = project["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        covered = {path for pattern in named.get(package, ()) for path in (ROOT / package).glob(pattern)}
        files = {path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        left_out = {path for path in files if path.suffix in (".py", ".md") or path.parent.name == "figures"}  # of the notes
        assert files - left_out <= covered, package


def test_pictures_and_links_of_the_notes_lead_somewhere() -> None:
    notes = [ROOT / "README.md", *(path for package in PACKAGES for path in (ROOT / package).rglob("*.md"))]
    linked = {(note.parent / target).resolve() for note in notes
              for target in re.findall(r"\]\(([^)#:]+)\)", note.read_text("utf-8"))}
    assert all(path.is_file() for path in linked), linked
    assert {path.resolve() for path in ROOT.glob("*/**/figures/*")} <= linked
    assert {note.resolve() for note in notes[1:]} <= linked  # from README, or from a note that it links


def test_policy_holds_no_tensors() -> None:
    assert not {"torch", "numpy"} & {name.split(".")[0] for name in imports(ROOT / "hydra_core/decoding/scheduler.py")}


def test_readme_names_the_top_level() -> None:
    for name in ("hydra_core", "pipelines", "jobs", "cluster", "tests", "pyproject.toml"):
        assert name in README


def commands() -> list[tuple[str, list[str]]]:
    pattern = re.compile(r"(?:hydra-heads|python -m jobs\.)\s?(\w+)((?: +(?:--\w[\w-]*|[\w./:@\[\]-]+=\S+|\S+\.yaml))*)")
    return [(found[1], found[2].split()) for block in re.findall(r"^    .*$|```.*?```", README, re.MULTILINE | re.DOTALL)
            for found in pattern.finditer(block)]


def test_readme_commands_are_real() -> None:
    found = commands()
    assert {stage for stage, _ in found} >= set(STAGES)
    for stage, words in found:
        assert stage in STAGES, stage
        config = words[words.index("--config") + 1] if "--config" in words else None
        read_config(stage, str(ROOT / config) if config else None, [word for word in words if "=" in word])


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    command = next(line.strip() for line in README.splitlines() if ".venv-test/bin/" in line)
    assert command in script
