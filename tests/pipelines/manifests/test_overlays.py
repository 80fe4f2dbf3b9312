"""Differences as JSON patches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import load_config
from pipelines.manifests import OVERLAYS, Target
from pipelines.manifests.overlays import differences, patches
from pipelines.manifests.yaml_text import to_documents, to_yaml
from tests.cluster.shipped import apply

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/~", min_size=1, max_size=3), inner,
                                                                                 max_size=3), max_leaves=8)


@given(st.dictionaries(st.text("ab/~", min_size=1, max_size=2), VALUES, max_size=4),
       st.dictionaries(st.text("ab/~", min_size=1, max_size=2), VALUES, max_size=4))
def test_differences_make_one_of_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    found = copy.deepcopy(before)
    apply(found, differences(before, after))
    assert found == after or repr(found) == repr(after)  # 1 and True are equal, and no difference
    assert differences(after, after) == []


def resource(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def test_patches_are_shared_and_resources_come_and_go() -> None:
    before = [resource("A", "x", n=1), resource("A", "y", n=1), resource("A", "z", n=2), resource("B", "x", n=1)]
    after = [resource("A", "x", n=2), resource("A", "y", n=2), resource("A", "z", n=2), resource("C", "new")]
    found, more = patches(before, after)
    assert [one["target"] for one in found] == [{"kind": "A", "name": "(x|y)"}, {"kind": "B", "name": "x"}]
    assert yaml.safe_load(found[1]["patch"])["$patch"] == "delete"
    assert more == [resource("C", "new")]


def test_overlays_are_what_their_names_say() -> None:
    config = load_config(None, {"storage": "/mnt/shared/h", "cluster.gpus": 8, "cluster.cpus": 32, "train.rows_per_step": 40,
                                "serve.workers.gpus": 1, "train.workers.gpus": 1, "distill.workers.gpus": 1})
    four = OVERLAYS["four-gpu-nodes"].target(config).config
    assert (four.cluster.nodes, four.train.workers.count, four.distill.workers.count) == (4, 32, 32)
    assert four.train.rows_per_step == 40, "any number of workers shares them"
    assert (four.serve.replicas, four.serve.max_replicas, four.cluster.most_nodes) == (8, 32, 4)
    one = OVERLAYS["one-gpu-node"].target(config).config
    assert (one.cluster.nodes, one.train.workers.count) == (1, 8)
    assert OVERLAYS["spot"].target(config).config.cluster.spot_label
    cpu = OVERLAYS["cpu-test"].target(config).config
    assert cpu.cluster.gpus == 0 and cpu.train.workers.gpus == 0 and cpu.storage == config.storage


def test_an_alone_overlay_keeps_the_cluster_s_names() -> None:
    config = load_config(None, {"storage": "/data/h", "cluster.mount": "/data", "cluster.namespace": "ours", "name": "mine"})
    cpu = OVERLAYS["cpu-test"].target(config)
    assert (cpu.namespace, cpu.config.cluster.mount, cpu.config.name) == ("ours", "/data", "cpu-test")
    assert Target(config).check().namespace == "ours"


@pytest.mark.parametrize("value", [{"a": "one\ntwo\n"}, {"a": [{"b": 1}, {"b": 1}]}, {"on": "no", "n": "1"}])
def test_yaml_reads_back(value: dict[str, Any]) -> None:
    assert yaml.safe_load(to_yaml(value, "a comment " * 40)) == value
    assert list(yaml.safe_load_all(to_documents([value, value], "text"))) == [value, value]
    assert all(len(line) <= 130 for line in to_yaml({}, "word " * 60).splitlines())
