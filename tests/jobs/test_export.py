"""`hydra-heads export`: what it prints, what it writes, and one line for a mistake."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from jobs import cli
from tests.trained import random_heads


def test_heads_are_written_and_the_command_is_printed(tiny_base: Base, tiny_base_dir: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "mine", random_heads(tiny_base, "hydra"), tiny_base.identity, TreeSet({1: DraftTree(((0,),))}), {})
    settings = [f"base.model={tiny_base_dir}", f"storage={tmp_path}/s"]
    for words, dtype, made in ((["base.dtype=fp32"], "float32", "mine-vllm"), ([str(tmp_path / "other")], "bfloat16", "other")):
        assert cli.main(["export", "--to", "vllm", str(tmp_path / "mine"), *settings, *words]) == 0
        out, err = capsys.readouterr()
        command = shlex.split(out)
        assert command[:5] == ["vllm", "serve", str(tiny_base_dir), "--dtype", dtype] and out.count("\n") == 1
        assert json.loads(command[-1]) == {"method": "medusa", "model": str(tmp_path / made), "num_speculative_tokens": 3}
        assert err.startswith("export: hydra heads for 3 tokens, ") and (tmp_path / made / "model.safetensors").exists()


@pytest.mark.parametrize(("words", "told"), [
    (["heads"], "export --to: choose the engine: vllm"), (["--to", "tgi", "heads"], "export --to tgi: choose the engine: vllm"),
    (["--to", "vllm"], "export: 0 folders are named"), (["--to", "vllm", "a", "b", "c"], "export: 3 folders are named"),
    (["--to", "vllm", "bundled"], "export bundled: name the OUTPUT folder"),
    (["--to", "vllm", "s3://bucket/heads"], "export s3://bucket/heads: name the OUTPUT folder"),
    (["--to", "vllm", "h", "base.modle=x"], "base.modle: unknown field"),
    (["--to", "vllm", "h", "base.model=/nowhere"], "base.model=/nowhere: no such folder"), (["--nope"], "--nope")])
def test_a_mistake_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and told in err
