"""The estimate of an engine's memory against what it allocates."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine
from hydra_core.decoding.memory import cache_bytes, check_memory, index_bytes, left_in_groups, workspace_bytes
from hydra_core.errors import InputError
from hydra_core.proposers import AdaptiveDrafter, DraftModel, NgramDrafter, NgramIndex, SuffixDrafter
from hydra_core.proposers.suffix_index import SuffixIndex
from tests.trained import random_heads


def test_caches_take_what_was_said(tiny_base: Base, tiny_draft: Base) -> None:
    heads = random_heads(tiny_base, "hydra++")
    for drafter in (None, NgramDrafter(), AdaptiveDrafter(heads), DraftModel(tiny_draft)):
        engine = Engine(tiny_base, drafter, max_batch_size=3, context_limit=50)
        kept = engine.cache.nbytes
        if isinstance(drafter, AdaptiveDrafter):
            inputs = engine.proposer.inputs  # type: ignore[attr-defined]
            kept += inputs.cache.nbytes + inputs.features.nbytes + inputs.pending.nbytes
        if isinstance(drafter, DraftModel):
            kept += engine.proposer.cache.nbytes  # type: ignore[attr-defined]
        assert kept == cache_bytes(tiny_base, drafter, 3, engine.cache.slots)


def test_more_rows_nodes_and_tokens_take_more(tiny_base: Base) -> None:
    least = workspace_bytes(tiny_base, 1, 64, 1)
    assert 0 < least < workspace_bytes(tiny_base, 8, 64, 1) < workspace_bytes(tiny_base, 8, 64, 16)
    assert least < workspace_bytes(tiny_base, 1, 250, 1)


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n", encoding="utf-8")


def test_the_limit_of_a_container(tmp_path: Path) -> None:
    """A container sees its own group as the uppermost one, whatever /proc/self/cgroup says of the world outside."""
    membership, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    assert left_in_groups(membership, mounted) > 2**50  # not Linux, or nothing is mounted
    for inside in ("0::/\n", "0::/docker/4f2a\n"):
        membership.write_text(inside, encoding="utf-8")
        group(mounted, memory__current=3000, memory__max="max")
        assert left_in_groups(membership, mounted) > 2**50
        group(mounted, memory__max=10000)
        assert left_in_groups(membership, mounted) == 7000


def test_pages_of_files_count_as_free(tmp_path: Path) -> None:
    """The kernel takes them back: after a checkpoint is read, memory.current is near the limit, and nothing is wrong."""
    group(tmp_path, memory__current=9500, memory__max=10000, memory__stat="anon 3000\ninactive_file 6000\nactive_file 500")
    assert left_in_groups(tmp_path / "cgroup", tmp_path) == 6500


def test_the_smallest_of_nested_limits_counts(tmp_path: Path) -> None:
    """A job's limit is set on a group below the one that is mounted, or on one above the process's own."""
    membership, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    membership.write_text("0::/slurm/job_7/step_0\n", encoding="utf-8")
    group(mounted / "slurm" / "job_7" / "step_0", memory__current=100, memory__max=900)
    group(mounted / "slurm" / "job_7", memory__current=400, memory__max=1000, memory__stat="inactive_file 50")
    group(mounted / "slurm" / "job_8", memory__current=0, memory__max=1)  # of another process
    assert left_in_groups(membership, mounted) == 650
    group(mounted / "slurm" / "job_7" / "step_0", memory__max=300)
    assert left_in_groups(membership, mounted) == 200


def test_the_earlier_version_of_groups(tmp_path: Path) -> None:
    membership, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    membership.write_text("12:cpu,cpuacct:/other\n4:memory:/system.slice/job\n0::/\n", encoding="utf-8")
    group(mounted / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=10)
    group(mounted / "memory" / "system.slice" / "job", memory__limit_in_bytes=5000, memory__usage_in_bytes=4000,
          memory__stat="inactive_file 1\ntotal_inactive_file 2500")
    group(mounted / "memory" / "other", memory__limit_in_bytes=2, memory__usage_in_bytes=1)
    assert left_in_groups(membership, mounted) == 3500


def test_an_index_takes_about_what_is_said() -> None:
    tokens, drafter = 3000, NgramDrafter()
    generator = random.Random(3)
    tracemalloc.start()
    index = NgramIndex(drafter)
    index.extend(generator.randrange(30_000) for _ in range(tokens))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert index.match(1).matched == 0
    assert 0.6 * taken < index_bytes(drafter, 1, tokens) < 1.7 * taken
    assert index_bytes(AdaptiveDrafter(None, NgramDrafter(max_match=4)), 2, 100) == 1.5 * index_bytes(drafter, 2, 100)
    assert index_bytes(None, 4, 100) == 0


def test_finished_answers_take_about_what_is_said() -> None:
    tokens, generator = 4000, random.Random(3)
    drafter = AdaptiveDrafter(None, None, suffix=SuffixDrafter(max_tokens=tokens))
    tracemalloc.start()
    index = SuffixIndex(tokens)
    for _ in range(60):
        index.extend([generator.randrange(30_000) for _ in range(100)])
        index.end_piece()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(index) == tokens
    assert 0.6 * taken < index_bytes(drafter, 0, 100) < 1.7 * taken
    assert index_bytes(drafter, 2, 1000) == 1.5 * index_bytes(drafter, 0, 1000)


def test_indexes_count_in_the_check(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose indexes do not fit is refused, the same one without them is not."""
    needed = cache_bytes(tiny_base, None, 4, 250) + workspace_bytes(tiny_base, 4, 250, 16)
    monkeypatch.setattr("hydra_core.decoding.memory.free_bytes", lambda device: needed + index_bytes(NgramDrafter(), 4, 250) // 2)
    check_memory(tiny_base, None, 4, 250, 16)
    with pytest.raises(InputError, match="max_batch_size=4, context_limit=250: keys, values and indexes need"):
        check_memory(tiny_base, NgramDrafter(), 4, 250, 16)


def test_room_for_later_drafts_is_no_step_of_that_many_nodes(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain serving keeps slots for a drafter to come, and computes the logits of one node: it starts where those fit."""
    slots = tiny_base.context_limit + 64
    needed = cache_bytes(tiny_base, None, 4, slots) + workspace_bytes(tiny_base, 4, slots, 1)
    assert workspace_bytes(tiny_base, 4, slots, 64) - workspace_bytes(tiny_base, 4, slots, 1) > 4 * 63 * tiny_base.vocab_size * 4
    monkeypatch.setattr("hydra_core.decoding.memory.free_bytes", lambda device: needed)
    engine = Engine(tiny_base, max_batch_size=4, draft_slots=64)
    assert engine.cache.slots == slots and engine.step_nodes == 1
    monkeypatch.setattr("hydra_core.decoding.memory.free_bytes", lambda device: needed - 1)
    with pytest.raises(InputError, match="keys, values and indexes need"):
        Engine(tiny_base, max_batch_size=4, draft_slots=64)
