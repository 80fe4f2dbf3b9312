"""What a request may hold: the limits of each field, from both sides, and the field that a refusal names."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hydra_core.errors import InputError
from hydra_core.sampling import Request, Typical, choices

VOCAB, CONTEXT = 50, 20
INF, NAN = math.inf, math.nan

ACCEPTED: dict[str, tuple[Any, ...]] = {
    "prompt_ids": ((0,), (VOCAB - 1,), (3,) * (CONTEXT - 1), [4, 5]), "max_new_tokens": (1, 10**6),
    "temperature": (0, 0.0, 1e-4, 1, 2.5), "seed": (-2**63, 2**63 - 1), "stop_ids": (None, (), (0,), (VOCAB - 1, 3), [7]),
    "stop": ((), ("a", "b c"), ["x"]), "choice": (0, 2**31), "top_k": (0, 1, 10**9), "top_p": (1e-300, 0.5, 1, 1.0),
    "min_p": (0, 0.0, 1, 0.3), "repetition_penalty": (1e-9, 1, 2, 50.0), "presence_penalty": (-100, 0.0, 3),
    "frequency_penalty": (-100.0, 0, 3), "logprobs": (None, 0, 20),
    "lossy_typical": (None, Typical(), Typical(1, 1e-9), Typical(1e-9, 5))}
REFUSED: dict[str, tuple[Any, ...]] = {
    "prompt_ids": ((-1,), (VOCAB,), (3, VOCAB), (3.0,), "text", 5, None), "max_new_tokens": (0, -1, 2.0, None, True),
    "temperature": (-0.1, 9.9e-5, 1e-9, INF, NAN, "1", None, True), "seed": (-2**63 - 1, 2**63, 1.0, None, False),
    "stop_ids": ((-1,), (3, VOCAB), (3.0,), 5, "3"), "stop": (("",), ("a", ""), "text", None, (5,)),
    "choice": (-1, 2**31 + 1, 1.0, None), "top_k": (-1, 2.0, None), "top_p": (0, 0.0, -0.1, 1.0001, NAN, INF, None, "1"),
    "min_p": (-0.1, 1.0001, NAN, None, "0"), "repetition_penalty": (0, 0.0, -1, INF, NAN, None, "1"),
    "presence_penalty": (INF, -INF, NAN, None, "0"), "frequency_penalty": (INF, -INF, NAN, None, "0"),
    "logprobs": (-1, 21, 1.0, True), "lossy_typical": (Typical(0.0), Typical(1.01), Typical(0.5, 0.0), Typical(-0.1),
                                                      Typical(0.5, -1.0))}


def request(**changes: Any) -> Request:
    return Request(**{"id": "one", "prompt_ids": (5, 6), "max_new_tokens": 3, **changes})


@pytest.mark.parametrize("field", ACCEPTED)
def test_accepted_up_to_its_limits(field: str) -> None:
    for value in ACCEPTED[field]:
        made = request(**{field: value})
        made.check(VOCAB, CONTEXT)
        assert getattr(made, field) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("field", REFUSED)
def test_refused_by_name_beyond_them(field: str) -> None:
    for value in REFUSED[field]:
        with pytest.raises(InputError) as refused:
            request(**{field: value}).check(VOCAB, CONTEXT)
        assert str(refused.value).startswith(f"request one: {field}: "), (value, str(refused.value))


@pytest.mark.parametrize(("changes", "told"), [
    ({"prompt_ids": ()}, "prompt: is empty"), ({"prompt_ids": (3,) * CONTEXT},
                                               "prompt: 20 tokens leave no room in a context of 20"),
    ({"top_k": -1}, "top_k: must be 0 or more, got -1"), ({"min_p": 2}, "min_p: must be between 0 and 1, got 2"),
    ({"presence_penalty": INF}, "presence_penalty: got inf"),
    ({"stop_ids": (3, 1.5)}, "stop_ids: must be a list of token ids, got "),
    ({"stop": (1,)}, "stop: must be a list of strings, got "), ({"top_p": 0.0}, "top_p: must be more than 0")])
def test_a_refusal_says_what_is_allowed(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as refused:
        request(**changes).check(VOCAB, CONTEXT)
    assert str(refused.value).startswith(f"request one: {told}")


def test_stop_strings_need_a_tokenizer() -> None:
    request(stop=("a",)).check(VOCAB, CONTEXT, texts=True)
    request(stop_ids=(3,)).check(VOCAB, CONTEXT, texts=False)
    with pytest.raises(InputError, match="request one: stop: the base has no tokenizer"):
        request(stop=("a",)).check(VOCAB, CONTEXT, texts=False)


@pytest.mark.parametrize(("changes", "penalised", "truncated"), [
    ({}, False, False), ({"temperature": 1.0}, False, False), ({"top_k": 1, "top_p": 0.5, "min_p": 0.1}, False, False),
    ({"temperature": 0.5, "top_k": 1}, False, True), ({"temperature": 0.5, "top_p": 0.99}, False, True),
    ({"temperature": 0.5, "min_p": 0.01}, False, True), ({"temperature": 0.5, "min_p": 1.0}, False, True),
    ({"repetition_penalty": 2.0}, True, False), ({"presence_penalty": 1.0}, True, False),
    ({"frequency_penalty": 1.0}, True, False), ({"frequency_penalty": -1.0, "temperature": 1.0}, True, False)])
def test_which_settings_cost_a_pass_over_the_vocabulary(changes: dict[str, Any], penalised: bool, truncated: bool) -> None:
    made = request(**changes)
    assert (made.penalised, made.truncated) == (penalised, truncated)


def test_choices_differ_in_id_and_noise_alone() -> None:
    one = request(temperature=0.5, top_k=3, stop=("a",))
    assert choices(one, 3) == [request(id=f"one/{number}", choice=number, temperature=0.5, top_k=3, stop=("a",))
                               for number in range(3)]
    assert choices(one, 0) == []
