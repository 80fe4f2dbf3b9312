"""Trees fitted on this machine for heads that were trained on a tiny base."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.decoding import Engine, naive_generate
from hydra_core.errors import InputError
from hydra_core.heads import DraftVocab, HeadDrafter, HeadsConfig, build_drafter
from hydra_core.heads.checkpoint import load_checkpoint, save_checkpoint
from hydra_core.sampling import Request
from hydra_core.training.model import HeadTraining
from hydra_core.tree import PLAIN, DraftTree, TreeSet, default_trees
from hydra_core.tree.search import Choice, StepCosts, best_choice
from hydra_core.tree.simulation import walk
from pipelines.config import RunConfig, load_config
from pipelines.distill.stage import distilled
from pipelines.profiling.step_timing import bushy, draft_seconds, typical, verify_seconds
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.packed_reader import RowReader
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, finished, stage_folder
from pipelines.runtime.files import write_text
from pipelines.runtime.lock import only_run
from pipelines.tracking import Tracker
from pipelines.tree import stage as tree_stage
from pipelines.tree.plots import plot_tree
from pipelines.tree.stage import Measured, _write_heads, choose_trees, held_out_ranks, measure_sizes, run_tree, sweep
from tests.pipelines.synthetic import write_distilled
from tests.trained import random_heads

KINDS = ("medusa", "hydra++")


def make_config(base_dir: Path, storage: Path) -> RunConfig:
    return load_config(None, {
        "storage": str(storage), "name": "tree", "base.model": str(base_dir), "base.dtype": "fp32",
        "train.drafters": {kind: {"kind": kind, "draft_vocab_size": 0} for kind in KINDS},
        "tree.batch_sizes": [1, 3], "tree.node_counts": [1, 2, 6], "tree.repeats": 3, "tree.context": 40})


def trained(config: RunConfig, base: Base, kind: str) -> HeadDrafter:
    """Heads fitted for a moment in this process; how they were trained is no matter here."""
    reader = RowReader(FeatureStore.open(RunPaths.of(config).stage("distill") / "features", "train"))
    torch.manual_seed(0)
    drafter = build_drafter(HeadsConfig(kind=kind), base.vocabulary, DraftVocab.rank(torch.ones(base.vocab_size), 0))  # type: ignore[arg-type]
    model = HeadTraining(drafter, base.vocabulary)
    packed = reader.pack(range(len(reader.store)))
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        model(packed, torch.full((4,), 500.0))[0].backward()
        optimizer.step()
    return drafter


@pytest.fixture(scope="module")
def config(tiny_base: Base, tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A chain that stands before `tree`: distilled, and both drafters trained."""
    config = make_config(tiny_base_dir, tmp_path_factory.mktemp("tree") / "storage")
    write_distilled(config, tiny_base, train=40, held_out=12)
    for kind in KINDS:
        folder = RunPaths.of(config).stage("train", kind)
        with stage_folder(config, "train", folder, fingerprint("train", {"test": kind}, {})) as stage:
            save_checkpoint(folder / "heads", trained(config, tiny_base, kind), tiny_base.identity, default_trees(), {})
            result = StageResult("train", None, {"heads": str(folder / "heads")}, {})
            stage.finish(result, list((folder / "heads").iterdir()))
    return config


def run_id_of(config: RunConfig, kind: str) -> str:
    folder = RunPaths.of(config).stage("tree", kind)
    return str(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["result"]["run_id"])


def test_mistakes_are_told_before_anything_starts(config: RunConfig, tmp_path: Path) -> None:
    def changed(**tree: object) -> RunConfig:
        return config.model_copy(update={"tree": config.tree.model_copy(update=tree)})

    with pytest.raises(InputError, match=r"tree\.node_counts: 256 nodes leave no room in a context of 256"):
        run_tree(changed(node_counts=(1, 256)))
    weights = RunPaths.of(config).stage("train", "medusa") / "heads" / "model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-100])
        with pytest.raises(InputError, match="is truncated"):
            run_tree(changed(repeats=4))
    finally:
        weights.write_bytes(whole)
    more = config.train.model_copy(update={"drafters": {"other": config.train.drafters["medusa"], **config.train.drafters}})
    with pytest.raises(InputError, match=r"train/other: no finished `train` here: .* choose a drafter that is trained: "
                                         r"train\.only=medusa$"):
        run_tree(config.model_copy(update={"train": more}))
    assert not RunPaths.of(config).stage("tree").exists()


