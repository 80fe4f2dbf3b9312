"""Exit codes, the one JSON line, what a person sees, and what never starts."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.data.exceptions import UserCodeException
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from hydra_core.errors import InputError, StoppedError
from jobs import cli, runner, summary
from pipelines.config import RunConfig, list_settings, load_config, to_yaml
from pipelines.runtime.artifacts import StageResult
from tests.conftest import ROOT

HEAVY = {"torch", "ray", "mlflow", "transformers", "deepspeed", "datasets", "numpy", "pyarrow", "matplotlib"}
"""Packages that take long to import: help and the check of settings do without them."""
FOR_SIZES = {"torch", "numpy"}
"""Of them, what a plan imports for its sizes: heads are built on torch's meta device."""
ON_A_TERMINAL = """
import sys
from jobs import runner
from pipelines.runtime.artifacts import StageResult

def stage(config):
    print("chatter")
    return StageResult("bench", "r1", {"report": "/x/report.json"},
                       {"questions": 3, "methods": {"plain": {"speed_vs_plain": 1.0, "tokens_per_step": 1.0},
                                                    "hydra": {"speed_vs_plain": 1.5, "tokens_per_step": 2.25}}})

runner._pipeline = lambda name: stage
raise SystemExit(runner.run("bench", sys.argv[1:]))
"""


def use(monkeypatch: pytest.MonkeyPatch, stage: object) -> None:
    monkeypatch.setattr(runner, "_pipeline", lambda name: stage)


