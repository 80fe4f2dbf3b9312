"""Each gate by itself, on figures made by hand; and figures made by hand from rows that a bench writes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from pipelines.bench.plan import Row
from pipelines.bench.report import summarise
from pipelines.config import PromoteSection
from pipelines.promote.decision import Standing, decide
from pipelines.promote.gates import (
    FEW,
    UNEXPLAINED,
    acceptance,
    category,
    explained,
    gain,
    lossless,
    margin,
    over_champion,
    questions,
    size_of,
)
from pipelines.promote.stage import _recorded

EXACT = {"answers": 8, "identical": 8, "near_tie": 0, "different": 0}


def figures(speed: float | None = 1.5, **others: Any) -> dict[str, Any]:
    return {"speed_vs_plain": speed, "tokens_per_step": 2.0, "fp32": EXACT} | others


@pytest.mark.parametrize(("found", "proof", "verdict", "measured"), [
    ({"fp32": EXACT}, "fp32", "passed", "8 of 8"),
    ({"fp32": {"answers": 8, "identical": 5, "near_tie": 3, "different": 0}}, "fp32", "passed", "5 + 3 near-ties of 8"),
    ({"fp32": None, "naive": {"bf16": EXACT}}, "bf16", "passed", "8 of 8"),
    ({"fp32": None, "naive": {"bf16": EXACT}}, "fp32", "not measured", "-"),
    ({"fp32": EXACT, "naive": {"bf16": EXACT | {"different": 2}}}, "fp32", "failed", "2 different"),
    ({"fp32": EXACT, "differing": EXACT | {"different": 1}}, "fp32", "failed", "1 different")])
def test_lossless(found: dict[str, Any], proof: str, verdict: str, measured: str) -> None:
    gate = lossless(figures(**found), proof)
    assert (gate.verdict, gate.measured) == (verdict, measured) and gate.holds == (verdict == "passed")
    assert proof in gate.asked


@pytest.mark.parametrize(("tokens", "floor", "reason"), [
    (1.0, 1.0, "drafts nothing that is accepted"), (None, 1.0, "drafts nothing that is accepted"), (1.01, 1.0, ""),
    (1.4, 1.5, "1.40 tokens per step, 1.5 are to be exceeded"), (1.5, 1.5, "1.50 tokens per step, 1.5 are to be exceeded"),
    (1.6, 1.5, "")])
def test_acceptance(tokens: float | None, floor: float, reason: str) -> None:
    gate = acceptance(figures(tokens_per_step=tokens), floor)
    assert gate.reason == reason and gate.holds == (not reason)


@pytest.mark.parametrize(("spread", "least", "reason"), [
    ([1.2, 1.8], 0.0, ""), ([1.0, 1.8], 0.0, "may be no faster: 1.00x - 1.80x plain"),
    ([1.04, 1.8], 0.05, "may not be 1.05x as fast: 1.04x - 1.80x plain"), ([1.06, 1.8], 0.05, "")])
def test_margin_over_plain(spread: list[float], least: float, reason: str) -> None:
    gate = margin(figures(spread=spread), least)
    assert gate.reason == reason and gate.holds == (not reason)
    assert margin(figures(), least).verdict == "not measured" and margin(figures(), least).holds


def test_gain() -> None:
    assert gain(figures(1.5), 1.4).holds and gain(figures(1.5), 1.5).reason == "1.50x is not more than 1.5x plain"
    assert gain(figures(None), 0.0).reason == "was not timed"


@pytest.mark.parametrize(("few", "faster", "least", "reason"), [
    (1, 1, 2, "measured on 1 question, faster on 1"), (5, 4, 2, "measured on 5 questions, faster on 4"), (5, 5, 2, ""),
    (6, 3, 2, ""), (8, 8, 12, "measured on 8 questions, faster on 8; 12 are asked"), (12, 7, 12, "")])
def test_questions(few: int, faster: int, least: int, reason: str) -> None:
    assert questions(figures(questions=few, questions_faster=faster), least).reason == reason


def test_a_gain_that_saved_steps_do_not_explain_is_noise() -> None:
    assert explained(figures(1.5, speed_at_plain_steps=1.6)).verdict == "passed"
    assert explained(figures(1.5, speed_at_plain_steps=1.5 / UNEXPLAINED)).verdict == "passed"
    lucky = explained(figures(1.5, speed_at_plain_steps=1.3))
    assert not lucky.holds and lucky.reason == "1.50x, of which saved steps explain 1.30x"
    assert explained(figures(1.5)).holds and explained(figures(1.5)).verdict == "not measured"


def test_no_category_below_plain() -> None:
    def of(count: int, speed: float, spread: list[float]) -> dict[str, Any]:
        return {"questions": count, "speed_vs_plain": speed, "spread": spread}

    found = {"math": of(10, 1.4, [1.2, 1.6]), "rag": of(10, 0.8, [0.7, 0.95]), "few": of(FEW - 1, 0.5, [0.4, 0.6])}
    gate = category(figures(categories=found), 1.0)
    assert not gate.holds and gate.reason == "is slower than plain in rag 0.80x (0.70 - 0.95)"
    assert category(figures(categories=found | {"rag": of(10, 0.9, [0.7, 1.0])}), 1.0).holds  # may be as fast
    assert category(figures(categories=found), 0.9).reason == "" and category(figures(categories=found), 0.0).holds
    assert category(figures(categories={"few": found["few"]}), 1.0).verdict == "not measured"
    assert category(figures(), 1.0).holds  # a bench of an earlier release


def test_size() -> None:
    assert size_of(30_000_000, None).holds and size_of(30_000_000, 30).holds and size_of(None, None).holds
    assert size_of(30_000_001, 30).reason == "its heads have 30.0 MB, 30 are allowed" and not size_of(None, 30).holds


@pytest.mark.parametrize(("against", "reason"), [
    ({"speed": 1.1, "spread": [1.02, 1.2], "questions": 12, "questions_faster": 8}, ""),
    ({"speed": 1.1, "spread": [0.98, 1.2], "questions": 12, "questions_faster": 9},
     "may be no faster than the champion: 0.98x - 1.20x"),
    ({"speed": 1.1, "spread": [1.02, 1.2], "questions": 4, "questions_faster": 3},
     "was faster than the champion on 3 of 4 questions"),
    ({"speed": 1.1, "spread": None, "questions": 1, "questions_faster": 1}, "was faster than the champion on 1 of 1 questions"),
    (None, "was not timed beside the champion")])
def test_margin_over_the_champion(against: dict[str, Any] | None, reason: str) -> None:
    gate = over_champion(figures(vs_champion=against), 0.0, None)
    assert gate.reason == reason and gate.holds == (not reason)
    assert over_champion(figures(vs_champion=against), 0.0, "there is none").holds


# -- figures of rows ---------------------------------------------------------------------------------------------------

def rows_of(method: str, steps: int, step_seconds: float, *, count: int = 12, noise: float = 0.0, tokens: int = 60,
            seed: int = 0) -> list[Row]:
    """`count` answers of `tokens` tokens in `steps` steps; each question's seconds vary by the share `noise`."""
    dice = random.Random(seed)
    return [Row(round=0, question=str(number), category="all", method=method, token_ids=tuple(range(tokens)), steps=steps,
                prefill_seconds=0.1, decode_seconds=steps * step_seconds * (1 + dice.uniform(-noise, noise)))
            for number in range(count)]


