"""When two answers count as equal."""

from __future__ import annotations

from hydra_core.base import Base
from hydra_core.decoding import compare, naive_generate
from hydra_core.decoding.near_ties import bf16_step
from hydra_core.sampling import Request


def test_verdicts(tiny_base: Base) -> None:
    prompt = (5, 6, 7)
    answer = naive_generate(tiny_base, Request("x", prompt, 12, stop_ids=())).token_ids
    assert compare(tiny_base, prompt, answer, answer).verdict == "identical"
    wrong = (*answer[:4], (answer[4] + 1) % 256, *answer[5:])
    found = compare(tiny_base, prompt, answer, wrong)
    assert (found.verdict, found.index) == ("different", 4) and found.gap is not None and found.gap > 1e-4
    assert compare(tiny_base, prompt, answer, answer[:6]).verdict == "different"


def test_bf16_step() -> None:
    assert bf16_step(1.0) == 2**-7 and bf16_step(-20.0) == 2**-3 and bf16_step(0.3) == 2**-9
