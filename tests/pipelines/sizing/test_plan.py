"""`--plan` in numbers: as comments of the settings and as fields, for every stage, without Ray and without weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import runner
from pipelines.config import load_config
from pipelines.rows.packed_reader import LEAST_PROMPT, LOG_PARTITION_ROWS, ROW_TOKENS
from pipelines.sizing import distilling, plan_of, serving, training
from pipelines.sizing.rows import lines_of, planned_rows, rows_of
from tests.conftest import ROOT

WITH_SIZES = [stage for stage in runner.STAGES if stage not in ("compare", "datacard", "promote", "ablate")]
PLACES = {"device", "memory", "scratch", "driver", "storage", "network"}


@pytest.mark.parametrize("stage", WITH_SIZES)
def test_lines_and_fields_have_the_same_numbers(stage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"storage={tmp_path}/s", "ray_address=10.0.0.1:6379"]
    assert runner.run(stage, ["--plan", "--json", *words]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["stage"] == stage and found["plan"] and found["base"]["parameters"] == 134_515_008
    assert runner.run(stage, ["--plan", *words]) == 0
    said = capfd.readouterr().out
    sizes = plan_of(runner.read_config(stage, None if stage != "quickstart" else str(runner.STAGES[stage].config), words),
                    stage).sizes
    assert [size["name"] for size in found["sizes"]] == [size.name for size in sizes] and sizes
    for size, fields in zip(sizes, found["sizes"], strict=True):
        assert all(f"# {line}\n" in said for line in size.lines())
        assert fields.keys() >= PLACES and fields["workers"] == size.workers
        for place in PLACES:
            assert all(0 <= low <= high for low, high in fields[place].values()), (size.name, place)
        assert fields["memory"]["process"][0] > 0 and fields["by"]
        lows = [low for low, _ in fields["memory"].values()]
        assert fields["in_all"]["memory"][0] == pytest.approx(size.workers * sum(lows), rel=1e-6)
    assert not (tmp_path / "s").exists()


def test_workers_that_are_added_are_not_needed_at_once() -> None:
    """What cannot fit is judged by those that there are at least."""
    values = {"ray_address": "10.0.0.1:6379", "distill.workers.count": 2, "distill.max_workers": 5, "serve.max_replicas": 3}
    for stage, note in (("distill", "numbers in all are for 2 workers; up to 5 are started"),
                        ("serve", "numbers in all are for 1 worker; up to 3 are started")):
        (size,) = plan_of(load_config(None, values), stage).sizes
        assert size.workers == (2 if stage == "distill" else 1) and note in size.notes


def test_a_plan_that_does_not_fit_exits_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"storage={tmp_path}", "--plan", "cluster.memory=1Gi", "serve.max_batch_size=64"]
    assert runner.run("serve", words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: serve: a worker needs ") and err.count("\n") == 1 and "1 GiB; keys" in err


def test_a_base_that_is_not_here_leaves_the_steps(tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    words = [f"storage={tmp_path}", "base.model=someone/not-here"]
    assert runner.run("distill", ["--plan", *words]) == 0
    assert "\n# sizes: base.model=someone/not-here: is not on this machine: `hf download" in capfd.readouterr().out
    assert runner.run("distill", ["--plan", "--json", *words]) == 0
    assert json.loads(capfd.readouterr().out)["unknown"].startswith("base.model=someone/not-here")


def test_a_plan_imports_little(tiny_base_dir: Path, tmp_path: Path) -> None:
    """torch is most of it: heads are built on its meta device."""
    code = ("import sys\nfrom jobs import cli\ncli.main(sys.argv[1:])\n"
            "print(','.join({name.split('.')[0] for name in sys.modules}))")
    done = subprocess.run([sys.executable, "-c", code, "train", "--plan", f"base.model={tiny_base_dir}", f"storage={tmp_path}"],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ, check=True)
    modules = done.stdout.splitlines()[-1].split(",")
    assert not {"ray", "mlflow", "deepspeed", "transformers", "datasets", "matplotlib"} & set(modules)


def test_constants_are_those_of_the_stages() -> None:
    """Shared packages import no stage."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from pipelines.distill import actors
    from pipelines.serve.user_config import DRAFT_SLOTS

    assert (distilling.PART_BYTES, distilling.PART_ROWS) == (actors.FEATURE_BYTES, actors.FEATURE_ROWS)
    assert distilling.FORWARD_TOKENS == actors.FEATURE_TOKENS and serving.SLOTS == DRAFT_SLOTS
    assert (training.ROW_TOKENS, training.LEAST_PROMPT) == (ROW_TOKENS, LEAST_PROMPT)
    assert training.PARTITION_ROWS == LOG_PARTITION_ROWS
    zero = DeepSpeedZeroConfig()
    assert (zero.reduce_bucket_size, zero.max_live_parameters) == (training.BUCKET, training.LIVE)


def test_rows_of_a_file_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * 400}) + "\n" for _ in range(50)), encoding="utf-8")
    rows, length = lines_of(path)
    assert rows == 50 and length == 400
    assert lines_of(tmp_path / "none") == (None, None)
    values = {"prompts.source": "jsonl", "prompts.path": str(path), "distill.temperatures": [0.0, 1.0]}
    found = planned_rows(load_config(None, values))
    assert found.answers.low == found.answers.high == 100 and not found.note
    assert found.prompt_tokens.low / 100 < 400 / 4 + 20 < found.prompt_tokens.high / 100
    assert planned_rows(load_config(None, values | {"prompts.count": 5})).answers.high == 10
    pq.write_table(pa.table({"prompt": ["x"] * 70}), tmp_path / "p.parquet")
    assert rows_of(tmp_path / "p.parquet") == (70, None) == rows_of(tmp_path)
    found = planned_rows(load_config(None, {"prompts.source": "parquet", "prompts.path": str(tmp_path / "p.parquet")}))
    assert found.answers.low == 140 and found.note == "the length of prompts is not known"
    unknown = planned_rows(load_config(None, {"prompts.source": "datasets", "prompts.path": "someone/data"}))
    assert unknown.prompts.high == 1000 and "1,000" in unknown.note
