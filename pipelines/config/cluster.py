"""The settings of `cluster`: what the manifests for Kubernetes ask for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipelines.config.section import Section

NAME = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""A name as Kubernetes takes it for a namespace, a claim or a queue."""
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
LABEL = r"^[A-Za-z0-9][A-Za-z0-9./_-]*=[A-Za-z0-9._-]*$"


class ClusterSection(Section):
    """The Kubernetes cluster for which `hydra-heads cluster` writes manifests."""

    namespace: str = Field("hydra-heads", pattern=NAME, description="namespace of everything that is written")
    image: str | None = Field(
        None, pattern=r"^\S+$", description="image of every pod; default: hydra-heads, or hydra-heads-cuda where a worker has "
                                            "GPUs, with the version of this package as its tag")
    image_pull: str | None = Field(None, pattern=NAME, description="name of the registry's secret, where pulling needs one")
    nodes: int = Field(1, ge=1, description="worker pods of a job, and of the endpoint where it does not scale")
    min_nodes: int | None = Field(None, ge=1, description="least worker pods of the endpoint; default: nodes")
    max_nodes: int | None = Field(None, ge=1, description="most worker pods of the endpoint, added as load needs them")
    cpus: float = Field(4, gt=0, description="processors of a worker pod")
    memory: str = Field("16Gi", pattern=QUANTITY, description="memory of a worker pod")
    gpus: int = Field(0, ge=0, description="GPUs of a worker pod")
    gpu_resource: str = Field("nvidia.com/gpu", description="name under which the device plugin offers GPUs")
    gpu_label: str | None = Field(
        None, pattern=LABEL, description="LABEL=VALUE of nodes with the right GPU, as nvidia.com/gpu.product=NVIDIA-H100-PCIe")
    spot_label: str | None = Field(
        None, pattern=LABEL, description="LABEL=VALUE of nodes that may be taken away, for workers; their taint is tolerated")
    head_cpus: float = Field(2, gt=0, description="processors of a head pod, which runs no worker")
    head_memory: str = Field("8Gi", pattern=QUANTITY, description="memory of a head pod")
    mount: str = Field("/mnt/shared", pattern=r"^/.", description="where pods mount the shared volume; storage lies there")
    claim: str = Field("hydra-heads", pattern=NAME, description="name of the volume's claim")
    claim_size: str | None = Field("1Ti", pattern=QUANTITY, description="size of the claim; null: it exists already")
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = Field(
        "ReadWriteMany", description="of the claim; ReadWriteOnce is enough where all pods run on one node")
    storage_class: str | None = Field(None, description="storage class that has that access mode; default: the cluster's own")
    mlflow: bool = Field(True, description="write an MLflow server with PostgreSQL, and use it unless tracking.uri is set")
    artifacts: str | None = Field(
        None, description="where that server keeps artifacts, as s3://bucket/mlflow; default: the shared volume")
    fault_tolerance: bool = Field(True, description="write a Redis that keeps the endpoint's state when its head is replaced")
    token_auth: bool = Field(True, description="Ray asks for a token (authOptions; KubeRay 1.7 or newer)")
    queue: str | None = Field(None, pattern=NAME, description="Kueue's LocalQueue for jobs; default: none")
    schedule: str = Field("0 2 * * *", pattern=r"^\S+( \S+){4}$", description="when yesterday's batch is answered, in UTC")
    nightly: Literal["cronjob", "raycronjob", "off"] = Field(
        "cronjob", description="cronjob: through the endpoint; raycronjob: on a cluster of its own, which needs KubeRay's "
                               "feature gate RayCronJob; off: neither")
    loop: bool = Field(False, description="apply the RayCronJob of the loop, which needs that feature gate too")
    loop_schedule: str = Field("0 4 * * 0", pattern=r"^\S+( \S+){4}$", description="when a turn of the loop begins, in UTC")
    batch_input: str = Field("prompts/{partition}.jsonl", description="the night's prompts, below mount")
    batch_output: str = Field("answers/{partition}", description="the night's answers, below mount")
    monitoring: bool = Field(True, description="write a PodMonitor and alert rules, which need the Prometheus operator")
    monitoring_label: str = Field("release=prometheus", pattern=LABEL, description="LABEL=VALUE by which Prometheus finds them")
    monitoring_namespace: str = Field("monitoring", pattern=NAME, description="namespace of Prometheus, which may read metrics")
    operator_namespace: str = Field("kuberay-system", pattern=NAME, description="namespace of KubeRay's operator")

    @model_validator(mode="after")
    def _bounds_fit(self) -> ClusterSection:
        if self.least_nodes > self.most_nodes:
            raise ValueError(f"cluster.min_nodes={self.least_nodes} is more than cluster.max_nodes={self.most_nodes}")
        for name in ("batch_input", "batch_output"):
            if "{partition}" not in getattr(self, name):
                raise ValueError(f"cluster.{name}: needs {{partition}} in it, which stands for the day")
        return self

    @property
    def least_nodes(self) -> int:
        """Worker pods that the endpoint always has."""
        return self.nodes if self.min_nodes is None else self.min_nodes

    @property
    def most_nodes(self) -> int:
        """Worker pods that the endpoint may have."""
        return max(self.nodes, self.least_nodes) if self.max_nodes is None else self.max_nodes

    @property
    def scales(self) -> bool:
        """Whether the endpoint's number of worker pods follows its load."""
        return self.most_nodes > self.least_nodes
