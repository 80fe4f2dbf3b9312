"""What each section refuses, and in which words; what it lets through; and how settings are read and written."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from hydra_core.errors import InputError
from pipelines.config import RunConfig, load_config
from pipelines.config.base import BaseSection
from pipelines.config.batch import BatchSection
from pipelines.config.run import parse_override, present_name, to_yaml

ONE: dict[str, Any] = {"heads": {"kind": "hydra"}}
REFUSED = [
    ({"ablate.variants": {"a b": ONE, "c": ONE, "a/b": ONE}},
     "ablate: ablate.variants: 'a b' and 'a/b' give the same folder name"),
    ({"ablate.variants": {"x": ONE, "_a": ONE}},
     "ablate: ablate.variants: '_a': must begin with a letter or digit"),
    ({"ablate.variants": {"x": ONE}, "ablate.studies": {"one?": ["x"]}},
     "ablate: ablate.studies: 'one?': needs two variants or more"),
    ({"ablate.variants": {"x": ONE}, "ablate.studies": {"two?": ["x", "y", "z"]}},
     "ablate: ablate.studies: 'two?': 'y' is none of ablate.variants"),
    ({"batch.input": "/in/{partition}"}, "batch: batch.input=/in/{partition} needs batch.partition"),
    ({"batch.output": "/out/{partition}"}, "batch: batch.output=/out/{partition} needs batch.partition"),
    ({"batch.partition": "a", "batch.output": "/out"},
     "batch: batch.output needs {partition} in it: each partition needs a folder of its own"),
    ({"batch.address": "http://h", "batch.engine": "embedded"}, "batch: batch.address has no effect with batch.engine=embedded"),
    ({"batch.partition": "../x"}, "batch.partition: String should match pattern"),
    ({"bench.concurrency": [4, 16], "bench.concurrency_requests": 15},
     "bench: bench.concurrency_requests=15 is fewer than the 16 of bench.concurrency that are to be in flight at once"),
    ({"prompts.source": "jsonl"}, "prompts: prompts.path is needed with prompts.source=jsonl"),
    ({"prompts.path": "/p"}, "prompts: prompts.path has no effect with prompts.source=self: set prompts.source too"),
    ({"prompts.self_made": 3},
     "prompts: prompts.self_made is for prompts besides a file's: with prompts.source=self set prompts.count"),
    ({"serve.workers": {"count": 2}}, "serve: serve.workers.count=2 has no effect: set serve.replicas"),
    ({"serve.tls_keyfile": "/k"}, "serve: serve.tls_keyfile needs serve.tls_certfile"),
    ({"serve.tls_certfile": "/c"}, "serve: serve.tls_certfile needs serve.tls_keyfile"),
    ({"serve.replicas": 3, "serve.max_replicas": 2}, "serve: serve.max_replicas=2 is fewer than serve.replicas=3"),
    ({"train.only": "x"}, "train: train.only='x' is none of train.drafters: medusa, hydra, hydra++"),
    ({"train.start": {"hydra": "/h", "y": "/h"}}, "train: train.start: 'y' is none of train.drafters: medusa, hydra, hydra++"),
    ({"train.workers.count": [3, 2]}, "train.workers: train.workers.count=[3,2]: the first is more than the second"),
    ({"train.workers.count": 0}, "train.workers.count: must be a whole number above 0, or [least, most], got 0"),
    ({"train.workers.count": [1, 2, 3]}, "train.workers.count: must be a whole number above 0, or [least, most], got [1, 2, 3]"),
    ({"train.workers.count": [0, 2]}, "train.workers.count: must be a whole number above 0, or [least, most], got [0, 2]"),
    ({"train.plain_losses": True, "train.drafters": {"a": {"kind": "hydra", "mask_lost": True}}},
     "train: train.plain_losses knows no mask_lost: turn one of them off"),
    ({"train.betas": [0.9, 1.0]}, "train: train.betas=[0.9, 1.0]: each must be at least 0 and below 1"),
    ({"train.betas": [-0.1, 0.9]}, "train: train.betas=[-0.1, 0.9]: each must be at least 0 and below 1"),
    ({"train.ema": 0.99, "train.zero_stage": 3},
     "train: train.ema averages whole weights, which ZeRO-3 keeps apart: set train.zero_stage to 2"),
    ({"ngram.min_match": 5, "ngram.max_match": 4}, "ngram: ngram.min_match=5 is more than ngram.max_match=4"),
    ({"storage": "out"}, "storage: must be an absolute path, got 'out' (storage= or HYDRA_HEADS_STORAGE): a submitted job "
                         "runs in an unpacked copy"),
    ({"name": ".."}, "name: String should match pattern"), ({"name": "n" * 201}, "name: String should have at most 200"),
    ({"load.address": "h:80"}, "load.address: String should match pattern"),
]


@pytest.mark.parametrize(("given", "told"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_what_does_not_fit_is_refused_in_one_line(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_config(None, {"storage": "/s", **given})
    assert str(caught.value).startswith(f"config: {told}") and "\n" not in str(caught.value)
    path = tmp_path / "c.yaml"
    path.write_text("storage: /s\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(str(path), given)
    assert str(caught.value).startswith(f"config {path}: {told}")


@pytest.mark.parametrize("given", [
    {"ablate.variants": {"a": ONE, "b": ONE}, "ablate.studies": {"q": ["b", "a"]}},
    {"bench.concurrency": [4, 16], "bench.concurrency_requests": 16}, {"bench.concurrency_requests": 1},
    {"bench.concurrency": [4, 16], "bench.concurrency_requests": 0},
    {"prompts.source": "jsonl", "prompts.path": "/p", "prompts.self_made": 3}, {"serve.workers": {"count": 1}},
    {"serve.workers": {"cpus": 2}}, {"serve.replicas": 2, "serve.max_replicas": 2}, {"serve.replicas": 2},
    {"serve.tls_keyfile": "/k", "serve.tls_certfile": "/c"}, {"train.only": "hydra", "train.start": {"hydra++": "/h"}},
    {"train.workers.count": 3, "train.accumulate": 2, "train.rows_per_step": 8}, {"train.betas": [0, 0.999]},
    {"train.workers.count": [1, 8], "train.rows_per_step": 4}, {"train.workers.count": [2, 2]},
    {"train.plain_losses": True}, {"train.ema": 0.99, "train.zero_stage": 2}, {"train.zero_stage": 3, "train.ema": 0},
    {"ngram.min_match": 4, "ngram.max_match": 4}, {"batch.engine": "embedded"}, {"batch.address": "http://h"},
    {"batch.partition": "2026-01-31", "batch.input": "/in", "batch.output": "/out/{partition}"}, {"batch.partition": "a"}])
def test_what_fits_is_let_through(given: dict[str, Any]) -> None:
    assert isinstance(load_config(None, {"storage": "/s", **given}), RunConfig)


@pytest.mark.parametrize(("given", "day"), [("today", 0), ("yesterday", 1)])
def test_a_partition_is_a_day_or_what_it_says(given: str, day: int) -> None:
    before = datetime.now(UTC).date()
    found = BatchSection(partition=given).partition
    assert found in {(now - timedelta(day)).isoformat() for now in (before, datetime.now(UTC).date())}
    assert BatchSection(partition=yaml.safe_load("2026-01-31")).partition == "2026-01-31"
    assert BatchSection(partition="2026-w05").partition == "2026-w05" and BatchSection().partition is None


def test_a_partition_is_put_into_both_places() -> None:
    section = BatchSection(partition="p=1", input="/in/{partition}/{partition}.jsonl", output="/out/{partition}")
    assert (section.source, section.target) == ("/in/p=1/p=1.jsonl", "/out/p=1")
    assert (BatchSection(input="/in").source, BatchSection(output="/out").target) == ("/in", "/out")
    assert BatchSection().source is None and BatchSection().target is None


def test_a_base_is_loaded_with_its_settings_and_the_changes_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("hydra_core.base.load_base", lambda model, **more: asked.append((model, more)))
    section = BaseSection(model="/m", dtype="fp32", device="cpu", context_limit=64)
    section.load("/c")
    section.load(Path("/c"), dtype="bf16", widen=True)
    own = {"dtype": "fp32", "device": "cpu", "context_limit": 64, "cache": Path("/c")}
    assert asked == [("/m", own), ("/m", own | {"dtype": "bf16", "widen": True})]


@pytest.mark.parametrize(("text", "told"), [
    ("- 1\n", "must be a mapping of sections, got list"), ("word\n", "must be a mapping of sections, got str"),
    ("a: [1\n", "is not valid YAML: "), (b"\xff\xfe", "is not UTF-8 text"), (None, "cannot be read (No such file or directory)")])
def test_a_file_that_is_no_configuration(text: str | bytes | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"config {path}: {told}") and "\n" not in str(caught.value)


def test_an_empty_file_has_the_defaults_and_text_may_be_of_any_language(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("", encoding="utf-8")
    assert load_config(str(path), {"storage": "/s"}) == load_config(None, {"storage": "/s"})
    path.write_bytes("storage: /s\nprompts: {starts: [Übersetze]}\n".encode())
    assert load_config(str(path)).prompts.starts == ("Übersetze",)


@pytest.mark.parametrize(("text", "name", "value"), [
    ("a.b=1", "a.b", 1), (" a.b =x", "a.b", "x"), ("a.b=1e-3", "a.b", 0.001), ("a.b=", "a.b", None), ("a.b=x=y", "a.b", "x=y"),
    ("a.b=[1, 2]", "a.b", [1, 2]), ("a.b={c: 1}", "a.b", {"c": 1}), ("a.b='1'", "a.b", 1.0), ("a.b=null", "a.b", None),
    ("a.b=[1", "a.b", "[1"), ("a.b=/x #1", "a.b", "/x #1"), ("a.b=#1", "a.b", "#1"), ("a.b=true", "a.b", True)])
def test_an_override_is_read_as_yaml(text: str, name: str, value: object) -> None:
    assert parse_override(text) == (name, value)


@pytest.mark.parametrize("text", ["a.b", "=1", "  =1"])
def test_an_override_has_a_name_and_a_value(text: str) -> None:
    with pytest.raises(InputError, match=r"write it as section\.field=value"):
        parse_override(text)


def test_an_override_inside_a_value_is_refused() -> None:
    with pytest.raises(InputError, match=r"^override base\.model\.x: model is a value, not a section$"):
        load_config(None, {"storage": "/s", "base.model": "m", "base.model.x": 1})


@pytest.mark.parametrize(("dotted", "now"), [
    ("serve.max_batch", "serve.max_batch_size"), ("distill.running_batch", "distill.max_batch_size"),
    ("bench.load", "bench.concurrency"), ("serve.port", "serve.port"), ("name", "name"), ("nothing.at", "nothing.at"),
    ("storage.x", "storage.x"), ("serve", "serve")])
def test_present_names(dotted: str, now: str) -> None:
    assert present_name(dotted) == now


@pytest.mark.parametrize("order", [("serve.max_batch", "serve.max_batch_size"), ("serve.max_batch_size", "serve.max_batch")])
def test_both_names_of_one_setting_are_refused(order: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_config(None, {"storage": "/s", **dict.fromkeys(order, 2)})
    assert str(caught.value) == "override serve.max_batch: is the earlier name of serve.max_batch_size: give one of them"
    path = tmp_path / "c.yaml"
    path.write_text("storage: /s\nserve: {max_batch: 1, max_batch_size: 2}\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(str(path))
    assert str(caught.value) == f"config {path}: serve: max_batch is the earlier name of max_batch_size: give one of them"


def test_a_section_that_is_no_mapping_is_named() -> None:
    with pytest.raises(InputError, match=r"^config: serve: Input should be a valid dictionary"):
        load_config(None, {"storage": "/s", "serve": 3})


def test_values_are_not_changed_by_reading_them(caplog: pytest.LogCaptureFixture) -> None:
    given = {"max_batch": 3}
    with caplog.at_level(logging.WARNING):
        assert load_config(None, {"storage": "/s", "serve": given}).serve.max_batch_size == 3
    assert given == {"max_batch": 3}


def test_settings_are_written_in_their_own_order_and_read_back() -> None:
    config = load_config(None, {"storage": "/s", "serve.max_batch_size": 3, "train.betas": [0.5, 0.6]})
    written = yaml.safe_load(to_yaml(config))
    assert list(written) == list(RunConfig.model_fields) and list(written["serve"]) == list(type(config.serve).model_fields)
    assert RunConfig.model_validate(written) == config and written["train"]["betas"] == [0.5, 0.6]


@pytest.mark.parametrize(("given", "wanted"), [("~/x", "/home/me/x"), ("$PLACE/x", "/place/x"), ("/s", "/s")])
def test_the_storage_may_begin_with_a_home_or_a_variable(monkeypatch: pytest.MonkeyPatch, given: str, wanted: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "/place")
    assert load_config(None, {"storage": given}).storage == wanted
    monkeypatch.setenv("HYDRA_HEADS_STORAGE", given)
    assert load_config().storage == wanted
    monkeypatch.setenv("HYDRA_HEADS_STORAGE", "")
    assert load_config().storage == "/home/me/.hydra-heads"
