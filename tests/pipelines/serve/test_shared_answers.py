"""Answers of a replica as drafts of its later ones: where they are asked for, and nowhere else."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, save_configuration
from pipelines.config import load_config
from pipelines.serve.messages import Answer, AppArgs, Generation
from pipelines.serve.replica import DecodeServer
from pipelines.serve.stage import find_args
from pipelines.serve.user_config import heads_of
from tests.trained import random_prompts


@pytest.fixture
def args(tiny_base_dir: Path, tiny_base: Base, tmp_path: Path) -> AppArgs:
    base = load_config(None, {"base.model": str(tiny_base_dir), "base.dtype": "fp32", "storage": "/s"}).base
    save_configuration(tmp_path / "ngram", DecodingConfiguration("ngram", "ngram", tiny_base.identity))
    return AppArgs(base.model_dump(), str(tmp_path / "cache"), str(tmp_path / "ngram"), "ngram", threads=1)


def asked_twice(args: AppArgs) -> tuple[list[Answer], list[Answer]]:
    async def ask() -> tuple[list[Answer], list[Answer]]:
        server = DecodeServer(args)
        await server.reconfigure(heads_of(args))
        rounds = []
        for name in ("first", "second"):
            rounds.append([await server.generate(Generation(f"{name}{i}", 40, prompt_ids=list(prompt), ignore_eos=True))
                           for i, prompt in enumerate(random_prompts(4, seed=6))])
        assert server.engine_loop is not None
        server.engine_loop.close()
        return rounds[0], rounds[1]  # type: ignore[return-value]

    return asyncio.run(ask())


def test_a_replica_drafts_from_what_it_has_answered_where_that_is_asked_for(args: AppArgs) -> None:
    """The same tokens with it and without; nobody asks for it by default."""
    apart, shared = asked_twice(args), asked_twice(replace(args, shared_answers=4000))
    tokens = [answer.token_ids for answer in apart[0]]
    assert all([answer.token_ids for answer in answers] == tokens for answers in (*apart, *shared))
    assert [answer.steps for answer in apart[1]] == [answer.steps for answer in apart[0]]
    assert sum(answer.steps for answer in shared[1]) < 0.6 * sum(answer.steps for answer in shared[0])


def test_nothing_is_shared_unless_asked_for(tmp_path: Path) -> None:
    """An endpoint's users are strangers to each other."""
    config = load_config(None, {"storage": str(tmp_path), "serve.model": "plain"})
    assert config.serve.shared_answers == find_args(config).shared_answers == config.batch.shared_answers == 0
    asked = load_config(None, {"storage": str(tmp_path), "serve.model": "plain", "serve.shared_answers": 99})
    assert find_args(asked).shared_answers == 99
