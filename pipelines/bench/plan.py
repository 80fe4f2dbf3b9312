"""What the parts of `bench` share: the plan, the questions, the rows that they write, and how an engine contender is made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra_core.base import Base
from hydra_core.bundled import BUNDLED, EARLIER
from hydra_core.decoding import DraftModelSettings, open_draft_model, read_configuration
from hydra_core.decoding.configuration import DRAFT_MODEL
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.heads.config import EAGLE_KINDS
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter, SuffixDrafter
from hydra_core.sampling import Request
from hydra_core.storage import as_path
from hydra_core.tree import TreeSet
from hydra_core.tree.costs import unmeasured_costs
from pipelines.config import BaseSection
from pipelines.config.bench import SHARED_ANSWERS, VLLM, is_vllm
from pipelines.profiling.cost_cache import machine_costs
from pipelines.runtime.files import append_line
from pipelines.serve.messages import AppArgs

PLAIN, TRANSFORMERS, NGRAM = "plain", "transformers", "ngram"
LOOKUP = "transformers-lookup"
"""transformers' own prompt lookup."""
SUFFIX = "suffix"
"""Drafts from the text and from the answers to earlier questions of the same round, without heads."""
COMBINED = "combined"
"""The last of the run's heads together with n-gram drafts, in dynamic trees."""
DYNAMIC_TREES = (COMBINED, BUNDLED)
"""Contenders with dynamic trees. `bundled` is the same as `combined` with the heads that come with the package."""
CHAMPION = "@champion"
"""The configuration that the registry's alias stands for."""
LLAMA = "llama.cpp"
"""On the base's own GGUF file, where llama-cpp-python is installed."""
NO_CONFIGURATION = (SUFFIX,)
"""Contenders that no configuration stands for: what they draft from is kept by an endpoint, whatever decodes there."""
FOREIGN = (TRANSFORMERS, LOOKUP, LLAMA)
"""Contenders that are not this project's engine, besides vLLM's: see `is_foreign`."""
SWEEP = "sweep.json"
"""Beside a checkpoint's `tree.json`: trees of other sizes, which the contenders `NAME@N` draft with."""
LIMITS = (16, 400)
"""The ragged workload of a batch draws each answer's maximum of new tokens between these."""


