"""The site builds without a warning, and says of every command what the command says of itself."""

from __future__ import annotations

import html
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import routesae
from routesae.cli import main

ROOT = Path(__file__).resolve().parent.parent


def build(out: Path) -> subprocess.CompletedProcess[str]:
    """Not --quiet, which counts no warnings."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Any warning, such as a link that leads nowhere, is an error."""
    out = tmp_path_factory.mktemp("site")
    built = build(out)
    assert (built.returncode, built.stdout) == (0, ""), built.stderr
    return out


def commands() -> dict[str, click.Command]:
    """Every command, by the name of its page."""
    found: dict[str, click.Command] = {}
    for name, command in main.commands.items():
        if isinstance(command, click.Group):
            found |= {f"{name}-{inner}": one for inner, one in command.commands.items()}
        else:
            found[name] = command
    return found


@pytest.mark.parametrize("name", commands())
def test_a_command_has_a_page_with_every_flag_that_it_takes(name: str, site: Path) -> None:
    command = commands()[name]
    page = html.unescape((site / "reference" / "commands" / f"{name}.html").read_text())
    shown = [one for one in command.get_params(click.Context(command)) if "--help" not in one.opts]
    names = [one.opts[0] if isinstance(one, click.Option) else str(one.name).upper() for one in shown]
    assert [name for name in names if f"<code>{name}" not in page] == []
    assert command.epilog
    assert command.epilog in page


def test_every_name_of_the_api_has_its_paragraphs(site: Path) -> None:
    page = (site / "reference" / "api.html").read_text()
    assert [name for name in routesae.API if f'id="routesae.api.{name}"' not in page] == []


def test_nothing_of_the_site_is_loaded_from_elsewhere(site: Path) -> None:
    first = (site / "index.html").read_text()
    assert 'src="http' not in first
    assert 'rel="stylesheet" href="http' not in first
