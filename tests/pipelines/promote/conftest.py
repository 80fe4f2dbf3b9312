"""The stores of tracking's tests."""

from tests.pipelines.tracking.conftest import postgresql, postgresql_server, store

__all__ = ["postgresql", "postgresql_server", "store"]
