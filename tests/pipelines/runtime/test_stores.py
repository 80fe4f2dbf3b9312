"""Whether every node of a cluster sees the storage, asked when a stage joins it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_core.storage import as_path, listing
from pipelines.runtime.files import write_text
from pipelines.runtime.stores import why_unseen
from tests.conftest import ROOT

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
from hydra_core.errors import InputError
from pipelines.config import load_config
from pipelines.runtime.ray_cluster import ensure_ray

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1, env_vars={"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"})
for storage in sys.argv[1:]:
    try:
        with ensure_ray(load_config(None, {"storage": storage, "ray_address": cluster.address})):
            print("seen", flush=True)
    except InputError as error:
        print(error, flush=True)
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_that_does_not_see_the_storage_is_named(s3: str, tmp_path: Path, worker_env: dict[str, str]) -> None:
    """Two nodes: both see a folder, and one has a wrong address for the object store."""
    done = subprocess.run([sys.executable, "-c", CLUSTER, str(tmp_path), f"{s3}/runs"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **worker_env}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    folder, bucket = done.stdout.splitlines()
    assert folder == "seen"
    assert bucket.startswith(f"storage={s3}/runs: the node ") and " does not see it (" in bucket
    assert bucket.endswith("mount the same folder there, or give every node the credentials of the store")
    assert listing(as_path(s3)) == {} and not list(tmp_path.glob(".probe*")), "the probes are gone"


def test_what_a_node_says(tmp_path: Path) -> None:
    probe = tmp_path / ".probe-1"
    assert "No such file" in str(why_unseen(str(probe), "1"))
    write_text(probe, "1")
    assert why_unseen(str(probe), "1") is None and [path.name for path in tmp_path.iterdir()] == [".probe-1"]
    assert why_unseen(str(probe), "2") == "another file is there"
