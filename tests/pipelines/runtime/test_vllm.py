"""What a stage finds out about `engine: vllm` before anything starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.interop import InstalledVllm, VllmSettings
from hydra_core.tree import DraftTree, TreeSet
from jobs.cli import main
from pipelines.batch.stage import run_batch
from pipelines.config import RunConfig, load_config
from pipelines.distill.answers import engine_of
from pipelines.distill.stage import distill_fingerprint, run_distill
from pipelines.manifests.target import Target
from pipelines.runtime import vllm
from pipelines.runtime.dry_run import describe
from pipelines.runtime.vllm import vllm_settings
from pipelines.serve.model_identity import model_digest
from pipelines.serve.stage import check_args, find_args, with_running_settings
from pipelines.tracking.stage_settings import stage_settings
from tests.trained import random_heads

GPU, CPU = InstalledVllm("0.32.0", False), InstalledVllm("0.32.0", True)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets which vLLM is installed; at first the build for CPUs."""
    def install(found: InstalledVllm) -> None:
        monkeypatch.setattr(vllm, "check_vllm", lambda any_version: found)

    install(CPU)
    return install


def config_for(**changes: Any) -> RunConfig:
    return load_config(None, {"engine": "vllm", "storage": "/s", **{name.replace("__", "."): value for name, value in
                                                                     changes.items()}})


def of(config: RunConfig) -> VllmSettings | None:
    return vllm_settings(config, "serve.workers", config.serve.workers)


def test_every_setting_is_handed_on(installed: Any) -> None:
    assert of(config_for(engine="own", base__dtype="int4")) is None
    assert of(config_for()) == VllmSettings()
    installed(GPU)
    asked = config_for(serve__workers={"gpus": 4, "threads": 2, "cpus": 0.5}, vllm={
        "gpu_memory_utilization": 0.8, "kv_cache_gib": 3, "enforce_eager": False, "num_speculative_tokens": 2,
        "any_version": True, "arguments": {"block_size": 32}})
    assert of(asked) == VllmSettings(4, 0.8, 3, False, 2, {"block_size": 32}, True)
    assert VllmSettings(**asdict(of(asked))) == of(asked)  # type: ignore[call-overload]
    assert of(config_for(serve__workers__gpus=0.5)) == VllmSettings(1)
    assert of(config_for(serve__workers__gpus=4, vllm__tensor_parallel_size=2)) == VllmSettings(2)


@pytest.mark.parametrize(("build", "changes", "told"), [
    (CPU, {"base__dtype": "int4"}, r"base\.dtype=int4: vLLM computes in bf16 or fp32"),
    (CPU, {"base__device": "cuda"}, r"base\.device=cuda: the installed vLLM is the build for CPUs"),
    (CPU, {"serve__workers__gpus": 1}, r"serve\.workers\.gpus=1: the installed vLLM is the build for CPUs"),
    (GPU, {}, r"serve\.workers\.gpus=0: the installed vLLM is the build for GPUs"),
    (GPU, {"base__device": "cpu", "serve__workers__gpus": 1}, r"base\.device=cpu: the installed vLLM is the build for GPUs"),
    (GPU, {"serve__workers__gpus": 2, "vllm__tensor_parallel_size": 4}, r"parallel_size=4: serve\.workers\.gpus=2 reserves"),
    (CPU, {"vllm__arguments": {"dtype": "half"}}, r"vllm\.arguments\.dtype: set base\.dtype"),
    (CPU, {"vllm__arguments": {"trust_remote_code": True}}, r"vllm\.arguments\.trust_remote_code: is set by this project")])
def test_what_does_not_fit_together(installed: Any, build: InstalledVllm, changes: dict[str, Any], told: str) -> None:
    installed(build)
    with pytest.raises(InputError, match=told):
        of(config_for(**changes))


