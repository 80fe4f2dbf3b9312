"""What an application decodes with: found out before it runs, and told by itself, in the same words."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.errors import InputError
from pipelines.config import load_config
from pipelines.serve.messages import AppArgs, Generation, Refusal, is_text
from pipelines.serve.model_identity import base_part, configuration_digest, model_digest
from pipelines.serve.openai.responses import CHAT, Chunks, response
from pipelines.serve.replica import DecodeServer
from pipelines.serve.user_config import heads_of
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def args(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AppArgs:
    base = load_config(None, {"base.model": str(tiny_base_dir), "base.dtype": "fp32", "storage": "/s"}).base
    return AppArgs(base.model_dump(), str(tmp_path_factory.mktemp("cache")), None, "plain", threads=1)


def replica(args: AppArgs) -> DecodeServer:
    """As Serve makes one."""
    server = DecodeServer(args)
    asyncio.run(server.reconfigure(heads_of(args)))
    return server


def test_a_replica_says_what_was_asked_for(args: AppArgs, tiny_base: Base, tmp_path: Path) -> None:
    save_configuration(tmp_path / "ngram", DecodingConfiguration("ngram", "ngram", tiny_base.identity))
    for asked in (args, replace(args, configuration=str(tmp_path / "ngram")),
                  replace(args, base=args.base | {"context_limit": 100})):
        server = replica(asked)
        assert server.serving == model_digest(asked)
        assert asyncio.run(server.info()).items() >= vars(server.serving).items()
        server.engine_loop.close()


def test_another_base_setting_or_configuration_is_told_apart(args: AppArgs, tiny_base: Base, tmp_path: Path) -> None:
    save_configuration(tmp_path / "ngram", DecodingConfiguration("ngram", "ngram", tiny_base.identity))
    save_configuration(tmp_path / "plain", DecodingConfiguration("plain", "plain", tiny_base.identity))
    other = save_tiny(tmp_path / "other", seed=1)
    found = [model_digest(replace(args, **changes)) for changes in (
        {}, {"base": args.base | {"dtype": "bf16"}}, {"base": args.base | {"context_limit": 100}},
        {"base": args.base | {"model": str(other)}}, {"configuration": str(tmp_path / "ngram")},
        {"configuration": str(tmp_path / "plain")})]
    assert len(set(found)) == len(found)
    assert model_digest(replace(args, base=args.base | {"context_limit": 256})) == found[0]  # its own limit, spelled out


def test_every_answer_says_what_made_it(args: AppArgs, tiny_base: Base, tmp_path: Path) -> None:
    """Heads of another kind change the second part alone, another base or context the first."""
    save_configuration(tmp_path / "ngram", DecodingConfiguration("ngram", "ngram", tiny_base.identity))
    heads = replace(args, configuration=str(tmp_path / "ngram"))
    generation, server = Generation("a", 4, prompt="hello"), replica(args)

    async def ask() -> tuple[str | None, list[str]]:
        chunks, found = Chunks(CHAT, "m", generation), await server.answers(generation)
        assert isinstance(found, list)
        streamed = [chunks.of(item) async for item in server.stream(generation) if not isinstance(item, Refusal)]
        return response(CHAT, "m", generation, found)["system_fingerprint"], [*streamed[-1:], chunks.usage()]

    whole, ends = asyncio.run(ask())
    assert whole == model_digest(args).fingerprint and all(f'"system_fingerprint": "{whole}"' in end for end in ends)
    asyncio.run(server.reconfigure(heads_of(heads)))
    after = asyncio.run(ask())[0]
    assert after == model_digest(heads).fingerprint != whole and base_part(after) == base_part(whole) is not None
    server.engine_loop.close()
    for changes in ({"dtype": "bf16"}, {"context_limit": 100}):
        assert base_part(model_digest(replace(args, base=args.base | changes)).fingerprint) not in (None, base_part(whole))
    assert base_part(None) is base_part("fp_44709d6fcb") is base_part("b1-c2_d_e") is None


def test_a_configuration_is_its_files_and_not_its_place(tiny_base: Base, tmp_path: Path) -> None:
    for name in ("here", "there"):
        save_configuration(tmp_path / name, DecodingConfiguration("ngram", "ngram", tiny_base.identity))
    assert configuration_digest(tmp_path / "here") == configuration_digest(tmp_path / "there")
    (tmp_path / "there" / "heads").mkdir()
    (tmp_path / "there" / "heads" / "tree.json").write_text("{}", encoding="utf-8")
    assert configuration_digest(tmp_path / "here") != configuration_digest(tmp_path / "there")
    assert configuration_digest(None) == "plain"
    with pytest.raises(InputError, match="no such folder"):
        configuration_digest(tmp_path / "nowhere")


def test_half_a_surrogate_pair_is_a_bad_request(args: AppArgs) -> None:
    server = replica(args)
    half = "\ud800"
    for generation, field in ((Generation("a", 4, text=half), "prompt"), (Generation("b", 4, prompt=half), "prompt"),
                              (Generation("c", 4, messages=[{"role": "user", "content": half}]), "messages")):
        found = asyncio.run(server.generate(generation))
        assert isinstance(found, Refusal) and found.status == 400 and found.message.startswith(f"{field}: "), found
    server.engine_loop.close()
    assert is_text("\U0001f600 \u2028") and not is_text([{"role": half}])