@dataclass(frozen=True)
class Question:
    """One prompt to decode, as token ids; `turns`: the user's text of each turn, where a question has several."""

    id: str
    category: str
    prompt_ids: tuple[int, ...]
    turns: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchPlan:
    """Everything that the measuring task needs, as plain values, since Ray serialises it.

    `heads`: name -> checkpoint folder; `batch_app`: what `batch` would decode with, None: `batch` is not timed; `champion`: the
    configuration folder of the contender `@champion`; `draft_model`: as `DraftModelSettings.of` takes it.
    """

    base: BaseSection
    cache: str
    rows_file: str
    losslessness_file: str
    batch_file: str
    concurrency_file: str
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
    champion: str | None = None
    shared_answers: int = 0
    prefix_cache_tokens: int = 0
    vllm_python: str | None = None
    vllm_settings: dict[str, Any] = field(default_factory=dict)
    draft_model: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return asdict(self) | {"base": self.base.model_dump(mode="json")}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One contender's answer to one prompt. Seconds are wall time; `steps` are base forwards after prefill.

    `accepted_lengths`: number of steps that accepted 0, 1, 2, ... drafts. For an engine: the seconds of its phases, which are
    part of `decode_seconds`, and `predicted_seconds`, what a cost table predicts for its steps; 0 where they are unknown.
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
    """Rows written so far. A line that a kill cut short is left out; fields that an older file lacks get their defaults."""
    return [Row(**values | {name: tuple(values.get(name, ())) for name in ("token_ids", "accepted_lengths")})
            for values in read_lines(path)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file that a kill may have cut short; none where there is no file."""
    values = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [value | {"method": contender(value["method"])} if "method" in value else value for value in values]


def contender(name: str) -> str:
    """A contender's present name, from a file that an earlier version may have written."""
    return re.sub(rf"^{EARLIER}(?=@|$)", BUNDLED, name)


def append_row(path: Path, row: Any) -> None:
    """Append a record as one line; it is on the disk when this returns."""
    append_line(path, json.dumps(asdict(row)).encode())


def is_foreign(method: str) -> bool:
    """Whether a contender is not this project's engine: it is timed and reported, and never promoted."""
    return method in FOREIGN or is_vllm(method)


def reference_of(method: str) -> str:
    """The contender whose answers those of `method` should equal: vLLM's own plain decoding for what drafts in vLLM, whose
    kernels sum in another order than ours, else plain."""
    return VLLM if is_vllm(method) and method != VLLM else PLAIN


def drafts_in_vllm(method: str, heads: Mapping[str, str]) -> tuple[str | None, int | None]:
    """What the vLLM contender `method` drafts with, `ngram` or one of `heads`, None for vLLM alone; and for `vllm+NAME@N` the
    most drafted tokens N."""
    name = method.partition("+")[2]
    before, found, count = name.rpartition("@")
    return (before, int(count)) if found and name not in heads and count.isdecimal() else (name or None, None)


def heads_name(method: str, heads: Mapping[str, str]) -> str | None:
    """The heads that a contender drafts with, if it does with any of its own."""
    name = drafts_in_vllm(method, heads)[0] if is_vllm(method) else split_sweep(method, heads)[0]
    return name if name in heads else None


def make_drafter(method: str, plan: BenchPlan, base: Base, *, measured: bool = True) -> tuple[Drafter | None, TreeSet | None]:
    """Drafter and trees of an engine contender. `measured`: dynamic trees use this machine's step costs, not default ones."""
    if method == PLAIN:
        return None, None
    if method == CHAMPION:
        return _champion_drafter(plan, base, measured)
    if method == DRAFT_MODEL:
        assert plan.draft_model is not None
        return open_draft_model(DraftModelSettings.of(plan.draft_model), base, Path(plan.cache)), None
    heads = None
    if method not in (NGRAM, SUFFIX):
        name, nodes = split_sweep(method, plan.heads)
        folder = combined_heads(plan.heads) if method == COMBINED else plan.heads[name]
        loaded = load_checkpoint(as_path(folder), base.vocabulary, base.dtype)
        if method not in DYNAMIC_TREES:
            return loaded.drafter, loaded.trees if nodes is None else sweep_tree(loaded.folder, nodes)
        heads = loaded.drafter
    costs = machine_costs(base, Path(plan.cache), heads) if measured else unmeasured_costs()
    ngram, tokens = NgramDrafter(*plan.ngram), plan.shared_answers or (SHARED_ANSWERS if method == SUFFIX else 0)
    return AdaptiveDrafter(heads, ngram, costs, SuffixDrafter(max_tokens=tokens) if tokens else None), None


def _champion_drafter(plan: BenchPlan, base: Base, measured: bool) -> tuple[Drafter | None, TreeSet | None]:
    """As `load_configuration`, but in the format of `base`: losslessness is checked in others than the configuration's own."""
    assert plan.champion is not None
    configuration = read_configuration(as_path(plan.champion))
    if configuration.draft_model is not None:
        return open_draft_model(configuration.draft_model, base, Path(plan.cache)), None
    loaded = None if configuration.heads is None else load_checkpoint(configuration.heads, base.vocabulary, base.dtype)
    if loaded is not None and configuration.drafter == "heads":
        return loaded.drafter, loaded.trees
    heads = None if loaded is None else loaded.drafter
    costs = machine_costs(base, Path(plan.cache), heads) if measured else unmeasured_costs()
    return AdaptiveDrafter(heads, configuration.ngram, costs), None


def combined_heads(heads: Mapping[str, str]) -> str:
    """The checkpoint folder that `combined` drafts with: the last one of the run, in the order of `train.drafters`."""
    return own_heads(heads)[-1]


def own_heads(heads: Mapping[str, str]) -> list[str]:
    """Checkpoint folders of the run itself whose heads can draft beside copied text, without those of the package."""
    return [folder for name, folder in heads.items() if name != BUNDLED and not _autoregressive(as_path(folder))]


def _autoregressive(folder: Path) -> bool:
    """Whether the heads in `folder` grow trees of their own; False where that cannot be read."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["heads"]["kind"] in EAGLE_KINDS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def split_sweep(method: str, heads: Mapping[str, str]) -> tuple[str, int | None]:
    """The heads that a contender drafts with, and for `NAME@N` the maximum nodes N of its tree; None: those of `tree.json`."""
    name, found, nodes = method.rpartition("@")
    return (name, int(nodes)) if found and method not in heads and nodes.isdecimal() else (method, None)


def sweep_tree(folder: Path, nodes: int) -> TreeSet:
    """The largest tree of at most `nodes` nodes among those beside the heads in `folder`, for every batch size.

    Raises InputError when there is none, or when the file is not what `tree` writes.
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


def requests_for(questions: Sequence[Question], limits: int | Sequence[int], temperature: float = 0.0, *,
                 numbered: bool = False) -> list[Request]:
    """One request for each question, in order. `limits`: maximum new tokens of all, or of each; `numbered`: ids begin with the
    request's number, since a question may occur several times."""
    each = [limits] * len(questions) if isinstance(limits, int) else limits
    return [Request(f"{number} {question.id}" if numbered else question.id, question.prompt_ids, limit, temperature)
            for number, (question, limit) in enumerate(zip(questions, each, strict=True))]


def room_for(base: Base, max_new_tokens: int, questions: Sequence[Question]) -> int:
    """Cache slots, in tokens, that a sequence needs for the longest question and its answer; at most the base's context limit."""
    longest = max(len(question.prompt_ids) for question in questions) + max_new_tokens
    return min(base.context_limit, longest)
