"""Packed rows: contents, positions and a mask that keeps rows apart."""

from __future__ import annotations

import pytest
import torch

from hydra_core.heads import DraftVocab, HeadsConfig, build_drafter
from hydra_core.training.packing import FeatureRow, assign_lines, pack_rows
from tests.hydra_core.training.rows import numbered_rows, random_rows


@pytest.mark.parametrize("width", [None, 13, 16, 40])
def test_every_row_lies_whole_in_its_span(width: int | None) -> None:
    rows = numbered_rows()
    packed = pack_rows(rows, width)
    flat, positions = packed.token_ids.flatten(), packed.positions.flatten()
    for row, start, length in zip(rows, packed.spans.starts.tolist(), packed.spans.lengths.tolist(), strict=True):
        assert torch.equal(flat[start:start + length], row.token_ids)
        assert torch.equal(packed.hidden.flatten(0, 1)[start:start + length], row.hidden)
        assert positions[start:start + length].tolist() == list(range(length))
        assert start % packed.token_ids.shape[1] + length <= packed.token_ids.shape[1]
    assert width is None or packed.token_ids.shape[1] <= width


def test_mask_is_causal_inside_a_row_and_closed_between_rows() -> None:
    rows = numbered_rows()
    packed = pack_rows(rows, 16)
    owner = torch.zeros_like(packed.token_ids) - 1
    for number, (start, length) in enumerate(zip(packed.spans.starts, packed.spans.lengths, strict=True)):
        owner.view(-1)[start:start + length] = number
    for line in range(owner.shape[0]):
        for i in range(owner.shape[1]):
            for j in range(owner.shape[1]):
                assert bool(packed.mask[line, 0, i, j]) == bool(j <= i and owner[line, i] == owner[line, j])


def test_lines_hold_all_rows_and_never_overflow() -> None:
    lines = assign_lines([5, 9, 2, 7, 4, 1], 10)
    assert sorted(row for line in lines for row in line) == list(range(6))
    assert len(lines) == 3 and lines[0] == [1, 5]
    with pytest.raises(ValueError, match="row 1 has 9 tokens"):
        assign_lines([5, 9], 8)


def test_prefix_layer_gives_the_same_features_packed_or_alone(tiny_base) -> None:  # type: ignore[no-untyped-def]
    """A row's features do not depend on the other rows of its line."""
    vocabulary = tiny_base.vocabulary
    torch.manual_seed(0)
    drafter = build_drafter(HeadsConfig(kind="hydra++"), vocabulary, DraftVocab.rank(torch.ones(vocabulary.size), 64))
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # at its start the layer adds nothing and would pass any mask
    rows = random_rows(vocabulary.size, vocabulary.width)
    packed = pack_rows(rows, 20)
    with torch.no_grad():
        together = drafter.features(packed.hidden, packed.positions, packed.mask).flatten(0, 1)
        for row, start in zip(rows, packed.spans.starts.tolist(), strict=True):
            alone = pack_rows([row])
            single = drafter.features(alone.hidden, alone.positions, alone.mask)[0]
            torch.testing.assert_close(together[start:start + len(row.token_ids)], single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [None, 20])
def test_prefix_layer_makes_what_is_wanted_as_it_makes_all(tiny_base, width: int | None) -> None:  # type: ignore[no-untyped-def]
    """Features and gradients of lines with different numbers of wanted positions, one with none."""
    vocabulary = tiny_base.vocabulary
    torch.manual_seed(0)
    drafter = build_drafter(HeadsConfig(kind="hydra++"), vocabulary, DraftVocab.rank(torch.ones(vocabulary.size), 64))
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    packed = pack_rows(random_rows(vocabulary.size, vocabulary.width, shapes=((4, 14), (15, 4), (9, 2), (3, 15))), width)
    wanted = torch.rand(packed.token_ids.shape) < 0.4
    wanted[-1] = width is None
    weights = torch.randn(*packed.token_ids.shape, vocabulary.width) * wanted[..., None]
    results = []
    for chosen in (None, wanted):
        made = drafter.features(packed.hidden, packed.positions, packed.mask, chosen)
        (made * weights).sum().backward()
        results.append((made.detach(), [parameter.grad for parameter in drafter.prefix.parameters()]))
        drafter.zero_grad()
    (every, slopes), (some, fewer) = results
    torch.testing.assert_close(some[wanted], every[wanted], rtol=1e-5, atol=1e-5)
    assert not some[~wanted].any()
    for one, other in zip(fewer, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_bad_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit 3 tokens"):
        FeatureRow(torch.arange(3), 1, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="prompt_tokens 4"):
        FeatureRow(torch.arange(3), 4, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="nothing to pack"):
        pack_rows([])


def test_normalisers_are_packed_when_every_row_has_them() -> None:
    rows = numbered_rows()
    assert pack_rows(rows).log_partitions is None
    known = [FeatureRow(r.token_ids, r.prompt_tokens, r.hidden, r.token_ids.float()) for r in rows]
    packed = pack_rows(known, 16)
    assert packed.log_partitions is not None and torch.equal(packed.log_partitions, packed.token_ids.float())
