"""EAGLE layers among the drafters of a run: where their rows come from, and which stages leave them out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hydra_core.base import Base
from hydra_core.bundled import BUNDLED
from hydra_core.errors import InputError
from hydra_core.heads import DraftVocab, HeadsConfig, build_drafter, save_checkpoint
from hydra_core.training.model import HeadTraining
from hydra_core.tree import default_trees
from pipelines.bench.plan import own_heads
from pipelines.config import load_config
from pipelines.rows.online_features import OnlineStore
from pipelines.rows.packed_reader import RowReader
from pipelines.rows.schemas import RESPONSES
from pipelines.tree.stage import _with_fixed_trees
from tests.pipelines.rows.test_online_features import write_answers
from tests.pipelines.synthetic import feature_row
from tests.trained import random_heads

DRAFTERS = {"deep": {"kind": "eagle3"}, "hydra": {"kind": "hydra"}, "shallow": {"kind": "eagle"}}


def test_states_from_inside_are_not_in_rows() -> None:
    with pytest.raises(InputError, match=r"train\.drafters\.deep\.kind: eagle3 reads .* train\.features=online"):
        load_config(None, {"train.drafters": DRAFTERS})
    config = load_config(None, {"train.drafters": DRAFTERS, "train.features": "online"})
    assert [heads.loss for heads in config.train.drafters.values()] == ["teacher", "data", "teacher"]


def test_there_is_no_tree_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"train.drafters": DRAFTERS, "train.features": "online"}
    assert _with_fixed_trees(load_config(None, settings)) == ["hydra"]
    assert "deep: grows trees of its own" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"tree: no drafter of train\.drafters has fixed trees"):
        _with_fixed_trees(load_config(None, settings | {"train.only": "deep"}))


def test_combined_takes_heads_that_draft_beside_copied_text(tiny_base: Base, tmp_path: Path) -> None:
    folders = {}
    for kind in ("hydra", "eagle"):
        save_checkpoint(tmp_path / kind, random_heads(tiny_base, kind), tiny_base.identity, default_trees(3), {})
        folders[kind] = str(tmp_path / kind)
    assert own_heads(folders | {BUNDLED: "elsewhere"}) == [folders["hydra"]]
    assert json.loads((tmp_path / "eagle" / "config.json").read_text(encoding="utf-8"))["heads"]["kind"] == "eagle"


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_loss_and_ranks_over_packed_answers(tiny_base: Base, tmp_path: Path, kind: str) -> None:
    """Rows of several lengths in lines: the summed losses of each row are those of the row alone, and the gradient reaches every
    weight."""
    rows = [feature_row(tiny_base, number, "train") for number in range(6)]
    write_answers(tmp_path / "responses" / "part-0.parquet", rows)
    store = OnlineStore.open(tmp_path / "responses", "train")
    heads = HeadsConfig(kind=kind, num_heads=3, draft_vocab_size=64)  # type: ignore[arg-type]
    vocab = DraftVocab.rank(store.response_counts(tiny_base.vocab_size), 64, tiny_base.stop_ids)
    drafter = build_drafter(heads, tiny_base.vocabulary, vocab)
    for weight in drafter.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    store.use(tiny_base, drafter.taps)
    reader, model = RowReader(store), HeadTraining(drafter, tiny_base.vocabulary)
    together, sums = model(reader.pack(range(6)), torch.ones(3))
    alone = [model(reader.pack([number]), torch.ones(3))[1] for number in range(6)]
    torch.testing.assert_close(sums, torch.stack(alone).sum(0), atol=1e-3, rtol=1e-4)
    together.backward()
    assert all(weight.grad is not None and bool(weight.grad.abs().max() > 0) for weight in drafter.parameters())
    counts, ranks = model.evaluate(reader.pack(range(6)))
    assert ranks.ranks.shape[1] == 3 and int(counts.counted.min()) > 0
    assert set(RESPONSES.names) <= set(rows[0])
