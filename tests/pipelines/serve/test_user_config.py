"""Other heads while rows decode: what began goes on, what is bad changes nothing; and how replicas scale."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, naive_generate, save_configuration
from hydra_core.errors import InputError
from hydra_core.sampling import Request
from pipelines.config import load_config
from pipelines.serve.deployment import build
from pipelines.serve.messages import Answer, AppArgs, Generation, Piece
from pipelines.serve.model_identity import configuration_digest
from pipelines.serve.replica import DecodeServer
from pipelines.serve.user_config import Heads, heads_of, without_heads

GENERATION = Generation("g", 60, temperature=1.0, seed=3, prompt_ids=[5, 6, 7])


@pytest.fixture(scope="module")
def args(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AppArgs:
    base = load_config(None, {"base.model": str(tiny_base_dir), "base.dtype": "fp32", "storage": "/s"}).base
    return AppArgs(base.model_dump(), str(tmp_path_factory.mktemp("cache")), None, "plain", threads=1)


@pytest.fixture
def ngram(tiny_base: Base, tmp_path: Path) -> dict[str, Any]:
    save_configuration(tmp_path / "ngram", DecodingConfiguration("ngram", "ngram", tiny_base.identity))
    return {"configuration": str(tmp_path / "ngram"), "label": "ngram", "version": 2,
            "digest": configuration_digest(tmp_path / "ngram")}


def test_rows_in_flight_go_on_with_the_same_tokens_in_the_only_cache(args: AppArgs, ngram: dict[str, Any],
                                                                     tiny_base: Base) -> None:
    wanted = naive_generate(tiny_base, Request("x", (5, 6, 7), 60, temperature=1.0, seed=3)).token_ids

    async def swap_midway() -> tuple[Answer, Answer]:
        server = DecodeServer(args)
        await server.reconfigure(heads_of(args))
        assert server.engine_loop is not None
        engine = server.engine_loop.engine
        keys, proposer, first = engine.cache.keys.data_ptr(), engine.proposer, None
        async for item in server.stream(GENERATION):
            if first is None:
                assert isinstance(item, Piece)
                first = item
                await server.reconfigure(ngram)
                assert engine.proposer is not proposer
        assert isinstance(item, Answer)
        later = await server.generate(replace(GENERATION, id="h"))
        info = await server.info()
        assert (info["label"], info["version"], info["configuration"]) == ("ngram", 2, ngram["digest"])
        assert server.engine_loop.engine is engine and engine.cache.keys.data_ptr() == keys and info["in_flight"] == 0
        server.engine_loop.close()
        assert isinstance(later, Answer) and engine.drafting.drafter is not None
        return item, later

    assert [answer.token_ids for answer in asyncio.run(swap_midway())] == [wanted, wanted]


def test_bad_heads_change_nothing_and_are_told(args: AppArgs, ngram: dict[str, Any], tmp_path: Path) -> None:
    async def try_bad() -> None:
        server = DecodeServer(args)
        with pytest.raises(InputError, match="no such folder"):  # nothing could stay
            await server.reconfigure({"configuration": str(tmp_path / "nowhere"), "label": "x"})
        await server.reconfigure(ngram)
        for change, word in (({"digest": "0" * 64}, "was deployed"), ({"configuration": str(tmp_path), "digest": None}, "config"),
                             ({"nonsense": 1}, "unknown field"), ({"version": "2"}, "not of type int"),
                             ({"configuration": 7}, "not of type str")):
            await server.reconfigure(ngram | {"label": "bad"} | change)
            rejected = (await server.info())["rejected"]
            assert rejected["label"] == "bad" and word in rejected["reason"]
            assert (await server.info())["label"] == "ngram"
            assert isinstance(await server.generate(GENERATION), Answer)
        assert (await server.info())["tried"]["configuration"] == 7
        await server.reconfigure(ngram | {"restored": True})
        assert (await server.info())["rejected"]["label"] == "bad"  # still told: nobody asked for other heads
        await server.reconfigure(ngram)
        assert (await server.info())["rejected"] is None  # asked for again, and accepted
        await server.reconfigure(ngram | {"version": "2"})
        assert (await server.info())["rejected"] is not None
        await server.reconfigure(heads_of(args))
        assert (await server.info())["rejected"] is None and (await server.info())["label"] == "plain"
        assert server.engine_loop is not None
        server.engine_loop.close()

    asyncio.run(try_bad())


def test_files_that_change_while_they_load_change_nothing(args: AppArgs, ngram: dict[str, Any],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.serve import user_config as heads

    load = heads.load_heads

    def meddle(folder: str, *rest: Any) -> Any:
        found = load(folder, *rest)
        (Path(folder) / "more").write_text("x", encoding="utf-8")
        return found

    async def swap() -> None:
        server = DecodeServer(args)
        await server.reconfigure(heads_of(args))
        monkeypatch.setattr(heads, "load_heads", meddle)
        await server.reconfigure(ngram | {"digest": None})
        info = await server.info()
        assert info["label"] == "plain" and "changed while they were loaded" in info["rejected"]["reason"]
        assert isinstance(await server.generate(GENERATION), Answer)
        assert server.engine_loop is not None
        server.engine_loop.close()

    asyncio.run(swap())


def test_leaving_frees_every_choice(args: AppArgs) -> None:
    async def leave() -> None:
        server = DecodeServer(args)
        await server.reconfigure(heads_of(args))
        assert server.engine_loop is not None
        pieces = server.stream(replace(GENERATION, n=3, max_new_tokens=200))
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]
        assert server.in_flight == 0
        assert isinstance(await server.generate(replace(GENERATION, id="h", max_new_tokens=3)), Answer)
        assert server.engine_loop.running == 0  # the others' rows went within the steps that this took
        server.engine_loop.close()

    asyncio.run(leave())


def test_a_machine_at_work_is_not_timed(args: AppArgs, ngram: dict[str, Any], tmp_path: Path) -> None:
    """What steps cost is taken before the first request, and never beside others."""
    busy = replace(args, cache=str(tmp_path / "cache"))

    async def swap() -> None:
        server = DecodeServer(busy)
        await server.reconfigure(heads_of(busy))
        await server.reconfigure(ngram)
        assert (await server.info())["label"] == "ngram" and not list(tmp_path.glob("cache/costs/*.json"))
        assert isinstance(await server.generate(GENERATION), Answer)
        assert server.engine_loop is not None
        server.engine_loop.close()
        fresh = DecodeServer(busy)
        await fresh.reconfigure(ngram)
        assert list(tmp_path.glob("cache/costs/*.json"))
        assert fresh.engine_loop is not None
        fresh.engine_loop.close()

    asyncio.run(swap())


def test_only_heads_are_no_part_of_the_version(args: AppArgs, ngram: dict[str, Any]) -> None:
    def versions(asked: AppArgs) -> tuple[Any, Any]:
        front = build(asked)._bound_deployment
        server = front.init_args[0]._bound_deployment
        assert server.max_ongoing_requests == 2 * asked.max_batch_size  # all others wait where any replica can take them
        assert front._deployment_config.backpressure_config.status_code == 429
        assert front.max_ongoing_requests > asked.room  # the front itself tells of a full queue, in OpenAI's shape
        assert Heads.of(server.user_config) == Heads.of(heads_of(asked))
        return front._version, server._version

    keys = {"api_key_digests": ("0" * 64,)}
    assert versions(args) == versions(replace(args, **ngram)) != versions(replace(args, max_batch_size=2))
    assert versions(args) == versions(replace(args, **keys))
    assert build(replace(args, **keys))._bound_deployment.user_config == {"api_key_digests": ["0" * 64]}
    assert without_heads(replace(args, **ngram)) == without_heads(args) == without_heads(replace(args, **keys))


def test_an_update_keeps_what_else_makes_a_version(args: AppArgs) -> None:
    environments = {"Ingress": {"env_vars": {"A": "1"}}, "DecodeServer": {"env_vars": {"B": "2"}}}
    front = build(args, environments, restored=True)._bound_deployment
    server = front.init_args[0]._bound_deployment
    assert front.ray_actor_options["runtime_env"] == environments["Ingress"]
    assert front.ray_actor_options["num_cpus"] == 0, "replicas may reserve every CPU"
    assert server.ray_actor_options["runtime_env"] == environments["DecodeServer"]
    assert server.user_config == heads_of(args, restored=True) != heads_of(args)


def test_nothing_is_built_without_a_key_that_is_required(args: AppArgs) -> None:
    assert build(replace(args, require_keys=True, api_key_digests=("0" * 64,)))
    with pytest.raises(InputError, match=r"serve\.require_keys=true: there is no API key"):
        build(replace(args, require_keys=True))


def test_replicas_scale_with_answers_in_flight(args: AppArgs) -> None:
    def server(asked: AppArgs) -> Any:
        return build(asked)._bound_deployment.init_args[0]._bound_deployment

    fixed, scaled = server(replace(args, replicas=2)), server(replace(args, replicas=2, max_replicas=5))
    assert fixed.num_replicas == 2 and fixed._deployment_config.autoscaling_config is None
    found = scaled._deployment_config.autoscaling_config
    assert (found.min_replicas, found.max_replicas, found.target_ongoing_requests) == (2, 5, args.max_batch_size)
    with pytest.raises(InputError, match=r"serve\.max_replicas=1"):
        load_config(None, {"serve.replicas": 2, "serve.max_replicas": 1})
