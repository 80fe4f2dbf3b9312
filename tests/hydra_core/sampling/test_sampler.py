"""The choice of a token: processors against transformers' own, the distribution against the softmax."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hydra_core.base.vocabulary import argmax
from hydra_core.kernels import ops
from hydra_core.sampling import Request, Sampler, Typical, sample
from hydra_core.sampling.noise import gumbel, position_key
from hydra_core.sampling.sampler import rank_scores, token_logprob

VOCAB = 400
PROMPT = (3, 4, 5, 5)


def sampler(**settings: Any) -> Sampler:
    return Sampler(Request("r", PROMPT, 9, **settings), VOCAB)


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("settings", [
    {"temperature": 0.7}, {"temperature": 1.3, "top_k": 7}, {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_p": 1e-6}, {"temperature": 2.0, "top_p": 0.999}, {"temperature": 1.0, "top_k": 9999},
    {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.4}, {"temperature": 1.0, "repetition_penalty": 1.4},
    {"temperature": 1.0, "repetition_penalty": 0.7}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_k": VOCAB},
])
def test_processors_are_transformers_own(settings: dict[str, Any]) -> None:
    own = sampler(**settings)
    logits = random_logits(20)
    for token in (9, 9, 17):
        own.record(token)
    wanted = logits.clone()
    seen = torch.tensor([[*PROMPT, 9, 9, 17]])
    if "repetition_penalty" in settings:
        wanted = RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])(seen.expand(20, -1), wanted)
    warpers = [("temperature", TemperatureLogitsWarper), ("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper),
               ("min_p", MinPLogitsWarper)]
    for name, warper in warpers:
        if name in settings:
            wanted = warper(settings[name])(None, wanted)
    for row in range(20):
        torch.testing.assert_close(own.process(logits[row]), wanted[row])


def test_presence_and_frequency_count_the_answer_alone() -> None:
    own = sampler(presence_penalty=0.5, frequency_penalty=0.25)
    logits = random_logits(1)[0]
    torch.testing.assert_close(own.process(logits), logits)  # the prompt does not count
    for token in (8, 8, 3):
        own.record(token)
    wanted = logits.clone()
    wanted[8] -= 0.5 + 2 * 0.25
    wanted[3] -= 0.5 + 0.25
    torch.testing.assert_close(own.process(logits), wanted)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_few_tokens_need_their_noise(temperature: float) -> None:
    """The draw equals the argmax over logits / T + the noise of the whole vocabulary."""
    logits = random_logits(300, seed=5)
    samplers = [sampler(temperature=temperature, seed=row % 7, choice=row % 2) for row in range(300)]
    positions = [row // 7 for row in range(300)]
    keys = [position_key(row % 7, row // 7, row % 2) for row in range(300)]
    wanted = (logits / temperature + gumbel(keys, torch.arange(VOCAB))).argmax(-1)
    assert sample(logits, positions, samplers) == wanted.tolist()


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_flat_and_sharp_draws_are_the_same_alone_and_together(spread: float) -> None:
    """With few or many probable tokens, and with other settings in the same batch."""
    logits = spread * torch.randn(12, 5000, generator=torch.Generator().manual_seed(1))
    settings: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {}]
    samplers = [Sampler(Request("r", (0,), 9, seed=row, **settings[row % 4]), 5000) for row in range(12)]
    together = sample(logits, range(12), samplers)
    assert together == [sample(logits[row:row + 1], [row], [samplers[row]])[0] for row in range(12)]
    for row in (0, 1, 4, 5):
        scores = logits[row] / torch.tensor([samplers[row].request.temperature])
        assert together[row] == int((scores + gumbel([position_key(row, row)], torch.arange(5000))[0]).argmax())


def test_draws_follow_the_softmax() -> None:
    """Chi-square of 20,000 draws against the distribution itself, at two temperatures."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5])
    draws = 20_000
    for temperature in (0.7, 1.4):
        own = Sampler(Request("r", (0,), 9, temperature=temperature, seed=11), 6)
        drawn = torch.tensor(sample(logits.expand(draws, 6), range(draws), [own] * draws))
        expected = torch.softmax(logits / temperature, 0) * draws
        chi = float(((torch.bincount(drawn, minlength=6) - expected) ** 2 / expected).sum())
        assert chi < 20.5  # 5 degrees of freedom, p = 0.001


def test_rows_do_not_touch_each_other() -> None:
    logits = random_logits(6)
    samplers = [sampler(), sampler(temperature=1.0, seed=2), sampler(temperature=0.5, top_p=0.7, seed=3),
                sampler(repetition_penalty=2.0), sampler(logprobs=2), sampler(temperature=1.0, min_p=0.3, seed=4)]
    positions = [4, 5, 4, 9, 9, 1]
    together = sample(logits, positions, samplers)
    alone = [sample(logits[row:row + 1], positions[row:row + 1], samplers[row:row + 1])[0] for row in range(6)]
    assert together == alone
    assert together[0] == together[0] == int(logits[0].argmax()) and together[4] == int(logits[4].argmax())


