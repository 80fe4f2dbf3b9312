"""What does not fit is refused in one line that names quantity, need, room and setting; what may not fit is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hydra_core.errors import InputError
from pipelines.config import load_config
from pipelines.sizing import hardware, plan_of
from pipelines.sizing.amounts import Range, StageSize, size_text, time_text
from pipelines.sizing.estimate import uses_gpu
from pipelines.sizing.hardware import ACCELERATORS, Room, Surroundings, accelerator_named, find_surroundings, quantity_bytes
from pipelines.sizing.limits import check_fits
from tests.conftest import ROOT
from tests.tiny import make_config

GIB = 2**30
EIGHT_B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False}
H100 = {"cluster.gpus": 8, "cluster.gpu_label": "nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3", "cluster.memory": "512Gi"}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with the config.json of an 8B shape, and no weights."""
    make_config(**EIGHT_B).save_pretrained(tmp_path / "8b")
    return str(tmp_path / "8b")


def refusal(stage: str, model: str, storage: Path, **changes: Any) -> str:
    values = {"base.model": model, "storage": str(storage), **{name.replace("__", "."): value for name, value in changes.items()}}
    with pytest.raises(InputError) as error:
        plan_of(load_config(None, values), stage)
    assert "\n" not in str(error.value)
    return str(error.value)


def lines(stage: str, model: str, storage: Path, **changes: Any) -> str:
    values = {"base.model": model, "storage": str(storage), **{name.replace("__", "."): value for name, value in changes.items()}}
    return "\n".join(plan_of(load_config(None, values), stage).lines())


