"""The rules of the layout, checked by reading the code. tests/README.md says which rule each test holds."""

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
SHARED = {
    "hydra_core.errors": "", "hydra_core.storage": "errors", "hydra_core.files": "errors storage", "hydra_core.bundled": "",
    "hydra_core.kernels": "errors files",
    "hydra_core.tree": "errors",
    "hydra_core.base": "errors files kernels tree",
    "hydra_core.sampling": "base errors kernels",
    "hydra_core.heads": "base errors files kernels storage tree",
    "hydra_core.training": "base errors heads tree",
    "hydra_core.proposers": "base errors heads kernels sampling tree",
    "hydra_core.decoding": "base bundled errors files heads kernels proposers sampling storage tree",
    "hydra_core.interop": "base decoding errors files heads sampling storage tree",
    "pipelines.config": "",
    "pipelines.rows": "config runtime",
    "pipelines.runtime": "config",
    "pipelines.tracking": "config runtime",
    "pipelines.profiling": "config runtime tracking",
    "pipelines.manifests": "config runtime",
    "pipelines.sizing": "config profiling runtime",  # step costs that were measured
}
"""Package -> the packages beside it that it may import. Those of `pipelines` may also import any of `hydra_core`."""
STAGE_ARROWS = {
    "distill": "", "generate": "", "serve": "",
    "compare": "bench",  # names of contenders
    "train": "distill",  # the rows
    "tree": "distill",
    "ablate": "distill train",
    "datacard": "distill",
    "curve": "ablate distill train",  # a point is a variant
    "batch": "distill serve",
    "bench": "batch distill serve",  # batch_job
    "load": "batch serve",
    "promote": "bench serve train",
    "loop": "bench distill promote train tree",
    "quickstart": "batch bench distill promote serve train tree",
}
"""Every import from one stage's package to another's. A stage may import all that `pipelines` shares."""
HEAVY = {"ray", "deepspeed", "mlflow"}
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
QUESTIONS = ["What is a draft tree?", "Count to ten."]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *(path for folder in (*PACKAGES, "cluster", "tests")
                               for path in sorted((ROOT / folder).rglob("*.md")))]
"""README and every page that it leads to."""
OTHER_COMMANDS = {"config", "cluster", "import", "export", "STAGE"}
"""Words after `hydra-heads` on the pages that are no stage: other commands, and any stage's name."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def handed_on() -> dict[tuple[str, str], str]:
    """(package, name) -> the module that the package hands the name on from, as its `__init__.pyi` says."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.pyi"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ImportFrom):
                    found |= {(module_name(path), alias.asname or alias.name): f"{module_name(path)}.{node.module}"
                              for alias in node.names}
    return found


def module_arrows() -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports anywhere, a name that a package hands on taken at its source."""
    handed, modules = handed_on(), {module_name(path) for path in SOURCES}
    arrows: dict[str, set[str]] = {}
    for path in SOURCES:
        found = arrows.setdefault(module_name(path), set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if alias.name in modules}
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    target = handed.get((node.module, alias.name)) or (inner if inner in modules else node.module)
                    while (further := handed.get((target, alias.name))) is not None:  # a package inside a package
                        target = further
                    found.add(target)
    return arrows


def package_arrows() -> dict[str, set[str]]:
    """`hydra_core.base`, `pipelines.train`, ... -> the packages of that kind that it imports."""
    arrows: dict[str, set[str]] = {}
    for module, targets in module_arrows().items():
        found = arrows.setdefault(package_of(module), set())
        found |= {package_of(target) for target in targets} - {package_of(module)}
    return arrows


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that reach each other."""
    reach = {start: reached_from(start, arrows) for start in arrows}
    groups = {tuple(sorted({start} | {other for other in reach[start] if start in reach.get(other, ())}))
              for start in arrows if start in reach[start]}
    return [list(group) for group in sorted(groups)]


