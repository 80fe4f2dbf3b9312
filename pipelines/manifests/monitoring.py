"""What the Prometheus operator reads: which pods have metrics, and when to wake somebody."""

from __future__ import annotations

from pipelines.manifests.target import APP, Json, Target, labels, resource

FIRST_TOKEN_SECONDS = 5
"""A first token that takes longer is of no use to many clients."""
RATIO = "sum(rate(ray_hydra_tokens_per_step_sum[{0}])) / sum(rate(ray_hydra_tokens_per_step_count[{0}]))"


def monitoring(target: Target) -> list[Json]:
    """A PodMonitor for all Ray pods and the alert rules."""
    name, value = target.config.cluster.monitoring_label.split("=", 1)
    monitor = resource(target, "monitoring.coreos.com/v1", "PodMonitor", APP, "monitoring", spec={
        "namespaceSelector": {"matchNames": [target.namespace]},
        "selector": {"matchLabels": {"ray.io/is-ray-node": "yes"}},
        "podMetricsEndpoints": [{"port": "metrics", "relabelings": [
            {"sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"], "targetLabel": "ray_io_cluster"},
            {"sourceLabels": ["__meta_kubernetes_pod_label_app_kubernetes_io_component"], "targetLabel": "component"}]}]})
    rules = resource(target, "monitoring.coreos.com/v1", "PrometheusRule", APP, "monitoring", spec={
        "groups": [{"name": f"{APP}.endpoint", "rules": endpoint_rules(target)},
                   {"name": f"{APP}.platform", "rules": platform_rules(target)}]})
    for one in (monitor, rules):
        one["metadata"]["labels"] = labels("monitoring") | {name: value}
    return [monitor, rules]


def endpoint_rules(target: Target) -> list[Json]:
    """Of the metrics that `pipelines/serve/metrics.py` exports."""
    room = target.config.serve.max_queued
    return [
        _rule("Silent", "absent(ray_hydra_batch_size)", "10m", "critical", "no replica of the endpoint tells its load",
              "look at `kubectl get rayservice` and at the pods; a base that does not load says why in a replica's log"),
        _rule("Errors",
              'sum(rate(ray_hydra_requests_total{status=~"5.."}[5m])) / sum(rate(ray_hydra_requests_total[5m])) > 0.02',
              "10m", "critical", "more than 2 % of the requests end in a server error",
              "look at the replicas' logs for the line of the engine's failure"),
        _rule("Refuses",
              'sum(rate(ray_hydra_requests_total{status="429"}[10m])) / sum(rate(ray_hydra_requests_total[10m])) > 0.1',
              "15m", "warning", "more than 10 % of the requests are refused: the queue is full",
              "more replicas (serve.max_replicas, cluster.max_nodes), or fewer requests"),
        _rule("QueueLong", f"max(ray_hydra_queue_size) > {round(0.8 * room)}", "10m", "warning",
              f"more than 80 % of serve.max_queued={room} wait", "more replicas, before requests are refused"),
        _rule("FirstTokenSlow",
              "histogram_quantile(0.95, sum by (le) (rate(ray_hydra_first_token_seconds_bucket[10m]))) > "
              f"{FIRST_TOKEN_SECONDS}", "15m", "warning",
              f"one answer in twenty begins after more than {FIRST_TOKEN_SECONDS} s",
              "more replicas, or a shorter serve.max_queued"),
        _rule("AcceptanceDropped", f"({RATIO.format('1h')}) < 0.8 * ({RATIO.format('1d')})", "1h", "warning",
              "a step gives a fifth fewer tokens than over the last day",
              "prompts of another kind, or other heads: compare `ray_hydra_heads_version`; distil and train on such prompts"),
        _rule("AcceptanceBelowBench", "max(ray_hydra_acceptance_drift) > 0", "15m", "warning",
              "a step has given fewer tokens in the last hour than the champion's bench says at least",
              "traffic of another kind: record some of it (serve.record.share) and run `hydra-heads loop`"),
        _rule("RegistrySilent", "min(ray_hydra_registry_answers) < 1", "30m", "warning",
              "MLflow does not answer, so that no other champion is taken; the endpoint goes on with its heads",
              "look at the MLflow server; the front's log says why"),
        _rule("RecordsLost",
              'sum(increase(ray_hydra_recorded_answers_total{result=~"not_writable|redact_failed"}[1h])) > 0', "0m", "warning",
              "answers that were to be recorded were dropped", "a replica's log says why: a full volume, or the hook"),
        _rule("EngineFailed", "sum(increase(ray_hydra_engine_failures_total[15m])) > 0", "0m", "warning",
              "an engine failed or hung", "the replica's log says in which step; it restarts by itself"),
        _rule("HeadsRejected", "sum(increase(ray_hydra_heads_rejected_total[1h])) > 0", "0m", "warning",
              "new heads did not load, and the earlier ones stayed",
              "the replica's log says why: another base, or changed files"),
        _rule("HeadsDiffer", "max(ray_hydra_heads_version) != min(ray_hydra_heads_version)", "30m", "warning",
              "replicas decode with different versions of the heads", "apply the endpoint's manifest again"),
        _rule("CacheFull", "min(ray_hydra_kv_use) > 0.95", "15m", "warning", "keys and values fill the memory of every replica",
              "more replicas, or a smaller serve.max_batch_size or base.context_limit")]


def platform_rules(target: Target) -> list[Json]:
    """Of what kube-state-metrics and the kubelet export."""
    space, claim = target.namespace, target.config.cluster.claim
    volume = f'{{namespace="{space}", persistentvolumeclaim="{claim}"}}'
    found = []
    if target.has_volume:
        found.append(_rule(
            "VolumeFull", f"kubelet_volume_stats_available_bytes{volume} / kubelet_volume_stats_capacity_bytes{volume} < 0.1",
            "15m", "critical", "less than a tenth of the shared volume is free",
            "remove runs below `runs/` and what `cache/` and `hf/` hold of models that are not used any more"))
    if target.config.cluster.nightly == "cronjob":
        job = f'{{namespace="{space}", cronjob="{APP}-nightly"}}'
        found.append(_rule("NightlyLate", f"time() - max(kube_cronjob_status_last_successful_time{job}) > 26 * 3600", "0m",
                           "warning", "the last night's batch is not finished",
                           "`kubectl logs` of its pod; the same command goes on where it stopped"))
    pods = f'{{namespace="{space}", container=~"ray-head|ray-worker"}}'
    return [*found, _rule("PodRestarts", f"increase(kube_pod_container_status_restarts_total{pods}[1h]) > 2", "0m", "warning",
                          "a Ray pod restarts again and again", "`kubectl describe pod`: memory, probes, or a node that goes")]


def _rule(name: str, expression: str, lasting: str, severity: str, summary: str, action: str) -> Json:
    return {"alert": f"HydraHeads{name}", "expr": expression, "for": lasting, "labels": {"severity": severity},
            "annotations": {"summary": summary, "description": f"To do: {action}."}}