def test_memory_of_this_machine(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Surroundings(memory=Room(8 * GIB, "free on this machine are"), local=True)
    monkeypatch.setattr(hardware, "_this_machine", lambda config: room)
    said = refusal("serve", model, tmp_path, serve__max_batch_size=1)
    assert said.startswith("serve: a worker needs 19 GiB of memory or more, free on this machine are 8 GiB; weights take 15 GiB")
    said = refusal("serve", model, tmp_path, serve__max_batch_size=64)
    assert "keys and values take 68 GiB of it: lower serve.max_batch_size or base.context_limit" in said
    said = refusal("distill", model, tmp_path, distill__workers__count=3)
    assert said.startswith("distill: 3 workers on one need") and "weights take 45 GiB of it: lower distill.workers.count" in said
    monkeypatch.setattr(hardware, "_this_machine", lambda config: Surroundings(memory=Room(19 * GIB, "free are"), local=True))
    said = lines("serve", model, tmp_path, serve__max_batch_size=1)
    assert "serve: may not fit: a worker needs up to" in said and "network" not in said


def test_memory_of_a_gpu_of_the_cluster(model: str, tmp_path: Path) -> None:
    said = refusal("serve", model, tmp_path, **H100, serve__workers__gpus=1, serve__max_batch_size=80)
    assert "GPU memory or more, one H100 has 74 GiB; keys and values take" in said and "serve.max_batch_size" in said
    said = refusal("train", model, tmp_path, **H100, train__workers__gpus=1, train__workers__count=1, train__zero_stage=0,
                   **{"train.drafters": {"big": {"kind": "hydra++", "num_blocks": 80}}})
    assert said.startswith("train big: ") and "raise train.zero_stage, train.workers.count or lower num_heads" in said
    assert "GPU memory of each of 2 workers" in lines("serve", model, tmp_path, **H100, serve__workers__gpus=1, serve__replicas=2)


def test_memory_and_volume_of_pods(model: str, tmp_path: Path) -> None:
    small = H100 | {"cluster.memory": "12Gi"}
    said = refusal("serve", model, tmp_path, **small, serve__workers__gpus=1)
    assert "cluster.memory=12Gi allows 12 GiB; weights while they are loaded take 15 GiB" in said
    assert said.endswith("or set cluster.memory")
    volume = H100 | {"cluster.claim_size": "10Gi"}
    said = refusal("distill", model, tmp_path, **volume, distill__workers__gpus=1, prompts__count=200_000)
    assert "of storage or more, cluster.claim_size=10Gi holds 10 GiB; most of it are hidden states" in said
    assert "distill.features=held_out" in said and "cluster.claim_size" in said


def test_a_cluster_that_is_joined_refuses_nothing(model: str, tmp_path: Path) -> None:
    """Its machines are not known: what a worker needs is said."""
    said = lines("serve", model, tmp_path, ray_address="10.0.0.1:6379", serve__workers__gpus=1, serve__max_batch_size=999)
    assert "serve: GPU memory of its worker: 1" in said and "A100-80GB or H200" in said
    assert find_surroundings(load_config(None, {"ray_address": "10.0.0.1:6379"})) == Surroundings()


@pytest.mark.parametrize(("stage", "changes", "wanted"), [
    ("distill", {}, False), ("distill", {"base.device": "cuda"}, True), ("distill", {"distill.workers.gpus": 0.5}, True),
    ("train", {"base.device": "cuda"}, False), ("ablate", {"train.workers.gpus": 1}, True),
    ("batch", {"serve.workers.gpus": 1}, True), ("bench", {}, False), ("bench", H100, True),
    ("bench", H100 | {"base.device": "cpu"}, False), ("tree", {"base.device": "cuda"}, True)])
def test_which_stages_use_a_gpu(stage: str, changes: dict[str, Any], wanted: bool) -> None:
    assert uses_gpu(load_config(None, changes), stage, Surroundings()) is wanted


def test_free_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = StageSize("train mine", storage={"checkpoints": Range(5 * GIB, 9 * GIB)}, stored=GIB)
    with pytest.raises(InputError, match=r"train mine: needs about 4 GiB of storage or more, free at /x are 3 GiB; most.*points"):
        check_fits([size], Surroundings(disk=Room(3 * GIB, "free at /x are", "storage")))
    assert check_fits([size], Surroundings(disk=Room(4 * GIB, "free at /x are", "storage"))) == [size]
    assert hardware._disk(f"{tmp_path}/not/there").what == f"free at {tmp_path} are"  # type: ignore[union-attr]
    assert hardware._disk("s3://bucket/x") is None


def test_workers_of_one_gpu_need_it_together() -> None:
    size = StageSize("distill", 6, device={"weights": Range.of(10 * GIB)}, per_gpu=6)
    with pytest.raises(InputError, match=r"6 workers on one need 60 GiB of GPU memory or more.*raise distill\.workers\.gpus"):
        check_fits([size], Surroundings(device=Room(48 * GIB, "has")))


@pytest.mark.parametrize(("label", "name"), [
    ("nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3", "H100"), ("nvidia.com/gpu.product=NVIDIA-H200", "H200"),
    ("x=NVIDIA-A100-SXM4-80GB", "A100-80GB"), ("x=NVIDIA-A100-PCIE-40GB", "A100-40GB"), ("NVIDIA L4", "L4"),
    ("NVIDIA L40S", "L40S"), ("x=Tesla-T4", None), (None, None)])
def test_the_accelerator_of_a_label(label: str | None, name: str | None) -> None:
    found = accelerator_named(label)
    assert (found.name if found else None) == name
    assert all(one.usable < one.memory for one in ACCELERATORS)


def test_quantities_and_texts() -> None:
    assert [quantity_bytes(text) for text in ("1Gi", "1.5G", "250M", "7")] == [GIB, 1_500_000_000, 250_000_000, 7]
    assert size_text(Range(1.04 * GIB, 2 * GIB)) == "1 to 2 GiB" and size_text(Range.of(15 * GIB)) == "15 GiB"
    assert size_text(Range(10 * 2**20, 2 * GIB)) == "10 MiB to 2 GiB" and size_text(Range.of(0)) == "0 B"
    assert time_text(Range(30, 90)) == "0.5 to 1.5 min" and time_text(Range(3, 7200)) == "3 s to 2 h"


@pytest.mark.parametrize("stage", ["distill", "train", "tree", "bench", "serve", "batch"])
def test_the_shipped_cluster_settings_fit_the_cluster_that_they_describe(model: str, stage: str) -> None:
    """On GPUs of 80 GB, as its comments say."""
    label = "nvidia.com/gpu.product=NVIDIA-A100-SXM4-80GB"
    config = load_config(str(ROOT / "jobs" / "configs" / "cluster_llama_8b.yaml"),
                         {"base.model": model, "cluster.gpu_label": label})
    sizes = plan_of(config, stage).sizes
    assert sizes and all(size.device for size in sizes)
    if stage == "serve":
        assert 64 < sum(part.low for part in sizes[0].device.values()) / GIB < 69
