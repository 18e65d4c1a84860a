"""What README and the documentation show can be typed, and is what they say it is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import zarr

from routesae.analyze.pipeline.settings import read_pipeline
from routesae.cli import main
from routesae.console.commands import BLOCKS, DRY_RUN, JSON, WATCH, SettingsCommand, imported, taken
from routesae.harvest.cache.reader import Cache
from routesae.train.run import train
from routesae.train.settings import settings_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_readme_is_a_screen_or_two_and_its_links_lead_somewhere() -> None:
    text = README.read_text()
    assert len(text.encode()) <= 9000
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("https://")]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_two_lines_read_a_cache_without_routesae(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").symlink_to(tiny_cache.path)
    monkeypatch.chdir(tmp_path)
    found = re.search(r"```python\n(.*?)\n(.*?)\n```", (ROOT / "docs/reference/cache.md").read_text())
    assert found is not None
    names = {"zarr": zarr, "np": np, "n": tiny_cache.shard(0).record.kept, "D": tiny_cache.manifest.width}
    by_zarr, by_memmap = (eval(line.replace("layer_12", "layer_03"), dict(names)) for line in found.groups())
    assert by_zarr.shape == (names["n"], names["D"])
    assert np.array_equal(by_zarr, by_memmap)


def test_the_lines_of_python_in_the_readme_run(
    tiny_cache: Cache, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """On a cache, an LM and an SAE that are smaller than the demo's; what else they say is run as it stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "shards").symlink_to(tiny_cache.path)
    flags = {"cache": "demo/shards", "out": "demo/saes", "name": "topk_layer15_4608_k64", "sae": "topk"}
    train(settings_of({**flags, "layer": 3, "latents": 64, "k": 8}))
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 10
    smaller = {"[15]": "[3]", "1924": "7", "layer=15": "layer=3", "latents=2304, k=32": "latents=64, k=8"}
    smaller |= {'load_lm("demo")': f'load_lm("{tiny_model}")'}
    for demo, tiny in smaller.items():
        assert demo in code
        code = code.replace(demo, tiny)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["latents"].dense().shape == (int(names["document"].kept.sum()), 64)
    assert (tmp_path / "demo" / "more").is_dir()
    assert "latents (activation" in capsys.readouterr().out


def examples() -> list[str]:
    """Every command that a page or an example file shows, without its comment."""
    lines = [line for page in PAGES for line in page.read_text().replace("\\\n", " ").splitlines()]
    shown = [line for line in lines if re.match(r"\s+(torchrun .*-m )?routesae ", line)]
    for file in sorted((ROOT / "examples").glob("*.toml")):
        shown += [line.partition(": ")[2] for line in file.read_text().splitlines() if ": routesae " in line]
    commands = [line.partition("routesae ")[2].partition(" #")[0].strip(" \\") for line in shown]
    return sorted({command for command in commands if not re.search(r"[<>…$|]|\.\.\.", command)})


@pytest.mark.parametrize("line", examples())
def test_the_commands_that_are_shown_are_commands(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
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


def tables() -> list[Any]:
    """Every TOML file that a page shows, of a pass of training or of `routesae run`."""
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, text in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL))
    ]


@pytest.mark.parametrize("text", tables())
def test_the_files_that_are_shown_are_read(text: str, tmp_path: Path) -> None:
    file = tmp_path / "shown.toml"
    file.write_text(text)
    if "[harvest]" in text:
        assert read_pipeline(str(file))
    else:
        assert settings_of({}, str(file)).runs
