"""The `tree` stage: for each drafter and batch size, the draft tree with the most tokens per second on this machine.

    held-out rows -> rank tuples -> trees -> tokens per step          \
                                                                       > tokens per second -> tree.json, sweep.json
    this machine  -> verify and draft seconds by size and depth       /

One Ray task measures everything, so that nothing else of the run disturbs the times; they are cached for this machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch

from hydra_core.base import Base, context_limit, load_vocabulary
from hydra_core.decoding import check_heads
from hydra_core.errors import InputError
from hydra_core.heads import DraftVocab, HeadDrafter
from hydra_core.heads.checkpoint import load_checkpoint, restrict_checkpoint
from hydra_core.storage import as_path, local_copy
from hydra_core.training.ranks import rank_rows
from hydra_core.tree import DraftTree, TreeSet
from hydra_core.tree.costs import StepCosts
from hydra_core.tree.search import Choice, best_choice, best_of_each_size, candidate_trees, score_trees, typical_trees
from hydra_core.tree.simulation import RankRows
from pipelines.config import RunConfig
from pipelines.distill.stage import distilled
from pipelines.distill.union import other_rows
from pipelines.profiling.cost_cache import fingerprint_of_machine, machine_costs
from pipelines.profiling.memory_traffic import Reads, reads_of
from pipelines.profiling.report import draft_table, markdown, verify_tables
from pipelines.profiling.step_curves import CURVES, run_curves
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.packed_reader import RowReader
from pipelines.runtime.artifacts import (
    DEVICES,
    RunPaths,
    StageFolder,
    StageResult,
    earlier_bases,
    fingerprint,
    finished,
    read_manifest,
    require_manifest,
    stage_folder,
)
from pipelines.runtime.console import say
from pipelines.runtime.files import atomic_folder, write_text
from pipelines.runtime.hardware import timed_on
from pipelines.runtime.lock import only_run
from pipelines.runtime.measuring import HARDWARE, MeasuringPlace, leave_times_of_another_machine, measuring_place
from pipelines.runtime.ray_cluster import ensure_ray, measuring_device, measuring_resources
from pipelines.runtime.tables import Table
from pipelines.tracking import Run, Tracker, hardware_tags
from pipelines.tracking.models import OUTPUT, TrackedModel, model_of
from pipelines.tree.plots import plot_choices, plot_tree

STAGE = "tree"
HEADS = "heads"
ROWS_PER_BATCH = 8
RECORDED = ("tokens_per_step", "gain", "nodes", "step_ms")
"""Figures of each batch size that are metrics in MLflow; all of them are in the stage's result."""


@dataclass(frozen=True)
class Measured:
    """What the measuring task returns for one drafter."""

    ranks: RankRows
    costs: StepCosts
    machine: dict[str, Any] = field(default_factory=dict)
    draft_vocab: DraftVocab | None = None
    sizes: dict[int, dict[str, float]] = field(default_factory=dict)
    """Size of the draft vocabulary -> results, where several sizes were tried; `draft_vocab`: the chosen one, unless it is the
    heads' own."""
    reads: Reads | None = None

    @property
    def kept(self) -> int:
        """Size of the chosen draft vocabulary."""
        return max(self.sizes) if self.draft_vocab is None else len(self.draft_vocab)


def run_tree(config: RunConfig) -> StageResult:
    """Choose trees for every trained drafter (or `train.only`), write a copy of its heads with them, and print step costs.

    Outputs: drafter -> heads folder, loadable as a checkpoint. Figures: drafter -> batch size -> nodes, depth, expected
    tokens per step and gain over plain decoding. With `tree.curves` also the outputs of `run_curves`.
    Raises InputError if a drafter is not trained yet, or not on this base.
    """
    names = _with_fixed_trees(config)
    tracker = Tracker.open(config)
    with measuring_place(config) as place:
        return _run(config, names, tracker, place)


