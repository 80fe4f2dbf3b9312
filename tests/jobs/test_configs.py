"""Every bundled configuration parses, and the reference tells every setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_core.errors import InputError
from pipelines.config import (
    RunConfig,
    list_settings,
    load_config,
    nearest,
    nearest_setting,
    parse_override,
    reference_page,
    to_yaml,
)
from pipelines.runtime.provenance import shareable_yaml
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "jobs" / "configs").rglob("*.yaml"))


def test_the_three_are_there() -> None:
    assert {path.stem for path in CONFIGS} >= {"quickstart", "smollm2_135m", "cluster_llama_8b"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parses_and_reads_back(path: Path, tmp_path: Path) -> None:
    config = load_config(str(path))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(resolved)) == config
    assert path.read_text(encoding="utf-8").startswith("# "), "opens with the hardware it is for"


def test_earlier_names_of_settings_are_read_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    from pipelines.config import section

    section._told.clear()
    earlier = {"distill.running_batch": 3, "bench.running_batch": 4, "bench.load": [1, 2], "bench.load_requests": 5,
               "serve.max_batch": 6}
    for _ in range(2):
        config = load_config(None, earlier)
    assert (config.distill.max_batch_size, config.bench.max_batch_size, config.serve.max_batch_size) == (3, 4, 6)
    assert (config.bench.concurrency, config.bench.concurrency_requests) == ((1, 2), 5)
    assert sorted(record.getMessage() for record in caplog.records) == [
        "bench: the setting `load_requests` is called `concurrency_requests` now",
        "bench: the setting `load` is called `concurrency` now",
        "bench: the setting `running_batch` is called `max_batch_size` now",
        "distill: the setting `running_batch` is called `max_batch_size` now",
        "serve: the setting `max_batch` is called `max_batch_size` now"]
    with pytest.raises(InputError, match=r"max_batch: is the earlier name of serve\.max_batch_size: give one of them"):
        load_config(None, {"serve.max_batch": 1, "serve.max_batch_size": 1})


def test_the_reference_page_is_what_the_models_say() -> None:
    """After a change of a setting: `hydra-heads config --describe > jobs/configs/REFERENCE.md`."""
    assert (ROOT / "jobs" / "configs" / "REFERENCE.md").read_text(encoding="utf-8") == reference_page(RunConfig)


def test_every_setting_is_described_in_one_line() -> None:
    for setting in list_settings(RunConfig):
        assert len(setting.description) >= 5 and "\n" not in setting.description, setting.name
        assert setting.kind and setting.default, setting.name


def test_the_reference_names_types_bounds_and_defaults() -> None:
    found = {setting.name: setting for setting in list_settings(RunConfig)}
    assert found["train.lr"].kind == "number > 0" and found["train.lr"].default == "0.001"
    assert found["train.max_steps"].kind == "integer >= 1 or null" and found["train.max_steps"].default == "null"
    assert found["base.device"].kind == "auto, cpu or cuda"
    assert found["load.rates"].kind == "list of number > 0"
    assert found["train.betas"].default == "[0.9, 0.999]"
    assert found["train.workers.count"].default == "2" and found["distill.workers.count"].default == "1"
    assert found["train.drafters.NAME.kind"].default == "required"
    assert found["storage"].default == "~/.hydra-heads, or HYDRA_HEADS_STORAGE"


@pytest.mark.parametrize(("wrong", "near"), [
    ("train.steps", "train.max_steps"), ("trian", "train"), ("max_steps", "train.max_steps"), ("lr", "train.lr"),
    ("distill.max_batch", "distill.max_batch_size"), ("train.drafters.medusa.kinds", "train.drafters.medusa.kind"),
    ("servee.port", "serve.port"), ("train.workers.cpu", "train.workers.cpus"), ("nothing.like_it", None)])
def test_an_unknown_setting_names_the_nearest(wrong: str, near: str | None) -> None:
    assert nearest_setting(wrong, RunConfig) == near
    with pytest.raises(InputError) as error:
        load_config(None, {"train.drafters.medusa.kind": "medusa", wrong: 1})
    if near is None:
        assert str(error.value).endswith(": unknown field")
    else:  # of an unknown section the section alone is named
        assert str(error.value).removesuffix("?").endswith((f"; did you mean {near}", f"; did you mean {near.split('.')[0]}"))


def test_an_unknown_name_far_from_all_names_none() -> None:
    assert nearest("zzz", ["distill", "train"]) is None and nearest("distil", ["distill", "train"]) == "distill"


def test_an_override_wins_over_the_file_under_either_name(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("serve: {max_batch: 3}\ndistill: {max_batch_size: 3}\n", encoding="utf-8")
    config = load_config(str(file), {"serve.max_batch_size": 8, "distill.running_batch": 9})
    assert (config.serve.max_batch_size, config.distill.max_batch_size) == (8, 9)


@pytest.mark.parametrize(("text", "value"), [
    ("storage=/a #1", "/a #1"), ("storage=#x", "#x"), ("storage=/mes données 100% #1?x", "/mes données 100% #1?x"),
    ("batch.input='/a #1'", "/a #1"), ("bench.concurrency=[1, 4]", [1, 4]), ("train.lr=1e-3", 1e-3), ("batch.limit=null", None),
    ("batch.input=/a#b", "/a#b")])
def test_an_override_holds_no_comment(text: str, value: object) -> None:
    """YAML takes what follows ` #` for one: everything would go to another folder."""
    assert parse_override(text)[1] == value


def test_a_setting_without_effect_is_refused() -> None:
    with pytest.raises(InputError, match=r"serve\.workers\.count=7 has no effect: set serve\.replicas"):
        load_config(None, {"serve.workers.count": 7})
    assert load_config(None, {"serve.workers.cpus": 2, "serve.replicas": 3}).serve.replicas == 3


def test_what_is_recorded_reads_back(tmp_path: Path) -> None:
    """A file of keys is named, not hidden: an endpoint that is started from the record asks for keys too."""
    config = load_config(None, {"storage": str(tmp_path), "serve.api_keys_file": "/keys", "batch.key_variable": "MY_KEY",
                                "tracking.uri": "http://me:hunter2@host"})
    path = tmp_path / "config.yaml"
    path.write_text(shareable_yaml(config), encoding="utf-8")
    found = load_config(str(path))
    assert (found.serve.api_keys_file, found.batch.key_variable, found.tracking.uri) == ("/keys", "MY_KEY", "http://host")
    assert found.model_copy(update={"tracking": config.tracking}) == config


def test_what_an_earlier_version_hid_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("name: mine\nserve: {api_keys_file: (hidden), port: 9000}\n", encoding="utf-8")
    config = load_config(str(path))
    assert (config.name, config.serve.port, config.serve.api_keys_file) == ("mine", 9000, None)
    assert [record.getMessage() for record in caplog.records] == [
        f"config {path}: serve.api_keys_file was not recorded: give it again if it is needed"]


def test_a_user_without_a_home_is_told_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("HYDRA_HEADS_STORAGE", raising=False)
    with pytest.raises(InputError, match="storage: this user has no home folder: give storage=FOLDER or set HYDRA_HEADS_STORAGE"):
        load_config()
    assert load_config(None, {"storage": "/data"}).storage == "/data"
    monkeypatch.setenv("HYDRA_HEADS_STORAGE", "/data/variable")
    assert load_config().storage == "/data/variable"