def test_last_line_of_stdout_is_the_result(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def stage(config: RunConfig) -> StageResult:
        print("chatter")
        os.write(1, b"chatter of a C library\n")
        return StageResult("bench", "r1", {"report": "/x"}, {"limit": config.bench.limit})

    use(monkeypatch, stage)
    assert runner.run("bench", ["limit=3", "prompts=/tmp/p.jsonl", "max_new_tokens=9"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"stage": "bench", "run_id": "r1", "outputs": {"report": "/x"}, "limit": 3, "skipped": False}
    assert out.count("\n") == 1 and "chatter of a C library" in err


def on_a_terminal(*words: str) -> list[str]:
    """Lines that a terminal shows of a run whose stdout and stderr it is."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL, *words], cwd=ROOT, stdout=theirs, stderr=theirs,
                               stdin=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # Linux ends a terminal so when its last writer is gone
        pass
    os.close(ours)
    assert process.wait(60) == 0, seen
    return seen.decode().replace("\r\n", "\n").splitlines()


def test_on_a_terminal_a_summary_comes_last_and_no_json() -> None:
    assert on_a_terminal() == ["chatter", "bench: done: hydra 1.50x plain, 2.25 tokens/step, plain 1.00x plain, "
                                          "1.00 tokens/step, questions 3", "  report  /x/report.json"]


def test_on_a_terminal_json_is_printed_where_it_is_asked_for() -> None:
    lines = on_a_terminal("--json")
    assert lines[0] == "chatter" and lines[1].startswith("bench: done: hydra")
    assert json.loads(lines[-1])["methods"]["hydra"]["speed_vs_plain"] == 1.5


def test_summary_shows_few_lines_of_any_stage() -> None:
    many = {f"figure_{number}": number for number in range(40)}
    text = summary.summarise(StageResult("distill", None, {f"part{number}": f"/x/{number}" for number in range(40)}, many))
    assert len(text.splitlines()) == 7 and text.startswith("distill: done: figure 0 0, figure 1 1,")
    text = summary.summarise(StageResult("train", None, {"hydra": "/x"}, {"hydra": {"tokens_per_step": 1.875}}, skipped=True))
    assert text == "train: was done already: hydra 1.88 tokens/step\n  hydra  /x\n"
    text = summary.summarise(StageResult("tree", None, {}, {"hydra": {"1": {"tokens_per_step": 1.3833, "nodes": 4}}}))
    assert text == "tree: done: hydra at batch 1 1.38 tokens/step\n"
    assert summary.summarise(StageResult("compare", None, {}, {"runs": []})) == "compare: done\n"


def test_user_mistakes_exit_2_in_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
                                          tmp_path: Path) -> None:
    def stage(config: RunConfig) -> StageResult:
        raise InputError("rows.jsonl: row 3: has no field `prompt`\nsecond line")

    use(monkeypatch, stage)
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [", encoding="utf-8")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: \xe9")
    cases = [([], "row 3"), (["train.nope=1"], "train.nope: unknown field"), (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
             (["--config", str(broken)], "YAML"), (["--config", str(latin)], "UTF-8"), (["justtext"], "section.field=value"),
             (["--nope"], "--nope"), (["train.epochs=-1"], "train.epochs"), (["storage=relative"], "storage"),
             (["name=a/b"], "name"), (["name=" + "a" * 201], "name"),
             (["train.only=nobody"], "train.only"), (["prompts.source=jsonl"], "prompts.path")]
    for arguments, words in cases:
        assert runner.run("distill", arguments) == 2, arguments
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err, (arguments, err)


def test_what_a_command_that_is_no_stage_raises_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
                                                            tmp_path: Path) -> None:
    """`export`, `import` and `cluster` end as stages do."""
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path))

    def raiser(error: BaseException) -> Callable[[], None]:
        def work() -> None:
            raise error
        return work

    for error, code, told in (
            (InputError("one\ntwo"), 2, "error: one two"), (StoppedError("down"), 1, "error: down"),
            (PermissionError(13, "Permission denied", "/x"), 1,
             "error: export: /x cannot be read or written (Permission denied)"),
            (RuntimeError("ours"), 1, rf"error: export: RuntimeError: ours: this is a fault of the program; its traceback is in "
                                      rf"{tmp_path}/\S+"),
            (KeyboardInterrupt(), 1, "export: interrupted")):
        assert runner.run_command("export", raiser(error)) == code
        assert re.fullmatch(re.escape(told) if "traceback" not in told else told, capfd.readouterr().err.rstrip("\n"))
    assert runner.run_command("export", lambda: None) == 0 and capfd.readouterr().err == ""


def test_other_faults_exit_1_in_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
                                         tmp_path: Path) -> None:
    """It names the file with the traceback: in the run's folder where there is one."""
    def broken(config: RunConfig) -> StageResult:
        raise RuntimeError("ours at http://me:hunter2@host/x\nmore")

    def interrupted(config: RunConfig) -> StageResult:
        raise KeyboardInterrupt

    use(monkeypatch, broken)
    (tmp_path / "temporary").mkdir()
    (tmp_path / "s" / "runs" / "made").mkdir(parents=True)
    for name, folder in (("made", tmp_path / "s" / "runs" / "made"), ("new", tmp_path / "temporary")):
        with monkeypatch.context() as patch:
            patch.setattr(runner.tempfile, "tempdir", str(tmp_path / "temporary"))
            assert runner.run("distill", [f"storage={tmp_path}/s", f"name={name}"]) == 1
        err = capfd.readouterr().err
        found = re.fullmatch(r"error: distill: RuntimeError: ours at http://host/x: this is a fault of the program; its "
                             r"traceback is in (\S+)\n", err)
        assert found and Path(found[1]).parent == folder, err
        text = Path(found[1]).read_text(encoding="utf-8")
        assert text.startswith("Traceback") and "raise RuntimeError" in text and "@host/x" not in text
    with monkeypatch.context() as patch:
        patch.setattr(runner.tempfile, "tempdir", str(tmp_path / "nowhere"))
        assert runner.run("distill", [f"storage={tmp_path}/s", "name=new"]) == 1
    err = capfd.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1] == "error: distill: RuntimeError: ours at http://host/x"
    use(monkeypatch, interrupted)
    assert runner.run("distill", []) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "interrupted" in err and "Traceback" not in err


def test_a_result_is_written_whole_or_the_command_fails(monkeypatch: pytest.MonkeyPatch,
                                                        capfd: pytest.CaptureFixture[str]) -> None:
    """A pipe takes a long line in pieces, a full disk takes none."""
    use(monkeypatch, lambda config: StageResult("distill", None, {}, {"long": "x" * 1000}))
    write, busy = os.write, [True]

    def in_pieces(descriptor: int, data: bytes) -> int:
        if descriptor == 1 and busy and busy.pop():
            raise BlockingIOError
        return write(descriptor, data[:7])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", in_pieces)
        assert runner.run("distill", []) == 0
    assert json.loads(capfd.readouterr().out)["long"] == "x" * 1000

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert runner.run("distill", []) == 1
    assert capfd.readouterr().err == ("error: distill: the result cannot be written to stdout (No space left on device): run the "
                                      "same command again\n")


def test_a_mistake_is_found_inside_what_ray_makes_of_it(monkeypatch: pytest.MonkeyPatch,
                                                        capfd: pytest.CaptureFixture[str]) -> None:
    mistake = InputError("bench.heads=/x: is truncated")
    task = RayTaskError("measure", "pages", mistake, "title", 1, "ip").as_instanceof_cause()
    assert isinstance(task, InputError) and str(task) != str(mistake)
    of_data, of_train = UserCodeException("pages"), WorkerGroupError("pages", {1: task})
    of_data.__cause__ = task
    bug = RuntimeError("ours")
    bug.__context__ = mistake  # it happened while a mistake was being handled: still a bug
    for error, code in ((task, 2), (of_data, 2), (of_train, 2), (bug, 1)):
        def stage(config: RunConfig, error: Exception = error) -> StageResult:
            raise error

        use(monkeypatch, stage)
        assert runner.run("distill", []) == code
        err = capfd.readouterr().err
        assert (err == "error: bench.heads=/x: is truncated\n") == (code == 2), err


def test_overrides_may_stand_anywhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: mixed", encoding="utf-8")
    assert runner.run("train", ["train.seed=3", "--config", str(path), "--plan", "train.epochs=2"]) == 0
    plan = tmp_path / "plan.yaml"
    plan.write_text(capfd.readouterr().out, encoding="utf-8")
    config = load_config(str(plan))
    assert (config.name, config.train.seed, config.train.epochs) == ("mixed", 3, 2)


def test_storage_of_the_environment_is_checked_and_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYDRA_HEADS_STORAGE", "relative")
    with pytest.raises(InputError, match=r"storage: must be an absolute path, got 'relative' .*HYDRA_HEADS_STORAGE"):
        load_config()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HYDRA_HEADS_STORAGE", "~/x")
    assert load_config().storage == str(tmp_path / "x")


@pytest.mark.parametrize("stage", runner.STAGES)
def test_plan_starts_nothing(stage: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
                             tmp_path: Path) -> None:
    use(monkeypatch, None)
    assert runner.run(stage, ["--plan", f"storage={tmp_path}/s", "name=planned"]) == 0
    out = capfd.readouterr().out
    plan = tmp_path / "plan.yaml"
    plan.write_text(out, encoding="utf-8")
    assert load_config(str(plan)).name == "planned"
    assert not (tmp_path / "s").exists()


def test_a_weight_format_is_chosen_before_a_stage_runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
                                                       tiny_base_dir: Path, tmp_path: Path) -> None:
    """But not to plan, nor for a stage that has no base."""
    seen: list[str] = []

    def stage(config: RunConfig) -> StageResult:
        seen.append(config.base.dtype)
        return StageResult("tree", None, {}, {})

    use(monkeypatch, stage)
    words = ["base.dtype=auto", f"base.model={tiny_base_dir}", f"storage={tmp_path}/s"]
    assert runner.run("tree", ["--plan", *words]) == 0 and "dtype: auto" in capfd.readouterr().out
    assert runner.run("compare", [*words]) == 0
    assert seen == ["auto"] and not (tmp_path / "s").exists()
    assert runner.run("tree", words) == 0 and seen == ["auto", "fp32"]
    assert "base.dtype=auto: fp32 (the one format that holds the checkpoint's own values)" in capfd.readouterr().err
    assert runner.run("tree", [*words, "base.model=/nowhere"]) == 2 and len(seen) == 2


