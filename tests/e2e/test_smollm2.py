"""What only a real model shows: SmolLM2-135M-Instruct, fetched by pip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hydra_core.base import EMBEDDED_BASE, Base, load_base, resolve_base
from hydra_core.base.q4_1 import load_codes
from hydra_core.decoding import Engine, compare, naive_generate
from hydra_core.heads import DraftVocab, HeadDrafter, HeadsConfig, build_drafter
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.sampling import Request
from hydra_core.training.model import HeadTraining
from hydra_core.training.packing import FeatureRow, pack_rows
from hydra_core.tree import DraftTree, TreeSet
from pipelines.bench.stage import load_questions
from pipelines.config import load_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
QUESTIONS = ("Why is the sky blue?", "Write a haiku about rain.", "What is 17 * 23?", "Repeat: one two three one two three",
             "Summarise: Ray is a framework for scaling Python programs.", "Translate to French: good morning")
TOKENS = 32
TREE = DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 0, 0)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def base(cache: Path) -> Base:
    return load_base(EMBEDDED_BASE, dtype="fp32", cache=cache)


@pytest.fixture(scope="module")
def requests(base: Base) -> list[Request]:
    return [Request(str(i), tuple(base.encode_prompt(text)), TOKENS) for i, text in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def reference(base: Base, requests: list[Request]) -> dict[str, tuple[int, ...]]:
    return {request.id: naive_generate(base, request).token_ids for request in requests}


@pytest.fixture(scope="module")
def heads(base: Base, requests: list[Request], reference: dict[str, tuple[int, ...]]) -> dict[str, HeadDrafter]:
    """Heads of each kind after a few steps on the very answers, so that drafts are accepted."""
    rows = []
    for request in requests:
        ids = torch.tensor(request.prompt_ids + reference[request.id])
        rows.append(FeatureRow(ids, len(request.prompt_ids), base.hidden_states([ids.tolist()])[0].clone()))
    packed = pack_rows(rows)
    counts = torch.bincount(packed.token_ids.flatten(), minlength=base.vocab_size)
    made = {}
    for kind in ("medusa", "hydra", "hydra++"):
        torch.manual_seed(0)
        config = HeadsConfig(kind=kind, draft_vocab_size=512)
        drafter = build_drafter(config, base.vocabulary, DraftVocab.rank(counts, 512, base.stop_ids))
        model, optimizer = HeadTraining(drafter, base.vocabulary), torch.optim.AdamW(drafter.parameters(), lr=2e-3)
        for _ in range(12):
            optimizer.zero_grad()
            model(packed, torch.full((4,), 200.0))[0].backward()
            optimizer.step()
        made[kind] = drafter.eval().requires_grad_(False)
    return made


@pytest.mark.drawn
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", ["plain", "ngram", "medusa", "hydra", "hydra++", "combined"])
def test_fp32_answers_are_the_naive_loops(base: Base, cache: Path, requests: list[Request], heads: dict[str, HeadDrafter],
                                          reference: dict[str, tuple[int, ...]], kind: str, rows: int) -> None:
    """Token for token, or parted at a near-tie that float64 shows to be one; alone and joining a running batch."""
    drafter: Drafter | None = heads.get(kind) or (NgramDrafter() if kind == "ngram" else None)
    if kind == "combined":
        drafter = AdaptiveDrafter(heads["hydra++"], NgramDrafter())
    engine = Engine(base, drafter, TreeSet({1: TREE}) if kind in heads else None, max_batch_size=rows, context_limit=256)
    waiting, results, steps = list(requests), [], 0
    while waiting or engine.has_work:
        if waiting and engine.running + engine.waiting < rows and steps % 3 == 0:
            engine.add(waiting.pop(0))
        steps += 1
        results += [output.result for output in engine.step() if output.result]
    exact: Base | None = None
    for result in results:
        if result.token_ids != reference[result.id]:
            exact = exact or load_base(EMBEDDED_BASE, dtype="fp32", cache=cache, widen=True)
            verdict = compare(base, result.prompt_ids, reference[result.id], result.token_ids, exact)
            assert verdict.verdict == "near-tie", (kind, verdict)
    assert sum(result.token_ids == reference[result.id] for result in results) >= len(requests) - 1
    if kind in ("hydra", "hydra++"):
        assert sum(len(r.token_ids) - 1 for r in results) > 1.1 * sum(r.steps for r in results)


def test_the_checkpoints_own_codes(base: Base, cache: Path, requests: list[Request]) -> None:
    """int4 holds the file's codes: its hidden states are those of fp32 but for bf16's roundings, and its small drafts
    round as its plain decoding does."""
    packed = load_base(EMBEDDED_BASE, dtype="int4", cache=cache)
    codes = load_codes(resolve_base(EMBEDDED_BASE, cache).folder)
    assert codes is not None and len(codes) == 7 * 30
    for request in requests[:2]:
        ours, wanted = (which.hidden_states([list(request.prompt_ids)])[0].float() for which in (packed, base))
        assert float((ours - wanted).norm() / wanted.norm()) < 0.05
    exact = load_base(EMBEDDED_BASE, dtype="int4", cache=cache, widen=True)
    for request in requests:
        reference = naive_generate(packed, request)
        result = Engine(packed, NgramDrafter(length=7), max_batch_size=1, context_limit=256).generate([request])[0]
        found = compare(packed, request.prompt_ids, reference.token_ids, result.token_ids, exact)
        assert found.verdict != "different", found


def test_base_is_what_it_says(base: Base) -> None:
    assert base.context_limit == 8192 and base.vocab_size == 49152 and base.stop_ids == (2,)
    assert "Paris" in Engine(base, max_batch_size=1).answer(["What is the capital of France?"], max_new_tokens=24)[0]


def test_development_questions_are_read(shared_data: Path, cache: Path, tmp_path: Path) -> None:
    files = sorted(path for path in shared_data.rglob("*.jsonl") if "spec" in path.name.lower() or "dev" in path.name.lower())
    if not files:
        pytest.skip("no development questions here")
    config = load_config(None, {"storage": str(tmp_path), "base.model": EMBEDDED_BASE, "bench.prompts": str(files[0])})
    questions, _ = load_questions(config)
    assert len(questions) > 20 and len({question.category for question in questions}) > 3
    assert all(question.prompt_ids for question in questions)
