"""`base.dtype=auto`: chosen by measured steps among formats that lose nothing, once for a run; and what lossy ones may do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hydra_core.base import BaseIdentity, resolve_base
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.errors import InputError
from pipelines.bench.stage import run_bench
from pipelines.config import RunConfig, load_config
from pipelines.distill.stage import run_distill
from pipelines.profiling import weight_format as base_format
from pipelines.profiling.weight_format import resolve_format
from pipelines.promote.stage import run_promote
from tests.gguf_file import write_gguf


@pytest.fixture(scope="module")
def packed(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base stored in Q4_1."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_base_dir, path, quantised=True)
    return path


def config_for(storage: Path, model: Path, dtype: str = "auto", **changes: object) -> RunConfig:
    values = {"storage": str(storage), "base.model": str(model), "base.dtype": dtype, "base.device": "cpu"}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def steps_of(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    monkeypatch.setattr(base_format, "_candidates", lambda config: seconds)


def test_chosen_once_for_a_run(packed: Path, tiny_base_dir: Path, storage: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(storage, packed)
    steps_of(monkeypatch, bf16=0.021, int4=0.0127)
    chosen = resolve_format(config, "distill")
    assert chosen.base.dtype == "int4" and chosen == config_for(storage, packed, "int4")
    line = "base.dtype=auto: int4 (a plain step takes bf16 21.0 ms, int4 12.7 ms)"
    assert capsys.readouterr().err.splitlines()[-1] == line
    steps_of(monkeypatch, bf16=0.01, int4=0.02)  # the machine is busy now, or another one
    assert resolve_format(config, "bench").base.dtype == "int4" and capsys.readouterr().err == f"{line}\n"
    assert resolve_format(config_for(storage, packed, name="other"), "distill").base.dtype == "bf16"
    path = storage / "runs" / "default" / "base_format.json"
    path.write_text("{", encoding="utf-8")
    assert resolve_format(config, "bench").base.dtype == "bf16"
    steps_of(monkeypatch, fp32=0.03)
    assert resolve_format(config_for(storage, tiny_base_dir), "bench").base.dtype == "fp32"  # another base
    for dtype in ("bf16", "fp32", "int4-lossy"):
        asked = config_for(storage, packed, dtype)
        assert resolve_format(asked, "bench") is asked


def test_full_precision_starts_nothing(tiny_base_dir: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_format, "ensure_ray", None)
    monkeypatch.setattr(base_format, "machine_costs", None)
    assert resolve_format(config_for(storage, tiny_base_dir), "train").base.dtype == "fp32"
    assert json.loads((storage / "runs" / "default" / "base_format.json").read_text(encoding="utf-8"))["milliseconds"] == {}


def test_what_is_served_has_its_own(packed: Path, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    steps_of(monkeypatch, bf16=0.01, int4=0.02)
    resolved = resolve_base(str(packed), storage / "cache")
    save_configuration(tmp_path / "ngram", DecodingConfiguration(
        "ngram", "ngram", BaseIdentity(resolved.name, resolved.digest, "int4")))
    for stage in ("serve", "batch"):
        config = config_for(storage, packed, serve__model=str(tmp_path / "ngram"))
        assert resolve_format(config, stage).base.dtype == "int4"
        assert "the format in which the served configuration was measured" in capsys.readouterr().err
        assert not (storage / "runs").exists()
    assert resolve_format(config_for(storage, packed, serve__model="plain"), "serve").base.dtype == "bf16"
    with pytest.raises(InputError, match="is not registered: run `hydra-heads promote` first"):
        resolve_format(config_for(storage, packed), "serve")


@pytest.mark.slow
def test_timed_on_a_worker(local_ray: None, packed: Path, storage: Path) -> None:
    config = config_for(storage, packed, bench__threads=1)
    chosen = resolve_format(config, "distill").base.dtype
    times = json.loads((storage / "runs" / "default" / "base_format.json").read_text(encoding="utf-8"))["milliseconds"]
    assert set(times) == {"bf16", "int4"} and chosen == min(times, key=lambda name: times[name])
    assert len(list((storage / "cache" / "costs").glob("verify-*.json"))) == 2  # `bench` reads these


@pytest.mark.slow
def test_a_lossy_base_is_benched_and_no_more(local_ray: None, tiny_base_dir: Path, storage: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"abc abc {number}"}) + "\n" for number in range(2)), encoding="utf-8")
    config = config_for(storage, tiny_base_dir, "int4-lossy", bench__prompts=str(prompts), bench__max_new_tokens=12,
                        bench__identity_prompts=1, bench__identity_batch=0, bench__threads=1,
                        bench__methods=["transformers", "ngram"])
    methods = run_bench(config).figures["methods"]
    assert methods["ngram"]["tokens_per_step"] > 0 and methods["transformers"]["tokens_per_step"] > 0
    assert methods["ngram"]["naive"]["int4-lossy"]["different"] == 0  # the engine's own promise, judged on the base itself
    with pytest.raises(InputError, match="only lossless configurations are promoted"):
        run_promote(config)
    with pytest.raises(InputError, match="heads learn from the base itself"):
        run_distill(config)
    assert not (storage / "runs" / "default" / "distill").exists()