def _with_fixed_trees(config: RunConfig) -> list[str]:
    """The drafters for which there is a tree to choose. Raises InputError where there are none."""
    names = [config.train.only] if config.train.only else list(config.train.drafters)
    for name in [name for name in names if config.train.drafters[name].autoregressive]:
        names.remove(name)
        say(STAGE, f"{name}: grows trees of its own while it decodes: there is none to choose")
    if not names:
        raise InputError("tree: no drafter of train.drafters has fixed trees: bench them as they are")
    return names


def _run(config: RunConfig, names: Sequence[str], tracker: Tracker, place: MeasuringPlace) -> StageResult:
    """What `run_tree` does, on the machine `place`."""
    features, data_digest = distilled(config)
    wanted = {name: timed_on(_fingerprint(config, name, data_digest), place.hardware.digest) for name in names}
    results = _finished(config, wanted, data_digest)
    if len(results) < len(names):
        with ExitStack() as locks:  # all of them before minutes of measuring
            for name in [name for name in names if name not in results]:
                locks.enter_context(only_run(RunPaths.of(config).stage(STAGE, name), as_path(config.storage)))
            results = _finished(config, wanted, data_digest)  # those too that another run held until now
            todo = {name: digest for name, digest in wanted.items() if name not in results}
            results |= _measure_and_write(config, todo, tracker, (features, data_digest), place)
    _show(config, names)
    curves = run_curves(config, tracker, place) if config.tree.curves else None
    return StageResult(
        STAGE, tracker.parent(),
        outputs={name: results[name].outputs[HEADS] for name in names} | (curves.outputs if curves else {}),
        figures={name: results[name].figures for name in names} | ({CURVES: curves.figures} if curves else {}),
        skipped=all(result.skipped for result in results.values()) and (curves is None or curves.skipped))


def _finished(config: RunConfig, wanted: Mapping[str, str], data_digest: str) -> dict[str, StageResult]:
    """The results of the drafters that are finished."""
    found = {name: finished(RunPaths.of(config).stage(STAGE, name), digest, _earlier_fingerprints(config, name, data_digest))
             for name, digest in wanted.items()}
    return {name: result for name, result in found.items() if result is not None}


def _measure_and_write(config: RunConfig, wanted: Mapping[str, str], tracker: Tracker,
                       features: tuple[Path, str], place: MeasuringPlace) -> dict[str, StageResult]:
    """Measure the drafters of `wanted` (name -> fingerprint), whose locks this process holds, and write their trees."""
    if not wanted:
        return {}
    heads = {name: str(RunPaths.of(config).stage("train", name) / HEADS) for name in wanted}
    _check(config, heads)
    with ensure_ray(config):
        task = ray.remote(measure).options(**measuring_resources(config), **place.options)
        found = ray.get(task.remote(config.model_dump(mode="json", by_alias=True), heads, str(features[0])))
    return {name: _write_one(config, name, digest, found[name], tracker, features, place) for name, digest in wanted.items()}


def _show(config: RunConfig, names: Sequence[str]) -> None:
    """Print the costs that the trees were chosen with; the base's part once where drafters share it."""
    shown = None
    for name in names:
        text = (RunPaths.of(config).stage(STAGE, name) / "costs.json").read_text(encoding="utf-8")
        costs = StepCosts.from_json(json.loads(text))
        base = verify_tables(costs, config.base.dtype)
        for table in (*(base if base != shown else []), draft_table(costs, name)):
            table.show()
        shown = base


def _check(config: RunConfig, heads: Mapping[str, str]) -> None:
    """Raise InputError early for trees that do not fit the context and for heads that do not load."""
    cache = RunPaths.of(config).cache
    _check_room(config, context_limit(config.base.model, cache=cache, asked=config.base.context_limit))
    vocabulary = load_vocabulary(config.base.model, dtype=config.base.dtype, cache=cache)
    for folder in heads.values():
        check_heads(folder, vocabulary)


