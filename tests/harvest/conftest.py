"""What the tests of a harvest that was begun start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from routesae.harvest.cache.reader import Cache


@pytest.fixture
def begun(tiny_cache: Cache, tmp_path: Path) -> Path:
    """A copy of the finished cache."""
    shutil.copytree(tiny_cache.path, tmp_path / "shards")
    return tmp_path / "shards"
