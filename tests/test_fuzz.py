"""Readers of what strangers write, over a few altered files each; benchmarks/fuzz.py does the same for minutes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FUZZ = Path(__file__).resolve().parent.parent / "benchmarks" / "fuzz.py"
EXAMPLES = 12
NAMES = [
    "manifest",
    "shard record",
    "array metadata",
    "shard index",
    "order",
    "chunk hashes",
    "chunk hashes' metadata",
    "int8 scales",
    "int8 channels' means",
    "int8 channels' deviations",
    "int8 array metadata",
    "cfg.json",
    "safetensors",
    "checkpoint",
    "TOML config",
    "contexts.parquet",
    "latents.parquet",
]


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def readers(fuzz: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fuzz")
    return {reader.name: (reader, folder) for reader in fuzz.readers(folder)}


def test_every_reader_is_fuzzed(readers: dict[str, Any]) -> None:
    assert list(readers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_altered_file_is_read_or_refused_in_a_line(name: str, fuzz: ModuleType, readers: dict[str, Any]) -> None:
    reader, folder = readers[name]
    fuzz.fuzz(reader, folder, examples=EXAMPLES)
    assert reader.crashes == []
    assert reader.executions >= EXAMPLES
    assert reader.refused > EXAMPLES // 4  # the changes do reach what is read