def test_plans_name_the_engine() -> None:
    for stage in ("distill", "batch", "serve"):
        assert not any("vLLM" in line for line in describe(config_for(engine="own"), stage))
        assert any("in vLLM" in line for line in describe(config_for(), stage)), stage
    assert any("(tensor parallel over 4)" in line for line in describe(config_for(vllm__tensor_parallel_size=4), "batch"))
    asked = describe(config_for(batch__address="http://other:1/v1"), "batch")
    assert any("by http://other:1/v1" in line for line in asked) and not any("vLLM" in line for line in asked)


def test_answers_of_two_engines_are_told_apart(tiny_base_dir: Path, storage: Path) -> None:
    """By fingerprints and ids; those of our own engine are what they were."""
    common = {"base__model": str(tiny_base_dir), "base__dtype": "fp32", "serve__model": "plain", "storage": str(storage)}
    own, other, third = (config_for(**common, **more) for more in (
        {"engine": "own"}, {}, {"vllm__arguments": {"quantization": "fp8"}}))
    bases = [model_digest(find_args(config)).base for config in (own, other, third)]
    assert bases[1] == f"{bases[0]}:vllm" and bases[2].startswith(f"{bases[1]}:") and bases[0].endswith(":fp32")
    assert len({distill_fingerprint(config) for config in (own, other, third)}) == 3
    assert [engine_of(config) for config in (own, other, third)] == [[], ["vllm"], ["vllm", {"quantization": "fp8"}]]
    faster = config_for(**common, vllm__tensor_parallel_size=1, vllm__gpu_memory_utilization=0.5)
    assert distill_fingerprint(faster) == distill_fingerprint(other)
    assert find_args(other).label == "plain in vLLM" and find_args(own).label == "plain" and find_args(own).vllm is None


def test_runs_record_the_engine() -> None:
    for stage in ("distill", "batch", "serve", "load"):
        found = stage_settings(config_for(vllm__tensor_parallel_size=2), stage)
        assert found["engine"] == "vllm" and found["vllm"]["tensor_parallel_size"] == 2
        assert not {"engine", "vllm"} & stage_settings(config_for(engine="own"), stage).keys()
    assert "engine" not in stage_settings(config_for(), "train")


def test_heads_that_vllm_cannot_run_are_named_at_the_start(tiny_base: Base, tiny_base_dir: Path, storage: Path) -> None:
    common = {"base__model": str(tiny_base_dir), "base__dtype": "fp32", "storage": str(storage), "prompts__source": "jsonl",
              "prompts__path": str(storage / "p.jsonl"), "batch__input": str(storage / "p.jsonl"), "batch__engine": "embedded"}
    for kind in ("hydra", "hydra++"):
        save_checkpoint(storage / kind, random_heads(tiny_base, kind), tiny_base.identity, TreeSet({1: DraftTree(((0,),))}), {})
    for drafter in ("ngram", "plain"):
        save_configuration(storage / drafter, DecodingConfiguration(drafter, drafter, tiny_base.identity))  # type: ignore[arg-type]
    (storage / "p.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")

    def served(name: str, **more: Any) -> Any:
        return check_args(find_args(config_for(**common, serve__model=str(storage / name), **more)))

    assert served("hydra").vllm is not None and served("plain").digest
    heads = {"distill__heads": str(storage / "hydra"), "distill__temperatures": [0.0]}
    with pytest.raises(InputError, match=r"vllm\.num_speculative_tokens=9: there are \d heads"):
        served("hydra", vllm__num_speculative_tokens=9)
    with pytest.raises(InputError, match=r"kind=hydra\+\+: its prefix layer needs a KV cache"):
        served("hydra++")
    with pytest.raises(InputError, match=r"has no heads \(ngram\)"):
        served("ngram")
    for changes, told in (
            ({"distill__heads": str(storage / "hydra++")}, r"kind=hydra\+\+"),
            (heads | {"vllm__num_speculative_tokens": 9}, "num_speculative_tokens=9"),
            (heads | {"distill__temperatures": [0.0, 1.0]}, r"distill\.temperatures=1: vLLM on a CPU .*distill\.heads"),
            ({"distill__temperatures": [0.0, 3.0]}, r"distill\.temperatures=3: vLLM takes 0 or 0\.01 to 2")):
        with pytest.raises(InputError, match=told):
            run_distill(config_for(**common | changes))
    for changes, told in (
            ({"batch__temperature": 1.0}, r"batch\.temperature=1: vLLM on a CPU cannot sample .*serve\.model=plain"),
            ({"batch__temperature": 0.001}, r"batch\.temperature=0\.001: vLLM takes"),
            ({"batch__shared_answers": 9}, r"batch\.shared_answers: vLLM drafts from no other answers"),
            ({"serve__shared_answers": 9}, r"serve\.shared_answers: vLLM drafts from no other answers")):
        with pytest.raises(InputError, match=told):
            run_batch(config_for(**common | {"serve__model": str(storage / "hydra")} | changes))


