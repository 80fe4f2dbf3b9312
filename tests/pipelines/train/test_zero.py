"""DeepSpeed's stages and formats in real Ray Train workers: one curve that two workers begin, one goes on with and three end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hydra_core.base import Base, load_base
from hydra_core.errors import InputError, StoppedError
from hydra_core.heads import DraftVocab, HeadsConfig, build_drafter
from hydra_core.training.model import HeadTraining
from pipelines.config import TrainSection, TrainWorkers
from pipelines.rows.batch_order import BatchOrder
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.packed_reader import ProcessGroup, RowReader
from pipelines.train.batches import StepBatches, valid_counts
from pipelines.train.deepspeed_config import prepare_environment
from pipelines.train.loop import start_engine, train_step, validate
from pipelines.train.position import EARLIER, load_position, save_position
from tests.pipelines.synthetic import feature_row, write_shard

CASES = [(stage, precision, accumulate) for stage in (0, 1, 2, 3) for precision, accumulate in (("fp32", 1), ("bf16", 2))]
WRAPPED = [case for case in CASES if case[1] == "fp32" or case[0] < 2]
"""Those whose optimizers are laid out in different ways: stages 2 and 3 keep the same for bf16 as for fp32."""
CUT, END = {2: 0, 1: 3, 3: 6}, 9
"""Number of workers -> the step at which so many take over; and where the curve ends."""


def workshop(folder: Path, base: Base, stage: int, precision: str, accumulate: int) -> Any:
    """What `train_step`, `validate` and a checkpoint read of a worker's workshop. Without dropout, whose draws differ by rank."""
    train = TrainSection(zero_stage=stage, precision=precision, accumulate=accumulate,  # type: ignore[arg-type]
                         rows_per_step=8, validation_rows=8, warmup_steps=0, workers=TrainWorkers(count=2))
    heads = HeadsConfig(kind="hydra++", draft_vocab_size=64, num_heads=2)
    learn, held_out = (RowReader(FeatureStore.open(folder, split)) for split in ("train", "held_out"))
    vocab = DraftVocab.rank(learn.store.response_counts(base.vocab_size), 64, base.stop_ids)
    group = ProcessGroup(dist.get_rank(), dist.get_world_size())
    torch.manual_seed(0)
    model = HeadTraining(build_drafter(heads, base.vocabulary, vocab), base.vocabulary)
    order = BatchOrder.of(learn.store, 8, 0, lanes=4)
    batches = StepBatches(learn, order, valid_counts(learn.store, vocab, heads), group, accumulate)
    return SimpleNamespace(engine=start_engine(model, train, group), train=train, heads=heads, group=group, model=model,
                           held_out=held_out, device=torch.device("cpu"), total=END, average=None, batches=batches, lanes=4,
                           first=group.rank == 0, next_step=0)


def steps(context: Any, last: int) -> list[float]:
    """The losses of the steps from `next_step` to `last`."""
    losses = [train_step(context, batch)["loss"] for batch in context.batches.between(context.next_step, last)]
    context.next_step = last
    return losses


