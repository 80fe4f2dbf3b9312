"""The whole chain on a cluster of machines: jobs are submitted from a client that is no part of it, as the cluster page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hydra_core.base import Base
from tests.conftest import ROOT
from tests.pipelines.batch.test_kills import check_answers
from tests.pipelines.distill.test_stage import write_prompts
from tests.pipelines.runtime.test_commit import git
from tests.ray_hosts import BUCKET, ENDED, Cluster, answers, ray_cluster, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
EACH = "workers={count: 2, cpus: 1.5, threads: 1}"
"""Two workers that do not fit on one machine."""
PORT = 8000
READ = "from hydra_core.storage import as_path; print(as_path(sys.argv[1]).read_text())"
ANSWERS = ("import json; from hydra_core.storage import as_path; from pipelines.batch.writer import read_batch_rows; "
           "print(json.dumps(list(read_batch_rows(as_path(sys.argv[1]), 'jsonl'))))")


def test_the_chain_on_machines_of_their_own(tiny_base_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    """They share the base, and an object store for all else."""
    local, prompts = write_prompts(tmp_path / "prompts.jsonl", 40), f"{BUCKET}/prompts.jsonl"
    with ray_cluster([tiny_base_dir, tmp_path], store=True) as cluster:
        cluster.ask("import s3fs; s3fs.S3FileSystem().put_file(*sys.argv[1:])", str(local), prompts)
        run = ["name=far", f"storage={BUCKET}/storage", f"base.model={tiny_base_dir}", "base.dtype=fp32",
               f"tracking.uri={cluster.tracking}", "train.drafters={hydra: {kind: hydra}}"]
        distilled = cluster.result("distill", *run, "prompts.source=jsonl", f"prompts.path={prompts}", "prompts.count=40",
                                   "distill.max_new_tokens=24", "distill.held_out=0.4", f"distill.{EACH}")
        provenance = json.loads(cluster.ask(READ, f"{BUCKET}/storage/runs/far/distill/provenance.json"))
        if (ROOT / ".git").is_dir():  # its name is sent, not its history
            assert provenance["git"]["commit"] == git(ROOT, "rev-parse", "HEAD")
        assert distilled["prompts"] == 40 and distilled["responses"] == distilled["feature_rows"] == 80
        trained = cluster.result("train", *run, "train.max_steps=6", f"train.{EACH}", "train.zero_stage=2",
                                 "train.validate_every=3", "train.validation_rows=8")
        assert trained["hydra"]["steps"] == 6
        cluster.result("tree", *run, "tree.batch_sizes=[1]", "tree.node_counts=[1, 2, 4]", "tree.context=16", "tree.repeats=3",
                       "tree.threads=1", "tree.max_rows=8")
        benched = cluster.result("bench", *run, "bench.limit=4", "bench.max_new_tokens=16", "bench.identity_prompts=2",
                                 "bench.threads=1", "bench.methods=[ngram, hydra]")
        assert all(found["identical"] == 1.0 for found in benched["methods"].values())
        promoted = cluster.result("promote", *run)
        assert promoted["champion"] in benched["methods"]
        check_a_mistake(cluster, run)
        check_endpoint(cluster, run, prompts, tiny_base)
        other = cluster.result("bench", *run, "name=near", f"bench.heads={BUCKET}/storage/runs/far/tree/hydra/heads",
                               f"bench.prompts={prompts}", "bench.limit=2", "bench.max_new_tokens=8", "bench.identity_prompts=0",
                               "bench.threads=1", "bench.methods=[ngram]")
        compared = cluster.client.run("hydra-heads", "compare", "--json", "compare.runs=[far, near]", f"storage={BUCKET}/storage",
                                      f"tracking.uri={cluster.tracking}")
        found = json.loads(compared)
        assert [one["run_id"] for one in found["runs"]] == [benched["run_id"], other["run_id"]]
        assert found["differences"]["bench"]["bench.limit"] == ["4", "2"] and len(found["linked_from"]) == 2
        assert found["differences"]["train"] == {"(the whole stage)": ["yes", None]}  # `near` has measured no heads
        assert found["outputs"]["page"].startswith(f"{BUCKET}/storage/comparisons/far-near-")


def check_a_mistake(cluster: Cluster, run: list[str]) -> None:
    """A job runs in an unpacked copy: a relative path would be that of nobody's file."""
    job = cluster.submit("batch", *run, "serve.model=plain", "batch.input=prompts.jsonl")
    until(lambda: cluster.status(job) in ENDED, 120, pause=1.0)
    log = cluster.log(job)
    assert cluster.status(job) == "FAILED" and "error: batch.input=prompts.jsonl: is a relative path" in log
    assert "Traceback" not in log


def check_endpoint(cluster: Cluster, run: list[str], prompts: str, base: Base) -> None:
    """Two replicas on two machines, a proxy on each: every address that is said answers the client, and so does a batch."""
    job = cluster.submit("serve", *run, "serve.host=0.0.0.0", f"serve.port={PORT}", "serve.replicas=2",
                         "serve.workers={cpus: 2, threads: 1}")
    until(lambda: "metrics for" in cluster.log(job) or cluster.status(job) == "FAILED", 300, pause=3.0)
    log = cluster.log(job)
    (url,) = re.findall(r"answers at (http://[0-9.:]+)", log)
    assert url.startswith(f"http://{cluster.head.address}:")
    metrics = re.findall(r"http://[0-9.:]+/metrics", log)
    assert {address.split("/")[2].split(":")[0] for address in metrics} == {
        host.address for host in (cluster.head, *cluster.workers)}
    proxies = [f"http://{host.address}:{PORT}/ready" for host in cluster.workers]
    for address in (*metrics, f"{url}/ready", *proxies):
        assert answers(cluster.client, address), f"{address}\n{log[-3000:]}"
    assert [sum("DecodeServer" in " ".join(one.cmdline()) for one in host.processes()) for host in cluster.workers] == [1, 1]
    asked = ["batch", *run, f"batch.address=http://{cluster.workers[1].address}:{PORT}/v1", f"batch.input={prompts}",
             f"batch.output={BUCKET}/answers", "batch.max_new_tokens=8", "--json"]
    counts = json.loads(cluster.client.run("hydra-heads", *asked))
    assert (counts["rows"], counts["errors"]) == (40, 0)
    check_answers(base, json.loads(cluster.ask(ANSWERS, f"{BUCKET}/answers/rows")), 40, 8, 4)
    cluster.client.run("ray", "job", "stop", f"--address={cluster.jobs}", job)
    until(lambda: not answers(cluster.client, f"{url}/ready"), 90)