def slower(row: Row, decode: float, prefill: float = 1.0) -> Row:
    return replace(row, decode_seconds=row.decode_seconds * decode, prefill_seconds=row.prefill_seconds * prefill)


def test_the_steps_that_are_saved_explain_so_much() -> None:
    """By hand: plain takes 0.1 + 59 x 0.01 s, the other 0.1 + 29 x 0.012 s; at plain's step it would take 0.1 + 29 x 0.01 s."""
    found = summarise([*rows_of("plain", 59, 0.01), *rows_of("hydra", 29, 0.012)], [])
    assert found["hydra"]["speed_vs_plain"] == pytest.approx(0.69 / 0.448, abs=1e-3)
    assert found["hydra"]["speed_at_plain_steps"] == pytest.approx(0.69 / 0.39, abs=1e-3)
    assert found["plain"]["speed_at_plain_steps"] == 1.0


def test_against_the_champion_question_by_question() -> None:
    """What the machine does to a question it does to both: the interval is that of the pairs."""
    slow = random.Random(5)
    weights = [slow.uniform(0.2, 5.0) for _ in range(12)]
    rows = []
    for method, steps in (("plain", 59), ("@champion", 30), ("hydra", 25)):
        rows += [slower(row, weight, weight) for row, weight in zip(rows_of(method, steps, 0.01), weights, strict=True)]
    found = summarise(rows, [], "@champion")
    hydra = found["hydra"]["vs_champion"]
    assert hydra["speed"] == pytest.approx(0.4 / 0.35, abs=1e-3) and hydra["spread"] == [hydra["speed"], hydra["speed"]]
    assert (hydra["questions"], hydra["questions_faster"]) == (12, 12)
    assert found["@champion"]["vs_champion"]["speed"] == 1.0 and summarise(rows, [])["hydra"]["vs_champion"] is None


