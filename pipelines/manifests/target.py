"""What the manifests are for: the settings, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

import yaml

from hydra_core.errors import InputError
from pipelines.config import RunConfig
from pipelines.config.serve import ALIAS
from pipelines.runtime.provenance import redacted

APP = "hydra-heads"
"""The name from which those of all resources are made."""
CONFIG_FOLDER, CONFIG_FILE = "/etc/hydra-heads/config", "run.yaml"
KEYS_FOLDER, KEYS_FILE = "/etc/hydra-heads/keys", "keys"
DASHBOARD_PORT, GCS_PORT, SERVE_PORT, METRICS_PORT = 8265, 6379, 8000, 8080
HOME = "/home/hydra"
"""Of the user of the images."""
SPREAD_STAGES = ("chain", "distill", "train", "ablate", "batch", "load", "loop")
"""Jobs that use all worker nodes; the others measure on one."""
CHAIN = ("distill", "train", "tree", "bench", "promote")
Json = dict[str, Any]


@dataclass(frozen=True)
class Heads:
    """The heads that the endpoint starts with, as its `user_config`. `configuration`: a folder, None: plain decoding."""

    configuration: str | None
    label: str
    version: int | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Target:
    """Settings that fit together, and the heads of the endpoint; None: those that this run's `promote` writes."""

    config: RunConfig
    champion: Heads | None = None

    @property
    def namespace(self) -> str:
        return self.config.cluster.namespace

    @property
    def image(self) -> str:
        name = f"{APP}-cuda" if self.config.cluster.gpus else APP
        return self.config.cluster.image or f"{name}:{metadata.version('hydra-heads')}"

    @property
    def cache(self) -> str:
        """Folder of a pod for what can be made again: shared where the storage is a folder."""
        return f"{self.config.storage}/cache" if self.has_volume else f"{HOME}/.hydra-heads/cache"

    @property
    def has_volume(self) -> bool:
        """Whether the storage is a folder, which pods need a volume for; the credentials of a store are in a secret."""
        return "://" not in self.config.storage

    @property
    def config_path(self) -> str:
        return f"{CONFIG_FOLDER}/{CONFIG_FILE}"

    @property
    def heads(self) -> Heads:
        """The heads of the endpoint."""
        if self.champion is not None:
            return self.champion
        model = self.config.serve.model
        if model is not None and ALIAS.match(model):
            return Heads(None, "plain")  # until the first look at the registry
        if model == "plain":
            return Heads(None, "plain")
        if model is None:
            return Heads(f"{self.config.storage}/runs/{self.config.name}/promote/configuration", f"{self.config.name} champion")
        return Heads(model, model)

    @property
    def tracking_uri(self) -> str | None:
        """Where pods find MLflow; None: as the settings say, or SQLite below the storage."""
        return f"http://{APP}-mlflow:5000" if self.has_mlflow else None

    @property
    def has_mlflow(self) -> bool:
        return self.config.cluster.mlflow and self.config.tracking.uri is None

    def run_yaml(self) -> str:
        """The settings that pods read: what differs from the defaults, without credentials."""
        values = redacted(self.config.model_dump(mode="json", by_alias=True, exclude_unset=True))
        return yaml.safe_dump({**values, "storage": self.config.storage}, sort_keys=False)

    def nodes_for(self, stage: str) -> int:
        """Worker pods of the job that runs `stage`."""
        return 0 if stage == "promote" else self.config.cluster.nodes if stage in SPREAD_STAGES else 1

    def check(self) -> Target:
        """This target. Raises InputError for settings that do not fit together."""
        config, cluster = self.config, self.config.cluster
        if config.engine != "own":
            raise InputError(f"engine={config.engine}: the images of these manifests hold no vLLM: leave it out here, and submit "
                             "jobs with it from an image that does")
        if self.has_volume and not f"{config.storage}/".startswith(f"{cluster.mount.rstrip('/')}/"):
            raise InputError(f"storage={config.storage}: pods have a shared volume at cluster.mount={cluster.mount}: set "
                             f"storage={cluster.mount.rstrip('/')}/{APP}, or cluster.mount")
        asked = {"distill.workers": (config.distill.workers, config.distill.workers.count, cluster.nodes),
                 "train.workers": (config.train.workers, config.train.workers.least, cluster.nodes),
                 "serve.replicas": (config.serve.workers, config.serve.replicas, cluster.least_nodes),
                 "serve.max_replicas": (config.serve.workers, config.serve.max_replicas or config.serve.replicas,
                                        cluster.most_nodes)}
        for name, (workers, count, nodes) in asked.items():
            for unit, each, room in (("GPUs", workers.gpus, cluster.gpus), ("processors", workers.cpus, cluster.cpus)):
                fit = nodes * (int(room / each) if each else count)
                if count > fit:
                    raise InputError(f"{name}: {count} x {each:g} {unit} do not fit on {nodes} node(s) of {room:g}: set "
                                     f"cluster.nodes, cluster.{'gpus' if unit == 'GPUs' else 'cpus'} or fewer workers")
        return self


def labels(component: str) -> Json:
    """The labels of a resource and of its pods."""
    return {"app.kubernetes.io/name": APP, "app.kubernetes.io/part-of": APP, "app.kubernetes.io/component": component}


def resource(target: Target, api: str, kind: str, name: str, component: str, **fields: Any) -> Json:
    """A resource in the target's namespace."""
    return {"apiVersion": api, "kind": kind,
            "metadata": {"name": name, "namespace": target.namespace, "labels": labels(component)}, **fields}
