"""What the README promises of the cache holds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
import zarr

from routesae.cli import main
from routesae.console.commands import BLOCKS, DRY_RUN, JSON, WATCH, SettingsCommand, imported
from routesae.console.options import taken
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


def examples() -> list[str]:
    """Every command that the README, an example file or the package's own help shows, without its comment."""
    shown = [line for line in README.read_text().splitlines() if re.match(r"\s+(torchrun .*-m )?routesae ", line)]
    for file in sorted((README.parent / "examples").glob("*.toml")):
        shown += [line.partition(": ")[2] for line in file.read_text().splitlines() if ": routesae " in line]
    commands = [line.partition("routesae ")[2].partition("  #")[0].strip(" \\") for line in shown]
    return sorted({command for command in commands if not re.search(r"[<>…$|]|\.\.\.", command)})


@pytest.mark.parametrize("line", examples())
def test_the_commands_that_are_shown_are_commands(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(README.parent)
    command: click.Command = main
    words = shlex.split(line)
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    assert isinstance(command, SettingsCommand)
    context = command.make_context(line, words)
    flags = command.typed(context)
    for beside in (WATCH, BLOCKS, JSON, DRY_RUN):
        taken(imported(beside), flags)
    if command.settings and command.settings[0] not in (WATCH, BLOCKS):
        imported(command.settings[0]).from_flags(flags)
