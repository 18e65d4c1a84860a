"""What the README promises of the cache holds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import zarr

from routesae.harvest.cache.reader import Cache

README = Path(__file__).parents[1] / "README.md"


def test_the_two_lines_of_the_readme_read_the_same_hidden_states(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").symlink_to(tiny_cache.path)
    monkeypatch.chdir(tmp_path)
    found = re.search(r"```python\n(.*?)\n(.*?)\n```", README.read_text())
    assert found is not None
    names = {"zarr": zarr, "np": np, "n": tiny_cache.shard(0).record.kept, "D": tiny_cache.manifest.width}
    by_zarr, by_memmap = (eval(line.replace("layer_12", "layer_03"), dict(names)) for line in found.groups())
    assert by_zarr.shape == (names["n"], names["D"])
    assert np.array_equal(by_zarr, by_memmap)