# -- decisions ---------------------------------------------------------------------------------------------------------

CHAMPION = Standing("models:/hydra-heads/3", 3, "hydra++", "@champion")


def methods_of(*rows: list[Row], champion: str | None = None) -> dict[str, Any]:
    found = summarise([row for part in rows for row in part], [], champion)
    return {name: values | {"fp32": EXACT} for name, values in found.items()}


def test_heads_that_do_not_draft_are_plain_however_lucky() -> None:
    """Tried: four questions on a busy machine, a tree that is "do not draft", one token per step: 1.95x plain (1.01 - 3.75)."""
    lucky = [slower(row, 0.5) for row in rows_of("hydra", 59, 0.01, count=4, noise=0.5)]
    methods = methods_of(rows_of("plain", 59, 0.01, count=4), lucky)
    assert methods["hydra"]["speed_vs_plain"] > 1.5 and methods["hydra"]["spread"][0] > 1.0
    decision = decide(methods, PromoteSection())
    assert (decision.winner, decision.stays) == ("plain", False)
    assert decision.why.endswith("not considered: hydra (drafts nothing that is accepted)")
    shown = {gate.name: gate.verdict for gate in decision.contenders[0].gates}
    assert shown["acceptance"] == shown["explained"] == "failed"


def test_one_draft_accepted_does_not_make_luck_a_gain() -> None:
    """1.02 tokens per step and 1.9x: most of that is not the drafts' doing."""
    lucky = [slower(row, 0.5) for row in rows_of("hydra", 58, 0.01)]
    decision = decide(methods_of(rows_of("plain", 59, 0.01), lucky), PromoteSection())
    assert decision.winner == "plain" and "of which saved steps explain 1.01x" in decision.why


@pytest.mark.parametrize(("steps", "winner", "stays"), [(20, "hydra", False), (29, "hydra++", True), (40, "hydra++", True)])
def test_a_challenger_has_to_be_faster_than_the_champion(steps: int, winner: str, stays: bool) -> None:
    """Beyond the spread: 29 steps against the champion's 30 are less than what the machine adds."""
    methods = methods_of(rows_of("plain", 59, 0.01), rows_of("@champion", 30, 0.01, noise=0.2, seed=1),
                         rows_of("hydra", steps, 0.01, noise=0.2, seed=2), champion="@champion")
    decision = decide(methods, PromoteSection(), champion=CHAMPION)
    assert (decision.winner, decision.stays) == (winner, stays)
    assert ("the champion stays, models:/hydra-heads/3 (hydra++): hydra, the fastest other contender" in decision.why) == stays
    assert stays or " the champion" in decision.why
    forced = decide(methods, PromoteSection(force=True), champion=CHAMPION)
    fastest = max(("hydra", "@champion"), key=lambda name: float(methods[name]["speed_vs_plain"]))
    assert forced.stays == (fastest == "@champion")


