"""The facade of native code: who may call compiled operators, and which packages kernels may import."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from hydra_core.kernels import library
from tests.conftest import ROOT

FACADE = ROOT / "hydra_core" / "kernels"
SOURCES = [path for top in ("hydra_core", "pipelines", "jobs", "tests") for path in sorted((ROOT / top).rglob("*.py"))]
NATIVE = re.compile(r"(ops|classes)\.hydra" + "_heads")


def test_only_the_facade_calls_compiled_operators() -> None:
    """`torch.ops.hydra_heads` and `torch.classes.hydra_heads`, in code as in text; the tests of kernels may name them."""
    callers = {path for path in SOURCES if NATIVE.search(path.read_text(encoding="utf-8"))}
    assert FACADE / "ops.py" in callers
    assert {path.parent for path in callers} <= {FACADE, Path(__file__).parent}


@pytest.mark.parametrize("path", sorted(FACADE.glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_no_other_part_of_the_project(path: Path) -> None:
    """They take tensors, so that every other package can build on them. Only the error type is the project's."""
    own = ("hydra_core.kernels", "hydra_core.errors")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        assert all(name.split(".")[0] not in ("hydra_core", "pipelines", "jobs") or name.startswith(own)
                   for name in names)


def test_every_source_counts_in_the_digest() -> None:
    """A change of any C++ file compiles the library anew and has step costs timed again."""
    assert set(library.sources()) == {path for path in FACADE.iterdir() if path.suffix in (".cpp", ".h")}
    included = {name for path in library.sources() for name in re.findall(r'#include "(.+)"', path.read_text(encoding="utf-8"))}
    assert {path.name for path in library.sources()} == included | {library.MAIN_SOURCE}
