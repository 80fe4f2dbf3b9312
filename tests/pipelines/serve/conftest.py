"""A running application with keys over a tiny base and trained heads, one for each file that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from pipelines.config import RunConfig, load_config
from pipelines.serve.served_app import ServedApp
from tests.pipelines.serve.clients import KEY
from tests.pipelines.serve.test_stage import free_port
from tests.trained import overfit_heads, random_prompts

TREE = DraftTree(((0,), (1,), (0, 0), (0, 0, 0)))


@pytest.fixture(scope="module")
def configuration(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("configuration")
    heads = overfit_heads(tiny_base, "hydra++", random_prompts(4, seed=1))
    save_checkpoint(root / "heads", heads, tiny_base.identity, TreeSet({1: TREE, 4: TREE}), {})
    save_configuration(root / "it", DecodingConfiguration("hydra++", "heads", tiny_base.identity, heads=root / "heads"))
    return root / "it"


@pytest.fixture(scope="module")
def config(tiny_base_dir: Path, configuration: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# of this test\n{KEY}\n", encoding="utf-8")
    keys.chmod(0o600)
    return load_config(None, {
        "storage": str(tmp_path_factory.mktemp("storage")), "base.model": str(tiny_base_dir), "base.dtype": "fp32",
        "serve.model": str(configuration), "serve.port": free_port(), "serve.max_batch_size": 4, "serve.max_queued": 60,
        "serve.max_new_tokens": 200, "serve.max_body_bytes": 50_000, "serve.max_prompt_tokens": 190,
        "serve.api_keys_file": str(keys),
        "serve.workers.threads": 1})


@pytest.fixture(scope="module")
def client(app: ServedApp) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{app.url}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def http(app: ServedApp) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=app.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as found:
        yield found
