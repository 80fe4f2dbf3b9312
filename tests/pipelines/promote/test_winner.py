"""A contender is promoted for being faster, not for being lucky."""

from __future__ import annotations

from typing import Any

import pytest

from tests.decisions import choose_winner


def figures(speed: float, tokens_per_step: float | None, spread: list[float] | None) -> dict[str, Any]:
    verdicts = {"answers": 8, "identical": 8, "near_tie": 0, "different": 0}
    return {"speed_vs_plain": speed, "tokens_per_step": tokens_per_step, "spread": spread, "fp32": verdicts, "naive": {}}


PLAIN = figures(1.0, 1.0, [1.0, 1.0])


@pytest.mark.parametrize(("contender", "words"), [
    (figures(1.95, 1.0, [1.01, 3.75]), "hydra++ (drafts nothing that is accepted)"),
    (figures(1.95, None, None), "hydra++ (drafts nothing that is accepted)"),
    (figures(1.95, 1.8, [0.98, 3.1]), "hydra++ (may be no faster: 0.98x - 3.10x plain)"),
    (figures(1.95, 1.8, [1.0, 3.1]), "hydra++ (may be no faster: 1.00x - 3.10x plain)")])
def test_noise_is_not_promoted(contender: dict[str, Any], words: str) -> None:
    winner, why = choose_winner({"plain": PLAIN, "hydra++": contender}, 1.0)
    assert winner == "plain" and why == f"no lossless contender is faster than 1x plain decoding; not considered: {words}"


def test_the_slower_but_certain_one_wins() -> None:
    methods = {"plain": PLAIN, "lucky": figures(1.9, 1.6, [0.9, 2.9]), "ngram": figures(1.4, 1.3, [1.1, 1.7]),
               "alone": figures(1.2, 1.2, None)}  # one question has no interval
    winner, why = choose_winner(methods, 1.0)
    assert (winner, why) == ("ngram", "1.40x plain decoding, the fastest of 2 lossless contenders; not considered: lucky (may be "
                                      "no faster: 0.90x - 2.90x plain)")