def measure(values: dict[str, Any], heads: Mapping[str, str], features: str) -> dict[str, Measured]:
    """Rank tuples and step costs of every drafter in `heads` (name -> checkpoint folder); runs in one Ray task."""
    config = RunConfig.model_validate(values)
    torch.set_num_threads(config.tree.threads)
    cache = RunPaths.of(config).cache
    base = config.base.load(cache)
    _check_room(config, base.context_limit)
    machine, reader = fingerprint_of_machine(base.device), RowReader(FeatureStore.open(
        as_path(features), "held_out", also=other_rows(config)))
    found = {}
    for name, folder in heads.items():
        drafter = load_checkpoint(as_path(folder), base.vocabulary, base.dtype).drafter
        found[name] = measure_sizes(config, name, drafter, base, reader, machine)
    return found


def measure_sizes(config: RunConfig, name: str, drafter: HeadDrafter, base: Base, reader: RowReader,
                  machine: dict[str, Any]) -> Measured:
    """Measure one drafter with its own draft vocabulary and with each smaller one of `tree.draft_vocab_sizes`; return the fastest
    at the smallest batch size."""
    tried: dict[int, Measured] = {}
    rates: dict[int, Choice] = {}
    whole = len(drafter.draft_vocab)
    for size in (whole, *(size for size in sorted(config.tree.draft_vocab_sizes, reverse=True) if size < whole)):
        vocab = drafter.draft_vocab if size == whole else drafter.draft_vocab.smaller(size, base.stop_ids)
        candidate = drafter if size == whole else drafter.with_draft_vocab(vocab)
        ranks = held_out_ranks(candidate, reader, config.tree.max_rows, config.train.seed)
        say(f"{STAGE} {name}", f"{ranks.ranks.shape[0]} held-out positions ranked, {len(vocab)} tokens may be drafted")
        by_depth = typical_trees(candidate_trees(ranks, max(config.tree.node_counts)))
        costs = machine_costs(base, RunPaths.of(config).cache, candidate, config.tree, by_depth)
        tried[size] = Measured(ranks, costs, machine, None if size == whole else vocab, reads=reads_of(base, candidate, costs))
        rates[size] = best_choice(choose_trees(tried[size], config.tree.batch_sizes[:1], max(config.tree.node_counts))[
            config.tree.batch_sizes[0]])
    best = max(rates, key=lambda size: rates[size].tokens_per_second)
    sizes = {size: {key: float(value) for key, value in _row(choice).items()} for size, choice in rates.items()}
    return replace(tried[best], sizes=sizes if len(sizes) > 1 else {})


def held_out_ranks(drafter: HeadDrafter, reader: RowReader, rows: int, seed: int) -> RankRows:
    """Rank tuples of at most `rows` held-out rows, greedy ones where there are any."""
    device = drafter.vocabulary.embedding.device
    chosen = reader.store.sample(rows, seed)
    return RankRows.concatenate(rank_rows(drafter, reader.pack(chosen[start:start + ROWS_PER_BATCH]).to(device))
                                for start in range(0, len(chosen), ROWS_PER_BATCH))


def choose_trees(measured: Measured, batch_sizes: Sequence[int], max_nodes: int) -> dict[int, list[Choice]]:
    """For every batch size the best tree of each size, plain decoding first."""
    scored = score_trees(candidate_trees(measured.ranks, max_nodes), measured.ranks, measured.costs, batch_sizes)
    return {batch: best_of_each_size(choices) for batch, choices in scored.items()}


