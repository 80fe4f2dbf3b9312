"""Prompts that the base writes itself: sampled user turns, a flow of rows from seeds to `candidates/`.

Seeds are tried in waves of consecutive numbers. How many follow from what the seeds before them gave, whatever else an earlier,
killed run has tried: it ends with the same prompts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from hydra_core.errors import InputError
from pipelines.config import RunConfig
from pipelines.distill.actors import PromptMaker
from pipelines.distill.answers import BLOCK_BATCHES, pool_of, worker_settings
from pipelines.distill.prompts import write_counts, written_prompts
from pipelines.distill.tasks import PartWriter, read_seeds, seeds_to_read
from pipelines.rows.parquet_parts import iter_parts, part_files, stored_ids, write_table
from pipelines.rows.row_ids import among, merged, row_digests
from pipelines.rows.schemas import PROMPTS
from pipelines.runtime.console import Progress, say
from pipelines.runtime.files import atomic_folder, copy_file, remove_tree
from pipelines.runtime.row_flow import run_flow

MOST_WAVES = 6


def make_prompts(config: RunConfig, folder: Path) -> dict[str, int]:
    """Counts of the prompts; those that the base writes are written if they are missing. Needs Ray for them."""
    counts = written_prompts(folder)
    if counts is None or counts.get("self_made", 0) < config.prompts.self_made:
        counts = _sample(config, folder)
    total = counts["prompts"] + counts["prompt_errors"] + counts["prompts_skipped"]
    say("distill", f"prompts read {total} = {counts['prompts']} ok + {counts['prompt_errors']} errors + "
                   f"{counts['prompts_skipped']} skipped")
    return counts


def _sample(config: RunConfig, folder: Path) -> dict[str, int]:
    """Sample candidates in waves of consecutive seeds until enough are distinct, then add them to a file's prompts."""
    prompts = config.prompts
    wanted = prompts.self_made or prompts.count or 640
    settings = replace(worker_settings(config, prompts.max_tokens, prompts.temperature), starts=prompts.starts)
    first = end = prompts.seed * 1_000_000
    rejected, chosen = 0, _distinct(folder, wanted, end)
    for _ in range(MOST_WAVES):
        if len(chosen) >= wanted:
            break
        size = int((wanted - len(chosen)) * 1.3) + 16
        seeds = np.arange(end, end + size)
        end += size
        # what an earlier, killed run has written is not sampled again
        todo = seeds[~np.isin(seeds, _candidates(folder)[0])]
        blocks = seeds_to_read(todo, min(config.distill.max_batch_size * BLOCK_BATCHES, 256))
        with Progress("distill", "prompts", len(todo)) as progress:
            found = run_flow(blocks, read_seeds, PromptMaker, settings, PartWriter(folder), storage=folder,
                             pool=pool_of(config).at_most(len(blocks)),
                             done=lambda counts: progress.advance(sum(counts.values())))
        rejected, chosen = rejected + found["rejected"], _distinct(folder, wanted, end)
    if len(chosen) < wanted:
        raise InputError(f"prompts.source={prompts.source}: the base wrote only {len(chosen)} usable prompts of {wanted} in "
                         f"{end - first} tries: raise prompts.max_tokens under another name, or bring prompts of your own")
    counts = _write_chosen(folder, chosen, rejected, prompts.self_made)
    remove_tree(folder / "candidates")
    return counts


def _candidates(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Seeds of the candidates that stand, sorted, each once: [n] int64; and the digests of their prompts' ids."""
    parts = [(np.array([int(source.split("/")[1]) for source in rows["source"].to_pylist()], np.int64),
              row_digests(rows["prompt_id"].to_pylist()))
             for _, rows in iter_parts(folder / "candidates", PROMPTS, ["source", "prompt_id"])]
    seeds = np.concatenate([np.empty(0, np.int64), *(part[0] for part in parts)])
    seeds, first = np.unique(seeds, return_index=True)
    return seeds, np.concatenate([row_digests(()), *(part[1] for part in parts)])[first]


def _distinct(folder: Path, wanted: int, end: int) -> np.ndarray:
    """Seeds below `end` of the first `wanted` candidates with prompts of their own, sorted."""
    seeds, digests = _candidates(folder)
    tried = seeds < end
    first = np.unique(digests[tried], return_index=True)[1]
    return seeds[tried][np.sort(first)][:wanted]


def _write_chosen(folder: Path, chosen: np.ndarray, rejected: int, self_made: int) -> dict[str, int]:
    """Write the candidates with these seeds, together with the prompts of a file that is read already; returns counts."""
    read = written_prompts(folder)
    known = stored_ids(folder / "prompts", PROMPTS, "prompt_id") if read else merged()
    left, fresh = set(chosen.tolist()), 0
    with atomic_folder(folder / "prompts") as prompts:
        for path in part_files(folder / "prompts") if read else ():
            copy_file(path, prompts / path.name)
        for _, rows in iter_parts(folder / "candidates", PROMPTS, PROMPTS.names):
            seeds = [int(source.split("/")[1]) for source in rows["source"].to_pylist()]
            stands = among(row_digests(rows["prompt_id"].to_pylist()), known)
            kept = rows.filter(pa.array([seed in left and not there for seed, there in zip(seeds, stands, strict=True)]))
            left.difference_update(seeds)
            fresh += len(kept)
            if len(kept):
                write_table(prompts, kept, kept["prompt_id"].to_pylist())
        before = read or {"prompts": 0, "prompt_errors": 0, "prompts_skipped": 0}
        return write_counts(folder, before["prompts"] + fresh, before["prompt_errors"],
                             before["prompts_skipped"] + rejected + len(chosen) - fresh, self_made)