def test_drafters_rank_by_the_draw_to_come() -> None:
    """A drafter that knows the base's logits ranks first what the base will draw."""
    logits = random_logits(4)
    samplers = [sampler(temperature=t, seed=row) for row, t in enumerate((0.0, 0.5, 1.0, 2.0))]
    ranked = rank_scores(logits[:, None], [8] * 4, samplers, torch.arange(VOCAB))[:, 0].argmax(-1).tolist()
    assert ranked == sample(logits, [8] * 4, samplers)
    part = torch.arange(50, 90)
    some = rank_scores(logits[:, None, 50:90], [8] * 4, samplers, part)
    torch.testing.assert_close(some, rank_scores(logits[:, None], [8] * 4, samplers, torch.arange(VOCAB))[..., 50:90])


def test_logprobs() -> None:
    logits = random_logits(1)[0]
    found = token_logprob(logits, 7, 3)
    wanted = torch.log_softmax(logits, -1)
    assert found.token == 7 and found.logprob == pytest.approx(float(wanted[7]))
    assert [token for token, _ in found.top] == wanted.topk(3).indices.tolist()
    assert found.top[0][1] >= found.top[1][1] and math.exp(found.top[0][1]) <= 1
    assert token_logprob(logits, 7, 0).top == ()


def test_argmax_is_the_first_of_equals() -> None:
    logits = torch.randint(0, 4, (3, 5, 1000), generator=torch.Generator().manual_seed(0)).float()
    logits[0, 0], logits[1, 1, 7] = 0.0, torch.inf
    assert torch.equal(argmax(logits), logits.argmax(-1)) and int(argmax(logits)[0, 0]) == 0
    assert torch.equal(argmax(logits[0, :, ::2]), logits[0, :, ::2].argmax(-1))


@pytest.mark.parametrize("top_p", [1e-9, 1e-46, 1e-320])
def test_a_nucleus_of_next_to_nothing_holds_the_most_likely_token(top_p: float) -> None:
    """float32 rounds such a mass to 0, before which no token begins."""
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    samplers = [Sampler(Request(str(row), (1,), 1, temperature=1.0, top_p=top_p, seed=row), 50) for row in range(5)]
    assert sample(logits, [3] * 5, samplers) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(("settings", "simple"), [
    ({}, True), ({"seed": 5, "top_k": 3, "top_p": 0.5}, True), ({"temperature": 0.5}, False), ({"temperature": 1.0}, False),
    ({"presence_penalty": 1.0}, False), ({"repetition_penalty": 1.1}, False), ({"logprobs": 0}, False),
    ({"lossy_typical": Typical()}, False), ({"temperature": 1.0, "logprobs": 2}, False)])
def test_where_the_argmax_is_enough(settings: dict[str, Any], simple: bool) -> None:
    made = sampler(**settings)
    assert made.simple is simple and (made.counts is None) == (made.in_prompt is None) == (not made.request.penalised)


@pytest.mark.parametrize("compiled", [True, False])
def test_draws_with_and_without_the_compiled_kernel(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows beside warm ones, on every processor: argmax(logits / T + noise), by hand."""
    if not compiled:
        monkeypatch.setattr(ops, "supports_sample_tokens", lambda scores: False)
    logits, temperatures = random_logits(30, seed=7), [(0.0, 0.3, 1.0, 2.0)[row % 4] for row in range(30)]
    samplers = [sampler(temperature=temperature, seed=row, choice=row % 3) for row, temperature in enumerate(temperatures)]
    positions = [row % 5 for row in range(30)]
    wanted = []
    for row, temperature in enumerate(temperatures):
        noise = gumbel([position_key(row, row % 5, row % 3)], torch.arange(VOCAB))[0]
        wanted.append(int((logits[row] / temperature + noise if temperature else logits[row]).argmax()))
    assert sample(logits, positions, samplers) == wanted
    warm = sampler(temperature=1.0, seed=3)
    assert sample(logits[:1], [4], [warm]) == [int((logits[0] + gumbel([position_key(3, 4)], torch.arange(VOCAB))[0]).argmax())]


def test_greedy_rows_are_ranked_by_their_logits_alone() -> None:
    """Beside warm ones, which have noise: whole and by the row that each path belongs to."""
    logits, ids = random_logits(3, seed=8)[:, None], torch.arange(VOCAB)
    samplers = [sampler(), sampler(temperature=0.5, seed=2), sampler()]
    scores = rank_scores(logits, [4, 5, 6], samplers, ids)
    assert torch.equal(scores[0], logits[0]) and torch.equal(scores[2], logits[2])
    torch.testing.assert_close(scores[1, 0], logits[1, 0] / 0.5 + gumbel([position_key(2, 5)], ids)[0])
    whose = torch.tensor([1, 1, 2])
    torch.testing.assert_close(rank_scores(logits[whose], [4, 5, 6], samplers, ids, whose), scores[whose])
