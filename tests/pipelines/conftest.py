"""A running application, of the `config` of the file that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipelines.config import RunConfig
from pipelines.serve.stage import ServedApp, start_app


@pytest.fixture(scope="module")
def app(local_ray: None, config: RunConfig) -> Iterator[ServedApp]:
    served = start_app(config)
    yield served
    served.stop()
