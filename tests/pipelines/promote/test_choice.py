"""Which contender of a bench wins: the fastest of those shown to be lossless, or plain decoding."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_core.errors import InputError
from pipelines.bench.plan import FOREIGN, PLAIN
from tests.decisions import choose_winner


def verdicts(different: int = 0, near: int = 0, identical: int = 8) -> dict[str, int]:
    return {"identical": identical, "near-tie": near, "different": different}


def figures(speed: float | None, **others: Any) -> dict[str, Any]:
    return {"speed_vs_plain": speed, "tokens_per_step": 2.0, "fp32": verdicts()} | others


def test_the_fastest_wins() -> None:
    methods = {PLAIN: figures(1.0), "heads": figures(1.5), "ngram": figures(2.25, fp32=verdicts(near=3)),
               "combined": figures(2.0)}
    assert choose_winner(methods, 1.0) == ("ngram", "2.25x plain decoding, the fastest of 3 lossless contenders")
    for order in (sorted(methods), sorted(methods, reverse=True)):
        for first, second in (("ngram", "heads"), ("heads", "ngram")):  # neither place nor name decides
            given = methods | {first: methods["ngram"], second: methods["heads"]}
            assert choose_winner({name: given[name] for name in order}, 1.0)[0] == first


@pytest.mark.parametrize(("naive", "winner"), [
    ({"bf16": verdicts()}, "fast"), ({"bf16": verdicts(), "fp32": verdicts()}, "fast"), ({"bf16": verdicts(different=1)}, PLAIN),
    ({"bf16": None}, PLAIN), ({"int4": verdicts()}, PLAIN), ({}, PLAIN), (None, PLAIN)])
def test_the_proof_of_a_quantised_base_is_its_own_format(naive: dict[str, Any] | None, winner: str) -> None:
    """Answers in fp32 cannot be compared there; those in another format are no proof."""
    fast = figures(2.0, fp32=None, naive=naive)
    assert choose_winner({PLAIN: figures(1.0), "fast": fast}, 1.0, "bf16")[0] == winner
    assert choose_winner({PLAIN: figures(1.0), "fast": fast}, 1.0)[0] == PLAIN


@pytest.mark.parametrize("fault", [
    {"fp32": verdicts(different=1)}, {"fp32": None}, {"fp32": {}}, {"differing": verdicts(different=1)},
    {"naive": {"fp32": verdicts(), "bf16": verdicts(different=2)}}])
def test_what_is_not_shown_to_be_lossless_does_not_win_however_fast(fault: dict[str, Any]) -> None:
    methods = {PLAIN: figures(1.0), "fast": figures(9.0, **fault), "also": figures(8.0, **fault), "slow": figures(1.1)}
    left_out = "; not considered, since not shown to be lossless: also, fast"
    assert choose_winner(methods, 1.0) == ("slow", f"1.10x plain decoding, the fastest of 1 lossless contenders{left_out}")
    del methods["slow"]
    assert choose_winner(methods, 1.0) == (PLAIN, f"no lossless contender is faster than 1x plain decoding{left_out}")


@pytest.mark.parametrize("clean", [{"differing": verdicts()}, {"differing": None}, {"naive": None}, {"naive": {}},
                                   {"naive": {"bf16": verdicts(near=5), "fp32": None}}, {"differing": verdicts(near=9)}])
def test_near_ties_and_what_was_not_checked_besides_fp32_are_no_fault(clean: dict[str, Any]) -> None:
    assert choose_winner({PLAIN: figures(1.0), "fast": figures(9.0, **clean)}, 1.0)[0] == "fast"


@pytest.mark.parametrize(("speed", "gain", "winner"), [(1.5, 1.0, "fast"), (1.5, 1.49, "fast"), (1.5, 1.5, PLAIN),
                                                       (1.5, 1.51, PLAIN),
                                                       (0.9, 0.5, "fast"), (None, 0.0, PLAIN), (0.0, 0.0, PLAIN)])
def test_the_least_gain(speed: float | None, gain: float, winner: str) -> None:
    found, why = choose_winner({PLAIN: figures(1.0), "fast": figures(speed)}, gain)
    assert found == winner
    assert winner != PLAIN or why == f"no lossless contender is faster than {gain:g}x plain decoding"


def test_others_do_not_compete_and_plain_decoding_must_be_there() -> None:
    others = {name: figures(99.0) for name in (*FOREIGN, "vllm", "vllm+ngram", "vllm+hydra@2")}
    found = choose_winner({PLAIN: figures(1.0), **others}, 1.0)
    assert FOREIGN and found == (PLAIN, "no lossless contender is faster than 1x plain decoding")
    assert choose_winner({PLAIN: figures(7.0), "slow": figures(1.1)}, 1.0)[0] == "slow"
    with pytest.raises(InputError, match="no plain decoding to compare with"):
        choose_winner({"fast": figures(2.0)}, 1.0)


@pytest.mark.parametrize(("questions", "faster", "why"), [
    (1, 1, "measured on 1 question, faster on 1"), (0, 0, "measured on 0 questions, faster on 0"),
    (5, 4, "measured on 5 questions, faster on 4"), (5, 5, None), (2, 2, None), (6, 4, None), (24, 13, None), (None, None, None)])
def test_few_questions_must_all_be_faster(questions: int | None, faster: int | None, why: str | None) -> None:
    """One question has no interval, and one of two or three says little. Benches of earlier versions did not count them."""
    fast = figures(1.5, spread=[1.1, 1.9] if questions != 1 else None, questions=questions, questions_faster=faster)
    found, told = choose_winner({PLAIN: figures(1.0), "fast": fast}, 1.0)
    assert found == (PLAIN if why else "fast") and told.endswith(f"; not considered: fast ({why})" if why else "contenders")


@pytest.mark.parametrize(("noise", "why"), [
    ({"tokens_per_step": 1.0}, "drafts nothing that is accepted"), ({"tokens_per_step": None}, "drafts nothing that is accepted"),
    ({"spread": [1.0, 3.0]}, "may be no faster: 1.00x - 3.00x plain"),
    ({"spread": [0.9, 9.5]}, "may be no faster: 0.90x - 9.50x plain")])
def test_what_may_be_noise_does_not_win_however_fast(noise: dict[str, Any], why: str) -> None:
    methods = {PLAIN: figures(1.0), "fast": figures(9.0, **noise), "slow": figures(1.1, spread=[1.01, 1.2], tokens_per_step=1.01)}
    assert choose_winner(methods, 1.0) == (
        "slow", f"1.10x plain decoding, the fastest of 1 lossless contenders; not considered: fast ({why})")


def test_a_bench_that_timed_no_single_request_is_no_reason_for_plain_decoding() -> None:
    with pytest.raises(InputError, match=r"^promote: the bench timed no single request \(bench\.single=false\)"):
        choose_winner({PLAIN: figures(None), "fast": figures(None)}, 1.0)