def test_what_another_run_finished_meanwhile_is_not_measured_again(config: RunConfig, monkeypatch: pytest.MonkeyPatch,
                                                                   tmp_path: Path) -> None:
    """The question is asked again under the locks, which are taken before anything is measured."""
    again = config.model_copy(update={"storage": str(tmp_path / "storage")})
    shutil.copytree(config.storage, again.storage)
    shutil.rmtree(RunPaths.of(again).stage("tree"), ignore_errors=True)
    data_digest, locked = distilled(again)[1], RunPaths.of(again).stage("tree", KINDS[1])
    monkeypatch.setattr(tree_stage, "ensure_ray", None)  # nothing is measured in this test
    with only_run(locked, Path(again.storage)), pytest.raises(InputError, match=r"hydra\+\+: another run writes to it"):
        run_tree(again)
    for kind in KINDS:
        folder = RunPaths.of(again).stage("tree", kind)
        with stage_folder(again, "tree", folder, tree_stage._fingerprint(again, kind, data_digest)) as stage:
            write_text(folder / "heads", kind)
            stage.finish(StageResult("tree", None, {"heads": str(folder / "heads")}, {}), [folder / "heads"])
    asked: list[Path] = []

    def late(folder: Path, *rest: Any) -> StageResult | None:
        asked.append(folder)
        return finished(folder, *rest) if len(asked) > len(KINDS) else None

    monkeypatch.setattr(tree_stage, "finished", late)
    monkeypatch.setattr(tree_stage, "_show", lambda *_: None)
    assert run_tree(again).skipped and len(asked) == 2 * len(KINDS)