def test_flags_stand_for_overrides(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for stage, flag, said in (("train", "--dry-run", "dry_run: true"), ("serve", "--update", "update: true"),
                              ("promote", "--rollback", "goes back to the version that was champion before")):
        assert runner.run(stage, [flag, "--plan", f"storage={tmp_path}"]) == 0
        assert said in capfd.readouterr().out
        assert runner.run("bench", [flag]) == 2


def test_relative_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = runner.read_config("batch", None, ["batch.input=in.jsonl", "serve.model=plain"])
    assert config.batch.input == str(tmp_path / "in.jsonl") and config.serve.model == "plain"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(InputError, match="relative"):
        runner.read_config("batch", None, ["batch.input=in.jsonl"])
    assert runner.read_config("batch", None, ["batch.input=/in.jsonl"]).batch.input == "/in.jsonl"


def test_where_training_starts_is_the_callers_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray Train's workers run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  start: {medusa: old/heads, hydra: shipped}\n", encoding="utf-8")
    config = runner.read_config("train", str(file), ["train.start.hydra++=other"])
    assert config.train.start == {"medusa": str(tmp_path / "old/heads"), "hydra": "shipped", "hydra++": str(tmp_path / "other")}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(InputError, match=r"train\.start\.medusa=old/heads: is a relative path"):
        runner.read_config("train", str(file), [])
    assert runner.read_config("train", None, ["train.start.hydra=shipped"]).train.start == {"hydra": "shipped"}


def test_override_values_are_yaml() -> None:
    config = runner.read_config("train", None, ["train.lr=1e-4", "distill.temperatures=[0, 0.5]", "bench.limit=null"])
    assert config.train.learning_rate == 1e-4 and config.distill.temperatures == (0, 0.5) and config.bench.limit is None


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    config = runner.read_config("train", None, ["train.lr=1e-4", "name=back"])
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == config


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(stage in text for stage in runner.STAGES)
    assert cli.main(["nonsense"]) == 2
    assert "did you mean" not in capsys.readouterr().err
    assert cli.main(["distil"]) == 2
    assert "error: 'distil' is not a stage: did you mean distill? choose one of quickstart, " in capsys.readouterr().err
    done = subprocess.run([sys.executable, "-m", "jobs.train", "train.nope=1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1] == "error: config: train.nope: unknown field"


@pytest.mark.parametrize("stage", runner.STAGES)
def test_help_of_a_stage_lists_its_settings(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([stage, "--help"])
    text = capsys.readouterr().out
    assert not ended.value.code and runner.STAGES[stage].example in text
    names = [setting.name for setting in list_settings(RunConfig)]
    for part in (*runner.STAGES[stage].reads, "name", "storage", "ray_address", "tracking"):
        found = [name for name in names if name == part or name.startswith(f"{part}.")]
        assert found, part
        assert all(f"  {name}=" in text for name in found)
    assert all(f"  {short}=  for  {long}=" in text for short, long in runner.STAGES[stage].short.items())


def test_help_of_the_quickstart_shows_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["quickstart", "--help"])
    assert "  distill.max_new_tokens=72 " in capsys.readouterr().out


def test_config_prints_settings_and_their_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: mixed", encoding="utf-8")
    assert cli.main(["config", "--config", str(path), "train.lr=1e-4"]) == 0
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert (load_config(str(path)).name, load_config(str(path)).train.learning_rate) == ("mixed", 1e-4)
    assert cli.main(["config", "--describe"]) == 0
    assert "| `train.max_steps` | integer >= 1 or null | null | " in capsys.readouterr().out
    for words in (["--config"], ["--config", "train.lr=1"]):
        assert cli.main(["config", *words]) == 2
        assert "config --config: name a file" in capsys.readouterr().err
    assert cli.main(["config", "train.steps=1"]) == 2
    assert "did you mean train.max_steps?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"], ["quickstart", "--plan"], ["load", "--plan"],
                                   ["compare", "--plan"], ["config", "--describe"], ["train", "train.steps=1"], ["nonsense"],
                                   ["cluster", "--help"], ["cluster", "platform", "storage=/mnt/shared/x"], ["export", "--help"],
                                   ["export", "--to", "nowhere", "heads"]], ids=" ".join)
