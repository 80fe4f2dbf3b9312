"""Accelerators by their public datasheets, and the memory and disk that there are."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from hydra_core.storage import is_remote
from pipelines.config import RunConfig

USABLE = 0.92
"""Share of a GPU's memory that a program can use: the driver, ECC and fragments take the rest."""


@dataclass(frozen=True)
class Accelerator:
    """`memory`: bytes; `bandwidth`: bytes a second; `flops`: bf16 without sparsity, a second. Of the SXM form where there is
    one."""

    name: str
    memory: int
    bandwidth: float
    flops: float

    @property
    def usable(self) -> int:
        return int(USABLE * self.memory)


def _gpu(name: str, gigabytes: int, terabytes_a_second: float, teraflops: float) -> Accelerator:
    return Accelerator(name, gigabytes << 30, terabytes_a_second * 1e12, teraflops * 1e12)


ACCELERATORS = (
    _gpu("B200", 180, 8.0, 2250), _gpu("H200", 141, 4.8, 989), _gpu("H100", 80, 3.35, 989), _gpu("A100-80GB", 80, 2.039, 312),
    _gpu("A100-40GB", 40, 1.555, 312), _gpu("L40S", 48, 0.864, 362), _gpu("L4", 24, 0.3, 121))
"""From NVIDIA's public datasheets of these products (B200: of the DGX B200). What they call GB of memory is about as many GiB."""
SPAN = (ACCELERATORS[3], ACCELERATORS[1])
"""The slower and the faster end of times where the cluster's GPU is not known: A100 of 80 GB, and H200."""


def accelerator_named(label: str | None) -> Accelerator | None:
    """The accelerator in `LABEL=VALUE` of a node, as nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3, or in torch's name of a
    device; None for one that is not in the table."""
    words = re.split(r"[^A-Z0-9]+", (label or "").rpartition("=")[2].upper())
    return next((known for known in ACCELERATORS if set(known.name.upper().split("-")) <= set(words)), None)


@dataclass(frozen=True)
class Room:
    """`bytes` that there are of something; `what`: its name in a sentence; `setting`: what else may be set to change it."""

    bytes: int
    what: str
    setting: str = ""


@dataclass(frozen=True)
class Surroundings:
    """What is known of the machines. `device`: memory of one GPU; `memory`: of one machine; `disk`: at the storage; `scratch`:
    at /tmp; None: not known. `nodes`: machines among which workers are shared out; `cores`: of one; `gpu`: the accelerator, if
    it is in the table; `local`: everything runs on this machine, with nothing on a network."""

    device: Room | None = None
    memory: Room | None = None
    disk: Room | None = None
    scratch: Room | None = None
    nodes: int = 1
    cores: float | None = None
    gpu: Accelerator | None = None
    local: bool = False


def find_surroundings(config: RunConfig) -> Surroundings:
    """The machines that these settings mean: those of the section `cluster` where it is given, none that are known where a
    cluster is joined, else this one."""
    cluster = config.cluster
    if "cluster" in config.model_fields_set:
        gpu = accelerator_named(cluster.gpu_label) if cluster.gpus else None
        return Surroundings(
            device=Room(gpu.usable, f"one {gpu.name} has", "cluster.gpu_label") if gpu else None,
            memory=Room(quantity_bytes(cluster.memory), f"cluster.memory={cluster.memory} allows", "cluster.memory"),
            disk=Room(quantity_bytes(cluster.claim_size), f"cluster.claim_size={cluster.claim_size} holds", "cluster.claim_size")
            if cluster.claim_size and not is_remote(config.storage) else None,
            nodes=cluster.nodes, cores=cluster.cpus, gpu=gpu)
    if config.ray_address or os.environ.get("RAY_ADDRESS"):  # as `runtime.ray_cluster` reads it, which imports Ray
        return Surroundings()
    return _this_machine(config)


def _this_machine(config: RunConfig) -> Surroundings:
    import psutil
    import torch

    from hydra_core.decoding.memory import free_bytes

    device = gpu = None
    if config.base.device != "cpu" and torch.cuda.is_available():
        device = Room(free_bytes(torch.device("cuda")), "free on this machine's GPU are")
        gpu = accelerator_named(torch.cuda.get_device_name())
    return Surroundings(device, Room(free_bytes(torch.device("cpu")), "free on this machine are"), _disk(config.storage),
                        _disk("/tmp"), cores=psutil.cpu_count() or 1, gpu=gpu, local=True)


def _disk(storage: str) -> Room | None:
    """Free bytes where `storage` will lie; None for a URI."""
    if is_remote(storage):
        return None
    folder = Path(storage)
    while not folder.exists():
        folder = folder.parent
    try:
        return Room(shutil.disk_usage(folder).free, f"free at {folder} are", "storage" if storage != "/tmp" else "")
    except OSError:
        return None


def quantity_bytes(quantity: str) -> int:
    """Bytes of a Kubernetes quantity, as 256Gi or 1.5T."""
    units = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity)
    assert found, quantity  # the settings' pattern holds
    return int(float(found[1]) * units[found[2]])
