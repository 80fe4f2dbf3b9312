"""What each written file says to its reader first."""

from __future__ import annotations

WRITTEN = "Written by `hydra-heads cluster`: change the settings rather than this file. "
JOB = ("A job on a cluster of its own, which goes when the job ends. To run it again, delete the RayJob and create it: what is "
       "finished is skipped.")
ABOUT = {
    "platform/access.yaml":
        "Namespace, the pods' account, which has no rights but those that the operator gives a head with an autoscaler, "
        "and a role for the group hydra-heads-submitters: bind your own people or CI account to it. Secrets are created "
        "apart, by create_secrets.sh.",
    "platform/network.yaml":
        "Who reaches which port. A cluster whose network plugin knows no NetworkPolicy ignores this. The namespaces of "
        "the operator, of Prometheus and of clients are told by labels.",
    "platform/storage.yaml":
        "The settings that pods read, and the claim of the volume that all pods share: ReadWriteMany, as NFS, CephFS, FSx"
        " for Lustre or Filestore give it. A bucket that is mounted as a file system is none: files are renamed and "
        "locked.",
    "platform/servers.yaml":
        "MLflow with PostgreSQL, and Redis for the endpoint's head. Each has one pod: they come back, and jobs wait for "
        "them. Use servers of your own with tracking.uri=... and cluster.fault_tolerance=false.",
    "platform/monitoring.yaml":
        "For the Prometheus operator, whose definitions must be installed (cluster.monitoring=false leaves this out). The"
        " rules of the platform need kube-state-metrics.",
    "service/endpoint.yaml":
        "The endpoint. Other heads: change user_config (or write this file again with serve.model=...) and apply; no "
        "replica is replaced, and the operator, which compares serveConfigV2, keeps it. After `serve --update` or any "
        "other imperative deployment the operator would bring back what stands here. Changed args replace the replicas "
        "one after another; a changed rayClusterConfig starts a second cluster beside the first, which needs its GPUs "
        "twice for that time.",
    "service/nightly.yaml":
        "Yesterday's prompts every night through the endpoint, which works with any version of the operator. A start that"
        " was missed is made up for until 06:00 UTC, and the last try ends before midnight, when `yesterday` becomes "
        "another day; for another day run the same command with batch.partition=2026-01-31. A finished day is left as it "
        "is, and two runs of one day do not mix: the later one ends with exit code 2 and says who is at it.",
    "service/raycronjob.yaml":
        "The same on a cluster of its own, which goes when the night's batch ends. Alpha and off by default: start "
        "KubeRay's operator (1.7 or newer, for timeZone) with --feature-gates=RayCronJob=true. Listed in "
        "kustomization.yaml only with cluster.nightly=raycronjob.",
    "service/loop.yaml":
        "The loop: what the endpoint has recorded (serve.record.share above 0) becomes rows, the champion's heads learn from "
        "them, and what passes the gates is the next champion. An endpoint with serve.model=models:/NAME@ALIAS takes it by "
        "itself. A RayCronJob as raycronjob.yaml, which needs the same feature gate; listed in kustomization.yaml only with "
        "cluster.loop=true. Without the gate create jobs/loop.yaml from a scheduler of your own.",
    "launcher/machines.yaml":
        "Ray's cluster launcher on machines of your own: fill in addresses and user, make a token with `ray "
        "get-auth-token --generate`, then `ray up cluster/launcher/machines.yaml` in a checkout. The storage must be a "
        "folder that every machine mounts, and `python3` Python 3.11 or newer. Not tried on such machines.",
    "launcher/aws.yaml":
        "Ray's cluster launcher on AWS: fill in region and the address of an EFS file system, which the machines' "
        "security group may reach; the machine image is Ray's default for the region, or the ImageId that you add to each"
        " node_config: `python3` must be Python 3.11 or newer there. Then `ray up cluster/launcher/aws.yaml` in a "
        "checkout. Not tried there.",
    "runtime_env.yaml":
        "Runtime environment of every submitted job: ray job submit --working-dir . --runtime-env "
        "cluster/runtime_env.yaml -- python -m jobs.train --config ... name=... The packages themselves belong into the "
        "image: installing torch for each job takes minutes.",
    "serve_config.yaml":
        "Ray Serve configuration: `serve deploy cluster/serve_config.yaml` on a running cluster. `args.api_keys_file: "
        "FILE` asks for API keys, as does HYDRA_HEADS_API_KEYS on the cluster's machines; with `require_keys: true` "
        "nothing starts without one. Changed args replace the replicas, except that other keys in FILE reach the front "
        "alone; changed user_config changes the heads alone. For https set ssl_keyfile and ssl_certfile in http_options.",
}
"""Path below the folder (below `base/` for manifests) -> that text."""