def test_help_plans_and_mistakes_import_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    code = ("import sys\nfrom jobs import cli\ntry:\n    cli.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
            "print(','.join({name.split('.')[0] for name in sys.modules}))")
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "HYDRA_HEADS_STORAGE": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split(","))
    assert "pydantic" in loaded and not loaded & (HEAVY - FOR_SIZES if "--plan" in words else HEAVY)


@pytest.mark.parametrize("override", [
    "batch.output=ftp://host/x", "batch.input=http://h/p.jsonl", "prompts.path=hdfs://data/p.jsonl", "serve.model=https://hub/x",
    "train.start.medusa=sftp://bucket/heads", "base.model=hf://someone/model", "serve.api_keys_file=s3://bucket/keys",
    "base.model=s3://bucket/base"])
def test_a_uri_that_is_not_supported_is_no_path(override: str) -> None:
    """`ftp://host/x` as a path would be a folder `ftp:` in the working directory, and the job would end well."""
    more = ["prompts.source=jsonl"] if override.startswith("prompts") else []
    with pytest.raises(InputError, match=r"(batch|prompts|serve|train|base)\..*: `\w+://` is not supported"):
        runner.read_config("batch", None, [override, *more])
    with pytest.raises(InputError, match=r"config: storage: ftp://host/x: `ftp://` is not supported"):
        runner.read_config("batch", None, ["storage=ftp://host/x"])


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "localhost", "127.0.0.1"])
def test_an_address_of_another_kind_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS as `ray job submit` takes it, or a host without its port."""
    import ray

    from pipelines.runtime.ray_cluster import ensure_ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=rf"RAY_ADDRESS={address}: is no address of a Ray cluster: write it as HOST:6379"), \
            ensure_ray(load_config()):
        pass
