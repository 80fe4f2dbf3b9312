"""Long tests of which each run draws a few: what one run leaves out another one takes."""

from __future__ import annotations

import os
import random

import pytest

AT_ONCE = 2
_chosen: dict[str, set[str]] = {}


@pytest.hookimpl(tryfirst=True)  # before fixtures, which take a minute
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("drawn") is None or os.environ.get("HYDRA_TEST_ALL"):
        return
    place = str(item.path)
    if place not in _chosen:
        names = sorted(other.nodeid for other in item.session.items
                       if other.path == item.path and other.get_closest_marker("drawn"))
        draw = random.Random(os.environ.get("HYDRA_TEST_SEED") or None)
        _chosen[place] = set(draw.sample(names, min(AT_ONCE, len(names))))
    if item.nodeid not in _chosen[place]:
        pytest.skip(f"a run draws {AT_ONCE} tests of this file, and this one was not among them (HYDRA_TEST_ALL=1 runs all)")