def _write_one(config: RunConfig, name: str, wanted: str, measured: Measured, tracker: Tracker,
               features: tuple[Path, str], place: MeasuringPlace) -> StageResult:
    label, folder = f"{STAGE} {name}", RunPaths.of(config).stage(STAGE, name)
    source = RunPaths.of(config).stage("train", name) / HEADS
    scored = choose_trees(measured, config.tree.batch_sizes, max(config.tree.node_counts))
    best = {batch: best_choice(choices) for batch, choices in scored.items()}
    leave_times_of_another_machine(label, folder, wanted, place, _earlier_fingerprints(config, name, features[1]))
    with (stage_folder(config, STAGE, folder, wanted, settings=_settings(config)) as stage,
          tracker.start(STAGE, part=name, fingerprint=wanted) as run):
        run.set_tags(hardware_tags(place.hardware))
        run.log_dataset("features", features[1], str(features[0]), STAGE)
        run.log_dataset(f"{name} heads", _trained(config, name), str(source), STAGE)
        model = model_of(run, config, source)
        _write_heads(source, folder / HEADS, TreeSet({batch: choice.tree for batch, choice in best.items()}),
                     sweep([choice.tree for choice in scored[min(scored)]], config.tree.node_counts), measured.draft_vocab)
        if measured.sizes:
            write_text(folder / "draft_vocab.json", json.dumps(measured.sizes, indent=2))
            for size, row in measured.sizes.items():
                say(label, f"{size} tokens may be drafted: {row['tokens_per_step']:.3f} tokens per step, "
                           f"{row['tokens_per_second']:.1f} tokens/s{', kept' if size == measured.kept else ''}")
        reads = measured.reads.figures() if measured.reads else {}
        lines = [", ".join(f"{key}: {value}" for key, value in measured.machine.items())]
        if measured.reads:
            say(label, measured.reads.sentence())
            lines += ["", measured.reads.sentence()]
        write_text(folder / "costs.json", json.dumps({"machine": measured.machine, "reads": reads} | measured.costs.to_json(),
                                                     indent=2))
        write_text(folder / "costs.md", markdown(
            f"{name}: the time of a step", lines,
            [*verify_tables(measured.costs, config.base.dtype), draft_table(measured.costs, name)]))
        write_text(folder / "scores.json", json.dumps(
            {str(batch): [_row(choice) for choice in choices] for batch, choices in scored.items()}, indent=2))
        place.record(folder)
        plot_choices(folder / "tree.png", name, scored, best)
        plot_tree(folder / "tree_drawn.png", name, best[min(best)])
        figures = {str(batch): _row(choice) for batch, choice in best.items()}
        _record(name, run, model, features[1], figures)
        return _finish(stage, run, model, figures)


def _record(name: str, run: Run, model: TrackedModel | None, data_digest: str, figures: dict[str, Any]) -> None:
    """Write what MLflow shows of the chosen trees: a few figures of each batch size, those of the smallest by the names that all
    stages share, and a description."""
    first = figures[min(figures, key=int)]
    shared = {"tokens_per_step": first["tokens_per_step"], "speed_vs_plain": first["gain"]}
    if model is not None:
        run.log_model_metrics(model.model_id, shared, "features", data_digest)
    run.log_metrics({f"batch{batch}.{key}": float(row[key]) for batch, row in figures.items() for key in RECORDED} | shared)
    columns = ("batch", *(key.replace("_", " ") for key in first))
    table = Table(columns, [(batch, *(f"{value:g}" for value in row.values())) for batch, row in figures.items()])
    run.describe(f"{name}: a tree of {first['nodes']} nodes, {first['tokens_per_step']:.2f} tokens per step, "
                 f"{first['gain']:.2f}x plain decoding expected", table.markdown(), ("tree.png", "tree_drawn.png"))


def _finish(stage: StageFolder, run: Run, model: TrackedModel | None, figures: dict[str, Any]) -> StageResult:
    folder = stage.folder
    files = [folder / file for file in (HARDWARE, "costs.json", "costs.md", "scores.json", "tree.png", "tree_drawn.png",
                                        "draft_vocab.json") if (folder / file).exists()]
    for path in (*files, folder / HEADS / "tree.json"):
        run.log_artifact(path)
    outputs = {HEADS: str(folder / HEADS), "plot": str(folder / "tree.png")} | ({OUTPUT: model.uri} if model else {})
    result = StageResult(STAGE, run.run_id, outputs, figures)
    return stage.finish(result, [*files, *(folder / HEADS).iterdir()])


