"""`hydra-heads import`: what it makes and prints, and one line for a mistake."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine, load_heads
from jobs import cli, import_heads
from tests.conftest import ROOT
from tests.official import hydra_config, hydra_tensors, medusa_config, medusa_tensors, write

QUESTIONS = ["What is a draft tree?", "Count to ten."]


@pytest.fixture
def words(tiny_base: Base, tiny_base_dir: Path, tmp_path: Path) -> list[str]:
    """Published heads, the folder to make, and the settings that name their base."""
    folder = write(tmp_path / "theirs", hydra_tensors(tiny_base, prefix=True), hydra_config(prefix=True))
    return [str(folder), str(tmp_path / "ours"), f"base.model={tiny_base_dir}", f"storage={tmp_path / 'storage'}"]


def test_the_folder_decodes_as_plain(words: list[str], tiny_base: Base, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["import", *words]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert out.count("\n") == 1 and "import:" not in err
    assert told["outputs"] == {"heads": str(tmp_path / "ours")} and told["stage"] == "import"
    assert (told["kind"], told["num_heads"], told["num_blocks"], told["own_rows"]) == ("hydra++", 3, 2, True)
    drafter, trees = load_heads(str(tmp_path / "ours"), tiny_base)
    assert Engine(tiny_base, drafter, trees).answer(QUESTIONS, max_new_tokens=32) == Engine(tiny_base).answer(
        QUESTIONS, max_new_tokens=32)
    assert json.loads((tmp_path / "ours" / "provenance.json").read_text(encoding="utf-8"))["versions"]["torch"]


def test_a_file_is_named_by_a_relative_path(tiny_base: Base, tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "theirs", medusa_tensors(tiny_base, heads=5), medusa_config(heads=2), "medusa_lm_head.safetensors")
    monkeypatch.chdir(tmp_path)
    assert import_heads.main(["theirs/medusa_lm_head.safetensors", f"base.model={tiny_base_dir}", "new/ours",
                              f"storage={tmp_path / 'storage'}"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["outputs"] == {"heads": str(tmp_path / "new" / "ours")}
    assert [line.split(":")[0] for line in err.splitlines()] == ["import", "import"] and "all are imported" in err


def test_mistakes_are_one_line(words: list[str], tiny_base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output, base, storage = words
    broken = write(tmp_path / "broken", hydra_tensors(tiny_base), hydra_config(prefix=True))
    (tmp_path / "taken").mkdir()
    for given, told in (
            ([], "import: name the published heads and the new folder (FOLDER OUTPUT), got 0 names"),
            ([folder, base], "got 1 names"), ([folder, output, "more", base], "got 3 names"),
            ([folder, output], "import: name the base that these heads belong to: base.model=..."),
            ([folder, output, base, "base.nope=1"], "base.nope: unknown field"), ([folder, output, base, "--nope"], "--nope"),
            ([folder, output, base, "--config"], "expected one argument"),
            ([folder, output, f"base.model={tmp_path / 'nowhere'}"], "nowhere: no such folder"),
            ([str(tmp_path / "x"), output, base], "x: no such folder or file"),
            (["s3://bucket/x", output, base], "s3://"),
            ([folder, str(tmp_path / "taken"), base], "taken: already exists: name a new folder"),
            ([str(broken), output, base], "tensor hydra_mlp.0.1.linear.weight has shape (32, 32), not (32, 64)")):
        assert cli.main(["import", storage, *given]) == 2, given
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and told in err, (given, err)
    assert {path.name for path in tmp_path.iterdir()} <= {"theirs", "broken", "taken", "storage"}


def test_what_cannot_be_written_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words[1] = "/proc/nowhere"
    assert cli.main(["import", *words]) == 1
    assert re.fullmatch(r"error: import: /proc/\S+ cannot be read or written \(.+\)\n", capsys.readouterr().err)


def test_the_commands_of_the_page_are_accepted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of jobs/README.md and of the help: two places and settings that exist."""
    seen = []
    monkeypatch.setattr(import_heads, "_import", lambda *given: seen.append(given) or sys.exit())
    pages = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8") + import_heads.EXAMPLES
    lines = re.findall(r"^ *hydra-heads import (\S.*)$", pages, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        with pytest.raises(SystemExit):
            import_heads.main(shlex.split(line, comments=True))
        assert seen[-1][2].base.model == "lmsys/vicuna-7b-v1.3"


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys; from jobs import cli\ntry:\n cli.main(['import', '--help'])\nexcept SystemExit: pass\n"
            "print({'torch', 'transformers', 'ray', 'mlflow', 'numpy'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: hydra-heads import FOLDER_OR_FILE OUTPUT base.model=")
    assert done.stdout.endswith("set()\n")
