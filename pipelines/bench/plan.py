"""What the parts of `bench` share: the plan, the questions, the rows they write, and how a contender is made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra_core.base import Base, resolve_base
from hydra_core.base.formats import DTYPES
from hydra_core.bundled import BUNDLED
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.tree import TreeSet
from hydra_core.tree.costs import unmeasured_costs
from pipelines.config import BaseSection
from pipelines.profiling.cost_cache import machine_costs
from pipelines.serve.messages import AppArgs

PLAIN, TRANSFORMERS, NGRAM = "plain", "transformers", "ngram"
LOOKUP = "transformers-lookup"
"""transformers' own prompt lookup."""
COMBINED = "combined"
"""The last of the heads and copied text, in trees grown at each step."""
GROWN = (COMBINED, BUNDLED)
"""`shipped` is the same with the heads that come with the package."""
LLAMA = "llama.cpp"
"""On the base's own GGUF file, where llama-cpp-python is installed."""
FOREIGN = (TRANSFORMERS, LOOKUP, LLAMA)
SWEEP = "sweep.json"
"""Beside a checkpoint's `tree.json`: the trees of other sizes that contenders `NAME@N` draft with."""


@dataclass(frozen=True)
class Question:
    """One prompt to decode, already as token ids; `turns`: the user's words turn by turn where more than one may follow."""

    id: str
    category: str
    prompt_ids: tuple[int, ...]
    turns: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchPlan:
    """Everything the measuring task needs; plain values, so that Ray can ship it. `heads`: name -> checkpoint folder;
    `batch_app`: what `batch` would decode with, None: it is not timed."""

    base: BaseSection
    cache: str
    rows_file: str
    identity_file: str
    batch_file: str
    load_file: str
    memory_file: str
    methods: tuple[str, ...]
    heads: dict[str, str]
    ngram: tuple[int, int, int]
    max_new_tokens: int
    rounds: int
    turns: int
    single: bool
    identity_prompts: int
    identity_batch: int
    identity_formats: tuple[str, ...]
    batch_prompts: int
    max_batch_size: int
    batch_limits: tuple[str, ...]
    batch_app: AppArgs | None
    concurrency: tuple[int, ...]
    concurrency_requests: int
    temperature: float
    shared_noise: bool
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return asdict(self) | {"base": self.base.model_dump(mode="json")}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a contender made of one prompt. Seconds are wall time; `steps` are base forwards after prefill.

    `accepted_lengths`: steps that accepted 0, 1, 2, ... drafts. Of an engine: the seconds of its phases, which are part of
    `decode_seconds`, and `predicted_seconds`, what a cost table foretold for its steps; 0 where nothing is known of them.
    """

    token_ids: tuple[int, ...]
    steps: int
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float
    decode_seconds: float
    accepted_lengths: tuple[int, ...] = ()
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    commit_seconds: float = 0.0
    predicted_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Row(Outcome):
    """One contender on one turn (from 0) of a question in one round."""

    round: int
    question: str
    category: str
    method: str
    turn: int = 0


def read_rows(path: Path) -> list[Row]:
    """Rows written so far; a line cut short by a kill is left out, and what older files do not hold is not known."""
    return [Row(**values | {name: tuple(values.get(name, ())) for name in ("token_ids", "accepted_lengths")})
            for values in read_lines(path)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that a kill may have cut; none where there is no file."""
    values = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return values


def append_row(path: Path, row: Any) -> None:
    """Write a record's line, for good, after whatever stands there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as handle:
        if handle.tell() and not _ends_with_newline(handle):
            handle.write(b"\n")  # a killed run left half a line: keep it apart
        handle.write(json.dumps(asdict(row)).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())


def _ends_with_newline(handle: Any) -> bool:
    handle.seek(-1, os.SEEK_END)
    return bool(handle.read(1) == b"\n")


def make_drafter(method: str, plan: BenchPlan, base: Base, *, measured: bool = True) -> tuple[Drafter | None, TreeSet | None]:
    """What drafts for an engine contender; `measured`: trees are grown by this machine's step costs, not by a guess."""
    if method == PLAIN:
        return None, None
    heads = None
    if method != NGRAM:
        name, nodes = split_sweep(method, plan.heads)
        folder = combined_heads(plan.heads) if method == COMBINED else plan.heads[name]
        loaded = load_checkpoint(Path(folder), base.vocabulary, base.dtype)
        if method not in GROWN:
            return loaded.drafter, loaded.trees if nodes is None else sweep_tree(loaded.folder, nodes)
        heads = loaded.drafter
    costs = machine_costs(base, Path(plan.cache), heads) if measured else unmeasured_costs()
    return AdaptiveDrafter(heads, NgramDrafter(*plan.ngram), costs), None


def combined_heads(heads: Mapping[str, str]) -> str:
    """The checkpoint folder that `combined` drafts with: the last of the run's own, by the order of `train.drafters`."""
    return own_heads(heads)[-1]


def own_heads(heads: Mapping[str, str]) -> list[str]:
    """Checkpoint folders of the run itself, without the package's."""
    return [folder for name, folder in heads.items() if name != BUNDLED]


def split_sweep(method: str, heads: Mapping[str, str]) -> tuple[str, int | None]:
    """The heads that a contender drafts with, and of `NAME@N` the most nodes of its tree; None: the trees of `tree.json`."""
    name, found, nodes = method.rpartition("@")
    return (name, int(nodes)) if found and method not in heads and nodes.isdecimal() else (method, None)


def sweep_tree(folder: Path, nodes: int) -> TreeSet:
    """The largest tree of at most `nodes` nodes that stands beside the heads in `folder`, for every batch size.

    Raises InputError when there is none, or the file is not what `tree` writes.
    """
    path = folder / SWEEP
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"bench.methods: @{nodes}: {path} is missing or unreadable: run `hydra-heads tree` again") from None
    trees = TreeSet.from_json(values, str(path)).trees
    if (size := max((size for size in trees if size <= nodes), default=None)) is None:
        raise InputError(f"bench.methods: @{nodes}: {path} has trees of {', '.join(map(str, trees))} nodes: ask for more")
    return TreeSet({1: trees[size]})


def transformers_model(plan: BenchPlan, base: Base) -> Any:
    """transformers' own model on the same folder and weight format, its `generate` plainly greedy: a generation config
    beside the weights may hold penalties and suppressed tokens, which nobody else here heeds."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = resolve_base(plan.base.model, Path(plan.cache)).folder
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[plan.base.dtype], use_safetensors=True)
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0,
                                               eos_token_id=list(base.stop_ids) or None)
    return model.to(base.device).eval()


def room_for(base: Base, max_new_tokens: int, questions: Sequence[Question]) -> int:
    """Tokens a row needs for the longest question and its answer, at most what the base holds."""
    longest = max(len(question.prompt_ids) for question in questions) + max_new_tokens
    return min(base.context_limit, longest)