def reached_from(start: str, arrows: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = arrows.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize("package", sorted({package_of(module_name(path)) for path in SOURCES} - PACKAGES.keys()))
def test_arrows_between_the_packages(package: str) -> None:
    """A package imports only what the two tables allow: data flows down one way, and stages hardly know each other."""
    top, name = package.split(".")
    if top == "jobs":
        return  # anything below it: `test_import_direction`
    if package in SHARED:
        allowed = {f"{top}.{other}" for other in SHARED[package].split()}
    else:
        allowed = {one for one in SHARED if one.startswith(top)} | {f"{top}.{other}" for other in STAGE_ARROWS[name].split()}
    assert {target for target in package_arrows()[package] if target.startswith(f"{top}.")} <= allowed


def test_the_tables_name_packages_that_exist() -> None:
    """What was moved or removed leaves the tables."""
    every = {*SHARED, *(f"pipelines.{stage}" for stage in STAGE_ARROWS)}
    assert every == {package for package in package_arrows() if package.startswith(("hydra_core.", "pipelines."))}
    assert set(STAGE_ARROWS) == set(STAGES)


def test_no_circles() -> None:
    """Neither between packages nor between modules, not even by an import inside a function."""
    assert circles(package_arrows()) == [] and circles(module_arrows()) == []


def test_circles_are_found() -> None:
    """The search itself: a circle, a longer one, none."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_only_hand_names_on(path: Path) -> None:
    """An `__init__.py` is a docstring, or that and the lazy hand-on of the names in the `__init__.pyi` beside it."""
    docstring, *rest = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    lines = [ast.unparse(node) for node in rest]
    assert lines in ([], ["from lazy_loader import attach_stub",
                          "(__getattr__, __dir__, __all__) = attach_stub(__name__, __file__)"],
                     ["from lazy_loader import attach_stub",
                      "__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)"])
    assert bool(lines) == path.with_suffix(".pyi").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_direction(path: Path) -> None:
    """jobs -> pipelines -> hydra_core; hydra_core knows no cluster; MLflow is imported in pipelines/tracking alone."""
    package = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imports(path)}
    assert tops & (PACKAGES.keys() - {package}) <= PACKAGES[package]
    if package == "hydra_core":
        assert not tops & HEAVY
    if "mlflow" in tops:
        assert path.parent == ROOT / "pipelines" / "tracking"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_small_documented_files_without_pickles(path: Path) -> None:
    """At most 400 lines a file and 60 a function, a docstring each file, no pickles."""
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
    """So that two test files may have one name."""
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
    """Every link leads to a file, and every page and figure is linked."""
    notes = PAGES
    linked = {(note.parent / target).resolve() for note in notes
              for target in re.findall(r"\]\(([^)#:]+)\)", note.read_text("utf-8"))}
    assert all(path.is_file() for path in linked), linked
    assert {path.resolve() for path in ROOT.glob("*/**/figures/*") if path.relative_to(ROOT).parts[0] != "build"} <= linked
    assert {note.resolve() for note in notes[1:]} <= linked  # from README, or from a note that it links


def test_policy_holds_no_tensors() -> None:
    """The scheduler decides; tensor code takes no decisions."""
    assert not {"torch", "numpy"} & {name.split(".")[0] for name in imports(ROOT / "hydra_core/decoding/scheduler.py")}


def test_readme_names_the_top_level() -> None:
    """A newcomer finds every folder explained."""
    for name in ("hydra_core", "pipelines", "jobs", "cluster", "tests", "pyproject.toml"):
        assert name in README


def commands() -> list[tuple[str, list[str]]]:
    """(stage, words) of every command in README and the pages, in blocks and in running text."""
    pattern = re.compile(r"(?:hydra-heads|python -m jobs\.)\s?(\w+)((?: +(?:--\w[\w-]*|[\w./:@\[\]-]+=[^\s`]+|[^\s`]+\.yaml))*)")
    return [(found[1], found[2].split()) for page in PAGES for found in pattern.finditer(page.read_text(encoding="utf-8"))]


def test_readme_commands_are_real() -> None:
    """Each command of README and the pages names a stage and settings that exist; every stage has one."""
    found = [(stage, words) for stage, words in commands() if stage not in OTHER_COMMANDS]
    assert {stage for stage, _ in found} >= set(STAGES)
    for stage, words in found:
        assert stage in STAGES, stage
        config = words[words.index("--config") + 1] if "--config" in words else None
        read_config(stage, str(ROOT / config) if config else None, [word for word in words if "=" in word])


def test_ci_runs_the_readmes_test_command() -> None:
    """What README says is what is run."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    command = next(line.strip() for line in README.splitlines() if ".venv-test/bin/" in line)
    assert command in script


def test_readme_is_short() -> None:
    """Details stand in the page beside what they describe, each of which README links, by itself or by another page."""
    assert len(README.splitlines()) <= 160


def test_the_version_is_written_once() -> None:
    """In pyproject.toml; code asks importlib.metadata, and images are tagged with it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert not [path for path in SOURCES if f'"{version}"' in path.read_text(encoding="utf-8")]
    images = {found for path in (ROOT / "cluster").rglob("*.yaml")
              for found in re.findall(r"(?:image|value): hydra-heads(?:-cuda)?:(\S+)", path.read_text(encoding="utf-8"))}
    assert images == {version}


def test_every_rule_is_explained() -> None:
    """Each test of this file has a docstring and stands on the contributors' page."""
    page = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            assert ast.get_docstring(node), node.name
            assert f"`{node.name}`" in page, node.name