def saved(context: Any, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_position(context, folder)
    dist.barrier()
    return folder


def continued(context: Any, folder: Path) -> Any:
    context.next_step = load_position(context, folder)["next_step"]
    return context


def refused(context: Any, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_position(context, folder)
    return str(caught.value)


def one_case(folder: Path, base: Base, case: tuple[int, str, int]) -> dict[str, Any]:
    """What this number of workers does with a case, and once more from the checkpoint in the midst of it."""
    def fresh() -> Any:
        return workshop(folder / "features", base, *case)

    context, world = fresh(), dist.get_world_size()
    states, begin = folder / f"{case[0]}-{case[1]}", CUT[world]
    if begin:
        continued(context, states / str(begin))
    losses = steps(context, begin + 1)
    midst = saved(context, states / f"midst-{world}")
    losses += steps(context, begin + 3)
    saved(context, states / str(begin + 3))
    figures = validate(context)
    again = continued(fresh(), midst)
    found = {"losses": losses, "resumed": steps(again, begin + 3), "same": validate(again) == figures,
             "dtypes": sorted({str(tensor.dtype) for tensor in again.model.parameters()})}
    earlier = folder / f"earlier-{case[0]}"
    if world == 2:
        context.engine.save_checkpoint(str(earlier), tag=EARLIER, client_state={"next_step": 3})
        found |= {"undisturbed": losses + steps(context, END)}
        context.next_step = 0
        found |= {"once_more": steps(context, 1)[0]}
        found |= {"earlier": steps(continued(fresh(), earlier), 6)}
    elif case[0]:
        found |= {"earlier": refused(fresh(), earlier)}
    return found


def worker(settings: dict[str, Any]) -> None:
    """A rank of one number of workers: all cases, one after the other."""
    folder = Path(settings["folder"])
    torch.set_num_threads(1)
    base = load_base(str(folder / "base"), dtype="fp32", cache=folder / "cache")
    found = [one_case(folder, base, case) for case in (CASES if dist.get_world_size() == 2 else WRAPPED)]
    if dist.get_rank() == 0:
        (folder / f"{dist.get_world_size()}.json").write_text(json.dumps(found))


def loop(settings: dict[str, Any]) -> None:
    prepare_environment(uses_gpu=False)  # before DeepSpeed is imported
    worker(settings)


@pytest.fixture(scope="module")
def folder(tiny_base: Base, tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("zero")
    (made / "base").symlink_to(tiny_base_dir)
    write_shard(made / "features" / "part-0.parquet",
                [feature_row(tiny_base, number, "held_out" if number % 4 == 0 else "train") for number in range(64)])
    return made


@pytest.fixture(scope="module")
def found(folder: Path, local_ray: None) -> dict[int, dict[Any, dict[str, Any]]]:
    """Number of workers -> case -> what came out."""
    from ray.train import RunConfig, ScalingConfig

    from pipelines.train.ray_train import HeadTrainer, NodeTorchConfig

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    for world in CUT:
        HeadTrainer(loop, train_loop_config={"folder": str(folder)}, torch_config=NodeTorchConfig(backend="gloo"),
                    scaling_config=ScalingConfig(num_workers=world, resources_per_worker={"CPU": 0.5}),
                    run_config=RunConfig(name=f"world-{world}", storage_path=str(folder / "ray"))).fit()
    return {world: dict(zip(CASES if world == 2 else WRAPPED, json.loads((folder / f"{world}.json").read_text()), strict=True))
            for world in CUT}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), [(world, case) for world in CUT for case in (CASES if world == 2 else WRAPPED)])
def test_the_same_number_of_workers_resumes_to_the_last_bit(found: dict[int, dict[Any, dict[str, Any]]],
                                                            case: tuple[int, str, int], world: int) -> None:
    result = found[world][case]
    assert result["resumed"] == result["losses"][1:] and result["same"]
    assert result["dtypes"] == ["torch.float32" if case[1] == "fp32" else "torch.bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("case", WRAPPED)
def test_any_other_number_of_workers_continues_the_curve(found: dict[int, dict[Any, dict[str, Any]]],
                                                         case: tuple[int, str, int]) -> None:
    """Eight rows a step: three workers have unequal parts of them, in bf16 in pieces of one or two."""
    undisturbed = found[2][case]["undisturbed"]
    changing = [loss for world in CUT for loss in found[world][case]["losses"]]
    assert len(changing) == len(undisturbed) == END
    assert changing == pytest.approx(undisturbed, rel=1e-5 if case[1] == "fp32" else 5e-3)
    assert found[2][case]["once_more"] < undisturbed[0] - 0.05  # of the same rows, some of which are harder than others


@pytest.mark.slow
def test_stages_and_pieces_do_not_change_the_first_loss(found: dict[int, dict[Any, dict[str, Any]]]) -> None:
    """Before any update there is nothing for a stage to change; bf16 over pieces does, a little."""
    for precision in ("fp32", "bf16"):
        first = [result["losses"][0] for case, result in found[2].items() if case[1] == precision]
        assert first == pytest.approx([first[0]] * len(first), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_an_earlier_version_continues_with_its_number_of_workers(
        found: dict[int, dict[Any, dict[str, Any]]], case: tuple[int, str, int]) -> None:
    """With another number it is refused in a line, except without ZeRO, where each rank had all."""
    assert found[2][case]["earlier"] == found[2][case]["undisturbed"][3:6]
    for world in (1, 3) if case[0] and case in WRAPPED else ():
        told = found[world][case]["earlier"]
        assert "an earlier version made this checkpoint with 2 workers" in told and "train.workers.count=2" in told


@pytest.mark.slow
def test_a_checkpoint_that_lacks_a_part_is_told_in_a_line(found: dict[int, dict[Any, dict[str, Any]]], folder: Path,
                                                         tmp_path: Path) -> None:
    """Of stage 1, whose two ranks have written half of everything each."""
    from contextlib import ExitStack

    from pipelines.train.optimizer_state import WEIGHT, _Written

    whole = folder / "1-fp32" / "3"
    assert sorted(path.name for path in whole.iterdir()) == ["position.json", "state-0.safetensors", "state-1.safetensors"]
    (tmp_path / "state-0.safetensors").symlink_to(whole / "state-0.safetensors")
    with ExitStack() as opened:
        half, both = _Written(tmp_path, opened), _Written(whole, opened)
        for kind, name in both._found:
            if kind != WEIGHT or name not in {lost for _, lost in both._found.keys() - half._found.keys()}:
                continue
            with pytest.raises(StoppedError, match=f"numbers of weight {name}: it is damaged; delete the `state` folder"):
                half.read(WEIGHT, name, 0, 1)
            break
        else:
            raise AssertionError("one rank has written everything")