def test_an_endpoint_with_vllm_follows_no_registry(tiny_base_dir: Path, storage: Path) -> None:
    common = {"base__model": str(tiny_base_dir), "storage": str(storage), "serve__model": "plain"}
    config = config_for(**common)
    args = find_args(config)
    assert with_running_settings(config, args).follow is None
    follows = config.model_copy(update={"serve": config.serve.model_copy(update={"model": "models:/m@champion"})})
    with pytest.raises(InputError, match=r"vLLM keeps the heads .* serve\.follow_registry=0"):
        with_running_settings(follows, args)


def test_a_command_without_vllm_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                   storage: Path, tiny_base_dir: Path) -> None:
    def missing(any_version: bool) -> InstalledVllm:
        raise InputError("engine=vllm: vLLM is missing in this environment")

    monkeypatch.setattr(vllm, "check_vllm", missing)
    assert main(["batch", "engine=vllm", "serve.model=plain", f"storage={storage}", f"base.model={tiny_base_dir}"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: engine=vllm: vLLM is missing in this environment"


def test_manifests_for_vllm_are_refused(tiny_base_dir: Path) -> None:
    with pytest.raises(InputError, match="engine=vllm: the images of these manifests hold no vLLM"):
        Target(config_for(base__model=str(tiny_base_dir))).check()


def test_sizes_share_the_base_out_among_gpus(tiny_base_dir: Path, storage: Path) -> None:
    """A base beyond one GPU of ours is none beyond four of vLLM's; nobody tells vLLM's time."""
    from pipelines.sizing.amounts import total
    from pipelines.sizing.base import shape_of
    from pipelines.sizing.estimate import stage_sizes
    from pipelines.sizing.hardware import Surroundings

    base = shape_of(str(tiny_base_dir), "bf16", None, storage / "cache")
    common = {"base__model": str(tiny_base_dir), "serve__model": "plain", "storage": str(storage), "serve__workers__gpus": 4,
              "distill__workers__gpus": 4, "batch__input": str(tiny_base_dir / "config.json")}
    around = Surroundings(local=True)
    for stage in ("serve", "batch", "load"):
        (size,), (own,) = (stage_sizes(config_for(**common, engine=engine), stage, base, around) for engine in ("vllm", "own"))
        assert size.device["weights"].high * 4 == base.weight_bytes() <= own.device["weights"].high
        assert size.seconds is None and "among 4 GPUs" in size.notes[-1] and size.storage == own.storage
    (size,) = stage_sizes(config_for(**common), "distill", base, around)
    assert "hidden states, on one device" in size.notes[-1] and size.device["weights"].low == base.weight_bytes()
    (size,) = stage_sizes(config_for(**common | {"serve__workers__gpus": 0}, vllm__kv_cache_gib=2), "serve", base, around)
    assert not size.device and size.memory["keys and values"].high == 2 << 30 and total(size.memory).low > 2 << 30
