"""What `--plan` says is what the stages do."""

from __future__ import annotations

from pipelines.bench.questions import DEFAULT_QUESTIONS
from pipelines.config import load_config
from pipelines.runtime.dry_run import HELD_OUT, describe


def plan(stage: str, **changes: object) -> str:
    values = {name.replace("__", "."): value for name, value in changes.items()}
    return "\n".join(describe(load_config(None, {"storage": "/s"} | values), stage))


def test_only_the_drafter_that_is_asked_for() -> None:
    assert "hydra: a tree" in plan("tree") and "medusa: a tree" in plan("tree")
    alone = plan("tree", train__only="hydra")
    assert "hydra: a tree" in alone and "medusa: a tree" not in alone


def test_the_questions_and_contenders_of_a_bench() -> None:
    assert HELD_OUT == DEFAULT_QUESTIONS
    assert "every drafter found (bundled heads too) and combined: 24 of held-out prompts of this run" in plan("bench")
    assert "plain against ngram: all of /q.jsonl" in plan("bench", bench__prompts="/q.jsonl", bench__methods=["ngram"])
    assert "3 of held-out prompts" in plan("bench", bench__limit=3)


def test_the_workers_of_distill() -> None:
    assert "by 2 worker(s) ->" in plan("distill", distill__workers__count=2)
    assert "by 2 to 5 worker(s) ->" in plan("distill", distill__workers__count=2, distill__max_workers=5)


def test_what_is_compared() -> None:
    assert "the runs of a, b, and what led to them" in plan("compare", compare__runs=["a", "b"])
    assert "`train` of a, b" in plan("compare", compare__runs=["a", "b"], compare__stage="train")
