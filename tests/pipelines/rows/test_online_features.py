"""Features made while training are those that would have been stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hydra_core.base import Base
from hydra_core.errors import InputError
from hydra_core.heads import DraftVocab, HeadsConfig, build_drafter
from hydra_core.training.model import HeadTraining
from pipelines.rows import online_features as online
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.online_features import OnlineStore
from pipelines.rows.packed_reader import RowReader
from pipelines.rows.schemas import RESPONSES
from pipelines.train.batches import valid_counts
from tests.pipelines.synthetic import feature_row, write_shard

ROWS = 12


def write_both(base: Base, folder: Path, dtype: torch.dtype) -> None:
    """The same rows as features and as answers; `dtype`: of what is stored."""
    rows: list[dict[str, Any]] = []
    for number in range(ROWS):
        row = feature_row(base, number, "train")
        hidden = base.hidden_states([row["prompt_ids"] + row["response_ids"]])[0].to(dtype).contiguous()
        rows.append(row | {"hidden": hidden.view(torch.uint8).numpy().tobytes(),
                           "hidden_dtype": "fp32" if dtype == torch.float32 else "bf16"})
    write_shard(folder / "features" / "part-0.parquet", rows)
    write_answers(folder / "responses" / "part-0.parquet", rows)


def write_answers(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [{name: row[name] for name in RESPONSES.names} for row in rows]
    pq.write_table(pa.Table.from_pylist(kept, schema=RESPONSES), path)


@pytest.mark.parametrize("forward_tokens", [40, 4096])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["hydra", "hydra++"])
def test_losses_and_gradients_are_those_of_stored_features(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           kind: str, dtype: torch.dtype, tolerance: float,
                                                           forward_tokens: int) -> None:
    monkeypatch.setattr(online, "FORWARD_TOKENS", forward_tokens)
    write_both(tiny_base, tmp_path, dtype)
    stored, made = FeatureStore.open(tmp_path / "features", "train"), OnlineStore.open(tmp_path / "responses", "train")
    made.use(tiny_base)
    assert made.index.ids == stored.index.ids and made.base == stored.base
    heads = HeadsConfig(kind=kind, num_heads=2)  # type: ignore[arg-type]
    vocab = DraftVocab.rank(stored.response_counts(tiny_base.vocab_size), 64, tiny_base.stop_ids)
    counts = valid_counts(stored, vocab, heads)
    assert np.array_equal(counts, valid_counts(made, vocab, heads))
    torch.manual_seed(0)
    model = HeadTraining(build_drafter(heads, tiny_base.vocabulary, vocab), tiny_base.vocabulary)
    found = []
    for store in (stored, made):
        packed = RowReader(store).pack(np.array([7, 0, 11, 3, 4]))
        loss, _ = model(packed, torch.from_numpy(counts.sum(0)))
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(one.detach().abs().max()))


def test_what_is_missing_is_told(tiny_base: Base, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no answers \(\*\.parquet\): run `hydra-heads distill` first"):
        OnlineStore.open(tmp_path, "train")
    write_answers(tmp_path / "part-0.parquet", [feature_row(tiny_base, 0, "train")])
    with pytest.raises(InputError, match="has no rows of the split 'held_out'"):
        OnlineStore.open(tmp_path, "held_out")
