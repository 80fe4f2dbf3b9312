"""Every token and hidden state carries its row and position as a number, so that no wrong shift can pass."""

from __future__ import annotations

import pytest
import torch

from hydra_core.training.alignment import (
    draft_positions,
    feature_positions,
    head_slice,
    head_slice_count,
    target_range,
    teacher_positions,
)
from hydra_core.training.packing import pack_rows
from tests.hydra_core.training.rows import NAMES, numbered_rows

HEADS = 4


def expected(head: int, decoding: bool) -> set[tuple[float, tuple[int, ...], int, float]]:
    """(h_t, path tokens, target token, teacher's hidden), straight from the drawing and one position at a time."""
    found = set()
    for row in numbered_rows():
        ids, hidden, length = row.token_ids.tolist(), row.hidden[:, 0].tolist(), len(row.token_ids)
        for t in range(length):
            if t + 2 + head >= length or t + 2 + head < row.prompt_tokens or (decoding and t < row.prompt_tokens - 1):
                continue
            found.add((hidden[t], tuple(ids[t + 1:t + 2 + head]), ids[t + 2 + head], hidden[t + 1 + head]))
    return found


@pytest.mark.parametrize("width", [None, 16, 13])
@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("head", range(HEADS))
def test_heads_read_and_predict_what_the_drawing_says(head: int, decoding: bool, width: int | None) -> None:
    packed = pack_rows(numbered_rows(), width)
    tokens, hidden = packed.token_ids.flatten(), packed.hidden.flatten(0, 1)[:, 0]
    part = head_slice(head, packed.spans, decoding=decoding)
    got = list(zip(hidden[part.features].tolist(), map(tuple, tokens[part.path].tolist()), tokens[part.target].tolist(),
                   hidden[part.teacher].tolist(), strict=True))
    assert len(got) == part.count == len(set(got))
    assert set(got) == expected(head, decoding)


def test_one_head_by_hand() -> None:
    """Row 0: prompt 1000 1001 1002, response 1003 ... 1009. The first target of head 1 is 1003, at t = 0."""
    packed = pack_rows(numbered_rows()[:1])
    part = head_slice(1, packed.spans)
    tokens, hidden = packed.token_ids[0], packed.hidden[0, :, 0]
    assert hidden[part.features][0] == 1000.5 and tokens[part.path][0].tolist() == [1001, 1002]
    assert tokens[part.target][0] == 1003 and hidden[part.teacher][0] == 1002.5
    assert tokens[part.target][-1] == 1009 and hidden[part.teacher][-1] == 1008.5


@pytest.mark.parametrize("head", range(HEADS))
def test_counts_without_building(head: int) -> None:
    rows = numbered_rows()
    built = head_slice(head, pack_rows(rows, 20).spans).count
    assert built == sum(head_slice_count(head, prompt, prompt + response) for prompt, response in NAMES)
    assert built == sum(len(target_range(head, prompt, prompt + response)) for prompt, response in NAMES)


def test_teacher_positions_are_the_union_over_heads() -> None:
    spans = pack_rows(numbered_rows(), 16).spans
    union = {int(t) for head in range(HEADS) for t in head_slice(head, spans).teacher}
    found = teacher_positions(spans).tolist()
    assert set(found) == union and len(found) == len(union)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_feature_positions_are_the_union_over_heads(heads: int) -> None:
    spans = pack_rows(numbered_rows(), 16).spans
    union = {int(t) for head in range(heads) for t in head_slice(head, spans).features}
    found = feature_positions(spans, heads).tolist()
    assert set(found) == union and len(found) == len(union)


def test_draft_positions_are_the_steps_a_decoder_can_take() -> None:
    rows = numbered_rows()
    packed = pack_rows(rows, 16)
    got = packed.token_ids.flatten()[draft_positions(packed.spans)].tolist()
    wanted = [int(row.token_ids[t]) for row in rows for t in range(row.prompt_tokens - 1, len(row.token_ids) - 2)]
    assert got == wanted
    assert len(got) == sum(response - 1 for _, response in NAMES)
    assert torch.equal(draft_positions(packed.spans), head_slice(0, packed.spans, decoding=True).features)


@pytest.mark.parametrize("head", [0, 2])
def test_chosen_positions_stay_together(head: int) -> None:
    """Features, path, target and teacher of a position are kept or left out as one."""
    part = head_slice(head, pack_rows(numbered_rows(), 16).spans)
    wanted = torch.arange(part.count) % 3 == 1
    chosen, places = part.only(wanted), range(1, part.count, 3)
    assert chosen.count == len(places) and all(part.features[place] == found for place,
                                               found in zip(places, chosen.features, strict=True))
    assert torch.equal(chosen.path, chosen.features[:, None] + torch.arange(1, head + 2))
    assert torch.equal(chosen.target, chosen.features + 2 + head) and torch.equal(chosen.teacher, chosen.features + 1 + head)