@pytest.mark.parametrize(("change", "word"), [
    ({"fp32": EXACT | {"different": 1}}, "it is not lossless in this bench"),
    ({"spread": [0.7, 0.9], "speed_vs_plain": 0.8}, "it is slower than plain decoding in this bench: 0.70x - 0.90x")])
def test_a_champion_that_is_shown_to_be_no_good_gives_way(change: dict[str, Any], word: str) -> None:
    methods = methods_of(rows_of("plain", 59, 0.01), rows_of("@champion", 30, 0.01), champion="@champion")
    methods["@champion"] |= change
    decision = decide(methods, PromoteSection(), champion=CHAMPION)
    assert (decision.winner, decision.stays) == ("plain", False)
    assert decision.why.endswith(f"models:/hydra-heads/3 gives way: {word}")


def test_what_was_not_compared_does_not_dethrone() -> None:
    away = Standing("models:/hydra-heads/3", 3, "hydra++", None, "this run's bench was not compared with it")
    methods = methods_of(rows_of("plain", 59, 0.01), rows_of("hydra", 10, 0.01), champion="plain")
    decision = decide(methods, PromoteSection(), champion=away)
    assert decision.stays and decision.why.endswith("(hydra++): this run's bench was not compared with it")
    assert decision.contenders[0].gate("margin over champion").verdict == "not measured"
    assert decide(methods, PromoteSection(force=True), champion=away).winner == "hydra"


def test_the_champion_is_one_of_the_contenders() -> None:
    own = Standing("models:/hydra-heads/3", 3, "hydra", "hydra")
    methods = methods_of(rows_of("plain", 59, 0.01), rows_of("hydra", 20, 0.01), rows_of("medusa", 40, 0.01), champion="hydra")
    decision = decide(methods, PromoteSection(), champion=own)
    assert (decision.winner, decision.stays) == ("hydra", True)
    plain = Standing("models:/hydra-heads/3", 3, "plain", "plain")
    methods = methods_of(rows_of("plain", 59, 0.01), rows_of("hydra", 20, 0.01), champion="plain")
    assert decide(methods, PromoteSection(), champion=plain).winner == "hydra"
    slow = methods_of(rows_of("plain", 59, 0.01), rows_of("hydra", 80, 0.01), champion="plain")
    assert decide(slow, PromoteSection(), champion=plain).stays


def test_settings_that_came_later_leave_the_fingerprint_as_it_was() -> None:
    """A promotion of an earlier release still counts as done; what only says what to do now is no part of it."""
    assert _recorded(PromoteSection()) == {"model_name": "hydra-heads", "alias": "champion", "min_gain": 1.0}
    assert _recorded(PromoteSection(force=True, reason="why", dry_run=True)) == _recorded(PromoteSection())
    assert _recorded(PromoteSection(margin=0.1))["margin"] == 0.1


@pytest.mark.parametrize(("settings", "sizes", "reason"), [
    ({"min_tokens_per_step": 3.5}, {}, "2.95 tokens per step, 3.5 are to be exceeded"),
    ({"margin": 2.0}, {}, "may not be 3x as fast"), ({"min_questions": 13}, {}, "faster on 12; 13 are asked"),
    ({"max_heads_mb": 1.0}, {"hydra": 2_000_000}, "its heads have 2.0 MB, 1 are allowed"),
    ({"max_heads_mb": 1.0}, {}, "its heads are gone")])
def test_gates_are_settings(settings: dict[str, float], sizes: dict[str, int | None], reason: str) -> None:
    methods = methods_of(rows_of("plain", 59, 0.01), rows_of("hydra", 20, 0.01))
    assert decide(methods, PromoteSection(), sizes={"hydra": 2_000_000}).winner == "hydra"
    refused = decide(methods, PromoteSection(**settings), sizes=sizes)
    assert refused.winner == "plain" and reason in refused.why
