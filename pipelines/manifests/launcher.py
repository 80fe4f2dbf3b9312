"""Files for Ray's own tools: the cluster launcher, and the runtime environment of submitted jobs."""

from __future__ import annotations

from pipelines.manifests.target import APP, GCS_PORT, Json, Target

RUNTIME_VARIABLES = {"MLFLOW_DISABLE_TELEMETRY": "true", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
"""Of every job. No key or password: Ray shows a runtime environment to everybody on the cluster."""
NOT_SENT = [".git", ".venv*", "tests", "build", "dist", "__pycache__", "*.egg-info", ".*_cache"]
"""What neither a job nor a machine needs of a checkout."""
COMMIT_ALONE = ["!.git", ".git/*", "!.git/HEAD", "!.git/refs", "!.git/refs/**", "!.git/packed-refs", "!.git/index"]
"""What says the commit of a checkout, without its history: a submitted job records it (`runtime.commit`). After `.git`, which Ray
leaves out by itself."""
CODE, PYTHON = f"~/{APP}", f"~/{APP}-venv"
TOKEN = "~/.ray/auth_token"
START = f"export PATH=$HOME/{APP}-venv/bin:$PATH RAY_AUTH_MODE=token; ulimit -n 65536; ray start"
"""With it on its PATH, the head finds the `python` of a submitted job's entry point."""
INSTANCES = {0: "m7i.8xlarge", 1: "g6e.8xlarge", 4: "g6e.24xlarge", 8: "p5.48xlarge"}
"""GPUs of a worker -> a type of machine of AWS that has them."""
HEAD_INSTANCE = "m7i.2xlarge"


def runtime_env() -> Json:
    """The runtime environment of every submitted job. Ray leaves out files by the patterns of a .gitignore, of which the last one
    that fits decides."""
    return {"env_vars": RUNTIME_VARIABLES, "excludes": NOT_SENT + COMMIT_ALONE}


def machines(target: Target) -> Json:
    """`ray up` on machines of one's own."""
    nodes = target.config.cluster.nodes
    return {"cluster_name": APP,
            "provider": {"type": "local", "head_ip": "HEAD_ADDRESS",
                         "worker_ips": [f"WORKER_{number}_ADDRESS" for number in range(1, nodes + 1)]},
            "auth": {"ssh_user": "USER", "ssh_private_key": "~/.ssh/id_ed25519"},
            "max_workers": nodes, **_common([])}


def aws(target: Target) -> Json:
    """`ray up` on AWS. The folder that all machines share is a file system of EFS."""
    cluster = target.config.cluster
    worker: Json = {"InstanceType": INSTANCES.get(cluster.gpus, "INSTANCE_TYPE")}
    if cluster.spot_label:
        worker["InstanceMarketOptions"] = {"MarketType": "spot"}
    mount = cluster.mount.rstrip("/")
    shared = (f"mountpoint -q {mount} || (sudo mkdir -p {mount} && "
              f"sudo mount -t nfs4 -o nfsvers=4.1,hard FILE_SYSTEM_ADDRESS:/ {mount} && sudo chown $(id -u) {mount})")
    return {"cluster_name": APP, "max_workers": cluster.most_nodes, "idle_timeout_minutes": 15,
            "provider": {"type": "aws", "region": "eu-central-1", "cache_stopped_nodes": False},
            "auth": {"ssh_user": "ubuntu"},
            "available_node_types": {
                "head": {"node_config": {"InstanceType": HEAD_INSTANCE}, "resources": {"CPU": 0}},
                "worker": {"node_config": worker, "min_workers": cluster.least_nodes, "max_workers": cluster.most_nodes,
                           "resources": {}}},
            "head_node_type": "head", **_common([shared])}


def _common(before: list[str]) -> Json:
    return {
        "file_mounts": {CODE: ".", TOKEN: TOKEN},
        "rsync_exclude": NOT_SENT,
        "setup_commands": [*before, f"python3 -m venv {PYTHON}",
                           f"{PYTHON}/bin/pip install -q -c {CODE}/cluster/constraints.txt {CODE}"],
        "head_start_ray_commands": [
            f"{PYTHON}/bin/ray stop",
            f"{START} --head --port={GCS_PORT} --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"],
        "worker_start_ray_commands": [f"{PYTHON}/bin/ray stop", f"{START} --address=$RAY_HEAD_IP:{GCS_PORT}"]}
