"""A running application, of the `config` of the file that asks for it, and MLflow databases that are copied."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from pipelines.config import RunConfig
from pipelines.serve.served_app import ServedApp
from pipelines.serve.stage import start_app


@pytest.fixture(scope="session", autouse=True)
def ready_databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tables that MLflow makes in a new SQLite file are made once in a process and copied then: a second for each test."""
    import mlflow.store.db.utils as mlflow_tables

    made, make = tmp_path_factory.mktemp("tables") / "mlflow.db", mlflow_tables._initialize_tables

    def copy(engine: Engine) -> None:
        database = engine.url.database
        if engine.dialect.name != "sqlite" or not database or not Path(database).is_file():
            make(engine)
        elif made.exists():
            shutil.copyfile(made, database)
        else:
            make(engine)
            shutil.copyfile(database, made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_tables, "_initialize_tables", copy)
        yield


@pytest.fixture(scope="module")
def app(local_ray: None, config: RunConfig) -> Iterator[ServedApp]:
    served = start_app(config)
    yield served
    served.stop()