def sweep(trees: Sequence[DraftTree], node_counts: Sequence[int]) -> dict[int, DraftTree]:
    """Those of `node_counts` that there is a tree for, with it. `trees[n - 1]` has n nodes, the root included."""
    return {count: trees[count - 1] for count in sorted(set(node_counts)) if 1 < count <= len(trees)}


def _write_heads(source: Path, target: Path, trees: TreeSet, sizes: Mapping[int, DraftTree],
                 draft_vocab: DraftVocab | None) -> None:
    """Write a copy of the heads with the chosen trees and draft vocabulary, and `sizes`, trees of other sizes to choose from."""
    with atomic_folder(target) as temporary:
        shutil.copytree(local_copy(source), temporary, dirs_exist_ok=True)
        if draft_vocab is not None:
            restrict_checkpoint(temporary, draft_vocab)
        write_text(temporary / "tree.json", json.dumps(trees.to_json(), indent=2, sort_keys=True))
        write_text(temporary / "sweep.json", json.dumps({str(count): tree.paths for count, tree in sizes.items()}))


def _row(choice: Choice) -> dict[str, float | int]:
    return {"nodes": choice.tree.size, "depth": choice.tree.depth, "tokens_per_step": round(choice.tokens_per_step, 4),
            "step_ms": round(1000 * choice.seconds_per_step, 3), "plain_ms": round(1000 * choice.plain_seconds, 3),
            "tokens_per_second": round(choice.tokens_per_second, 2), "gain": round(choice.gain, 4)}


def _check_room(config: RunConfig, limit: int) -> None:
    """Raise InputError for node counts that leave no room for a token in the base's context."""
    if limit <= max(config.tree.node_counts):
        raise InputError(f"tree.node_counts: {max(config.tree.node_counts)} nodes leave no room in a context of "
                         f"{limit}: use smaller ones")


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide a tree. The heads say which base it is, wherever it lies."""
    base = config.base.model_dump(mode="json", include={"dtype", "context_limit"})
    return {"tree": config.tree.model_dump(mode="json", exclude={"curves"}), "base": base | {"device": measuring_device(config)}}


def _fingerprint(config: RunConfig, name: str, data_digest: str, settings: dict[str, Any] | None = None) -> str:
    return fingerprint(STAGE, (settings or _settings(config)) | {"drafter": name},
                       {"distill": data_digest, "train": _trained(config, name)})


def _earlier_fingerprints(config: RunConfig, name: str, data_digest: str) -> set[str]:
    """Those that earlier versions gave to this work: they did not name the machine, and held the base's path, and the device as
    it was written."""
    same = {device for device in DEVICES if measuring_device(config, device) == measuring_device(config)}
    bases = [base for base in earlier_bases(config, RunPaths.of(config).stage(STAGE, name)) if base["device"] in same]
    return {_fingerprint(config, name, data_digest),
            *(_fingerprint(config, name, data_digest, _settings(config) | {"base": base}) for base in bases)}


def _trained(config: RunConfig, name: str) -> str:
    """Digest of a drafter's trained heads. Raises InputError if it is not trained yet."""
    folder = RunPaths.of(config).stage("train", name)
    if config.train.only is None and read_manifest(folder) is None:
        paths = RunPaths.of(config)
        if others := [one for one in config.train.drafters if read_manifest(paths.stage("train", one)) is not None]:
            raise InputError(f"{folder}: no finished `train` here: run `hydra-heads train` for it too, or choose a drafter "
                             f"that is trained: train.only={others[0]}")
    return str(require_manifest(folder, "train")["digest"])