@pytest.mark.slow
def test_the_stage_writes_loadable_heads_with_fitted_trees(config: RunConfig, tiny_base: Base, local_ray: None,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    result = run_tree(config)
    first = capsys.readouterr().err
    assert "fp32: the base's part of a step, ms, over 40 tokens" in first
    inputs = MlflowClient(Tracker.open(config).uri).get_run(run_id_of(config, "medusa")).inputs.dataset_inputs
    assert {found.dataset.name for found in inputs} == {"features", "medusa heads"}
    again = run_tree(config)
    assert again.skipped and again.outputs == result.outputs and not result.skipped
    shown_again = capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run_tree(config.model_copy(update={"base": config.base.model_copy(update={"device": "cpu"})})).skipped
        capsys.readouterr()
    assert (shown := shown_again).count("over 40 tokens") == 1 and all(f"{kind}: drafting" in shown for kind in KINDS)
    assert len(list((RunPaths.of(config).cache / "costs").glob("verify-*.json"))) == 1
    for kind in KINDS:
        folder = RunPaths.of(config).stage("tree", kind)
        assert result.outputs[kind] == str(folder / "heads")
        loaded = load_checkpoint(folder / "heads", tiny_base.vocabulary)
        assert set(loaded.trees.trees) == {1, 3}
        for batch, tree in loaded.trees.trees.items():
            row = result.figures[kind][str(batch)]
            assert (row["nodes"], row["depth"]) == (tree.size, tree.depth) and row["nodes"] <= 6
            assert row["gain"] >= 1.0 and row["tokens_per_step"] >= 1.0
        source = RunPaths.of(config).stage("train", kind) / "heads" / "model.safetensors"
        assert (folder / "heads" / "model.safetensors").read_bytes() == source.read_bytes()
        costs = json.loads((folder / "costs.json").read_text())
        assert set(costs["verify"]["1"]) == {"1", "2", "6"} and all(v > 0 for v in costs["draft"]["3"].values())
        assert StepCosts.from_json(costs).context == 40 and set(costs["far"]) == {"250"} and costs["machine"]["threads"] == 2
        page = (folder / "costs.md").read_text(encoding="utf-8")
        assert costs["reads"]["draft_mb"] > 0 and costs["reads"]["seconds_share"] > 0
        assert " heads reads" in page and f"tree {kind}: drafting with {costs['reads']['depth']} heads reads" in first
        assert "| nodes | batch 1 | batch 3 |" in page and "| depth | batch 1 | batch 3 |" in page
        sizes = TreeSet.from_json(json.loads((folder / "heads" / "sweep.json").read_text())).trees
        assert set(sizes) <= {2, 6} and all(tree.size == count for count, tree in sizes.items()) and 2 in sizes
        kept = {file.path for file in MlflowClient(Tracker.open(config).uri).list_artifacts(run_id_of(config, kind))}
        assert kept == {"config.yaml", "hardware.json", "costs.json", "costs.md", "scores.json", "tree.png", "tree_drawn.png",
                        "tree.json"}
        for picture in ("tree.png", "tree_drawn.png"):
            assert (folder / picture).read_bytes().startswith(b"\x89PNG")
        scores: dict[str, list[dict[str, Any]]] = json.loads((folder / "scores.json").read_text())
        assert max(row["tokens_per_second"] for row in scores["1"]) == result.figures[kind]["1"]["tokens_per_second"]


@pytest.mark.slow
def test_curves_are_measured_beside_finished_trees(config: RunConfig, local_ray: None,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    run_tree(config)
    capsys.readouterr()
    asked = config.model_copy(update={"tree": config.tree.model_copy(update={"curves": True})})
    result = run_tree(asked)
    assert not result.skipped and result.figures["curves"]["points"] == 12
    assert "fp32, batch 16: a step in ms" in capsys.readouterr().err
    picture = Path(result.outputs["curves"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = picture.with_suffix(".md").read_text(encoding="utf-8")
    assert "| context | nodes 1 | nodes 8 | nodes 16 | nodes 32 |" in page and "| 224 |" in page and "predicts these 12" in page
    kept = {file.path for file in MlflowClient(Tracker.open(config).uri).list_artifacts(run_id_of(config, "curves"))}
    assert kept == {"config.yaml", "hardware.json", "curves.json", "curves.md", "curves.png"}
    assert run_tree(asked).skipped and "fp32, batch 1: a step" in capsys.readouterr().err


def test_the_draft_vocabulary_that_makes_most_tokens_a_second_is_kept(config: RunConfig, tiny_base: Base, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are the same whatever its size; a checkpoint of the smaller one holds the same tensors."""
    asked = config.model_copy(update={"tree": config.tree.model_copy(update={"draft_vocab_sizes": (400, 120, 40)})})
    source = RunPaths.of(config).stage("train", "hydra++") / "heads"
    drafter = load_checkpoint(source, tiny_base.vocabulary).drafter
    reader = RowReader(FeatureStore.open(RunPaths.of(config).stage("distill") / "features", "held_out"))
    timed: list[int] = []

    def costs(dear: float, base: Base, cache: Path, heads: HeadDrafter, *_: object) -> StepCosts:
        timed.append(len(heads.draft_vocab))
        return StepCosts({1: {1: 1.0, 6: 1.0}, 3: {1: 1.0, 6: 1.0}}, {1: {0: dear if timed[-1] > 40 else 0.0}})

    whole = tiny_base.vocab_size
    for dear, kept in ((5.0, 40), (0.0, whole)):
        monkeypatch.setattr("pipelines.tree.stage.machine_costs", partial(costs, dear))
        timed.clear()
        found = measure_sizes(asked, "hydra++", drafter, tiny_base, reader, {})
        assert timed == [whole, 120, 40] and set(found.sizes) == set(timed) and found.kept == kept
        assert (found.draft_vocab is None) == (kept == whole)
    smaller = drafter.draft_vocab.smaller(40, tiny_base.stop_ids)
    _write_heads(source, tmp_path / "heads", default_trees(), {}, smaller)
    loaded = load_checkpoint(tmp_path / "heads", tiny_base.vocabulary)
    assert loaded.drafter.draft_vocab.ids.tolist() == smaller.ids.tolist() and loaded.drafter.config.draft_vocab_size == 40
    assert all(torch.equal(value, loaded.drafter.state_dict()[name]) for name, value in drafter.state_dict().items())
    request = Request("a", (5, 6, 7), 30)
    wanted = naive_generate(tiny_base, request).token_ids
    for heads in (loaded.drafter, drafter.with_draft_vocab(smaller).eval().requires_grad_(False)):
        assert Engine(tiny_base, heads, loaded.trees).generate([request])[0].token_ids == wanted
    assert len(drafter.draft_vocab) == whole  # what was tried left it as it was


def test_a_sweep_has_the_sizes_there_are() -> None:
    trees = [DraftTree(tuple((0,) * depth for depth in range(1, size))) for size in range(1, 6)]
    assert {count: tree.size for count, tree in sweep(trees, (1, 4, 2, 4, 5, 6, 48)).items()} == {2: 2, 4: 4, 5: 5}
    assert sweep(trees[:1], (1, 2)) == {}


@pytest.mark.parametrize("size", [1, 2, 40])
def test_a_tree_of_any_size_is_drawn(tmp_path: Path, size: int) -> None:
    paths = sorted(itertools.chain.from_iterable(itertools.product(range(4), repeat=depth) for depth in (1, 2, 3)), key=len)
    plot_tree(tmp_path / "tree.png", "hydra", Choice(1, DraftTree(tuple(paths[:size - 1])), 1.5, 1.0, 1.0))
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_expected_tokens_per_step_are_what_the_engine_reaches(config: RunConfig, tiny_base: Base, kind: str) -> None:
    """The stored features are bf16, so a near-tie among drafts may fall otherwise: 3 % is allowed, no more."""
    folder = RunPaths.of(config).stage("train", kind) / "heads"
    drafter = load_checkpoint(folder, tiny_base.vocabulary).drafter
    store = FeatureStore.open(RunPaths.of(config).stage("distill") / "features", "held_out")
    ranks = held_out_ranks(drafter, RowReader(store), rows=99, seed=0)
    free = {1: 1.0, 6: 1.0}
    measured = Measured(ranks, StepCosts({1: free}, {1: {0: 0.0}}))
    choice = best_choice(choose_trees(measured, [1], 6)[1])
    assert choice.tree.size > 3 and choice.tokens_per_step > 1.05
    requests = []
    for row in range(len(store)):
        ids, prompt = store.token_ids(row).tolist(), int(store.index.prompt_tokens[row])
        requests.append(Request(str(row), tuple(ids[:prompt]), max_new_tokens=len(ids) - prompt, stop_ids=()))
    results = Engine(tiny_base, drafter, TreeSet({1: choice.tree})).generate(requests)
    reached = sum(len(r.token_ids) - 1 for r in results) / sum(r.steps for r in results)
    assert reached == pytest.approx(walk(choice.tree, ranks).tokens_per_step, rel=0.03)


def test_dear_steps_take_the_plain_tree(config: RunConfig, tiny_base: Base) -> None:
    folder = RunPaths.of(config).stage("train", "medusa") / "heads"
    drafter = load_checkpoint(folder, tiny_base.vocabulary).drafter
    store = FeatureStore.open(RunPaths.of(config).stage("distill") / "features", "held_out")
    ranks = held_out_ranks(drafter, RowReader(store), rows=4, seed=0)
    costs = StepCosts({1: {1: 1.0, 6: 1.0}, 16: {1: 1.0, 6: 60.0}}, {1: {0: 0.0}, 16: {0: 0.0}})
    scored = choose_trees(Measured(ranks, costs), [1, 16], 6)
    assert best_choice(scored[1]).tree != PLAIN and best_choice(scored[16]).tree == PLAIN
    assert all(isinstance(choice.tree, DraftTree) for choice in scored[1])


def test_rounds_alternate() -> None:
    calls: list[str] = []
    jobs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = typical(jobs, 3, torch.device("cpu"), lambda: None)
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab" and set(found) == {"a", "b"}


def test_what_takes_long_is_timed_for_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], list[str]()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def job(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    found = typical({"long": lambda: job("l", 0.3), "short": lambda: job("s", 0.01)}, 9, torch.device("cpu"), lambda: None)
    assert calls.count("l") == 1 + 2 and calls.count("s") == 1 + 9
    assert found == pytest.approx({"long": 0.3, "short": 0.01})


def test_more_rows_and_nodes_cost_time(tiny_base: Base) -> None:
    points = [(64, 1, 1), (64, 8, 32), (200, 8, 1)]
    found = verify_seconds(tiny_base, points, 3)
    assert list(found) == points and found[64, 8, 32] > found[64, 1, 1] > 0
    with pytest.raises(ValueError, match="do not fit"):
        verify_seconds(tiny_base, [(100, 1, 200)], 3)


def test_drafting_is_timed_with_fixed_and_with_dynamic_trees(tiny_base: Base) -> None:
    """Whether heads have a prefix layer or not, and copied text alone."""
    trees = {1: DraftTree(((0,), (1,))), 3: DraftTree(((0,), (0, 0), (0, 0, 1)))}
    for kind in KINDS:
        heads = random_heads(tiny_base, kind)
        assert set(draft_seconds(tiny_base, heads, trees, (1, 2), 40, 3)) == {(1, 1), (1, 3), (2, 1), (2, 3)}
        assert set(draft_seconds(tiny_base, heads, None, (2,), 40, 3)) == {(2, depth) for depth in range(4)}


def test_a_bushy_topology_has_any_size() -> None:
    assert [bushy(n).size for n in (1, 2, 7)] == [1, 2, 7] and bushy(7).depth == 2


def test_untrained_drafters_are_refused(tiny_base: Base, tiny_base_dir: Path, storage: Path) -> None:
    config = make_config(tiny_base_dir, storage)
    write_distilled(config, tiny_base, train=4, held_out=2)
    with pytest.raises(InputError, match="no finished `train` here"):
        run_tree(config)
