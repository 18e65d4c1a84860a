"""The options that mean the same in several commands, and how those commands are watched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from routesae.console.terminal import COUNT
from routesae.console.watch import Watch, configure_logging, status_in, watched
from routesae.reporting import Report, WrongInput


def watch_as(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Note in the outermost context how the run wants to be watched."""
    root = ctx.find_root()
    if value and parameter.name is not None:
        root.obj = replace(root.obj or Watch(), **{parameter.name: value})
        configure_logging(root.obj)


def keep_blocks(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    """--cache-dir and --cache-bytes hold for the whole process, whatever the command then opens."""
    if value is not None:
        from routesae.harvest.cache.store import blocks

        name = {"cache_dir": "folder", "cache_bytes": "limit"}[str(parameter.name)]
        blocks.choose(replace(blocks.chosen(), **{name: value}))


QUIET = click.option(
    "--quiet", is_flag=True, expose_value=False, callback=watch_as, help="Only warnings, errors and results."
)
LOG_JSON = click.option(
    "--log-json",
    "as_json",
    is_flag=True,
    expose_value=False,
    callback=watch_as,
    help="Log and progress on standard error as a JSON object a line.",
)
STATUS = click.option(
    "--status",
    type=click.Path(path_type=Path),
    expose_value=False,
    callback=watch_as,
    help="File that says in JSON how far the run is; where a folder is filled, its status.json does so anyway.",
)
SAES = click.option(
    "--sae",
    "saes",
    multiple=True,
    type=click.Path(),
    help="SAE folder, or user/repo[/folder][@revision] on the hub; may be given several times.  "
    "[default: all under --out]",
)
SAES_FOLDER = click.option("--out", default="saes", type=click.Path(), help="Folder of SAE folders.")
CACHE_DIR = click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    envvar="ROUTESAE_CACHE_DIR",
    expose_value=False,
    callback=keep_blocks,
    help="Where blocks read from an object store, and shards on their way to one, are kept.  "
    "[default: routesae in the user's cache folder]",
)
CACHE_BYTES = click.option(
    "--cache-bytes",
    type=COUNT,
    envvar="ROUTESAE_CACHE_BYTES",
    expose_value=False,
    callback=keep_blocks,
    help="Bytes of blocks that a process keeps there, such as 500M or 20B (billion).  [default: 10B]",
)
CACHE_FOLDER = click.option("--cache", default="shards", type=click.Path(), help="Folder or URL that harvest wrote.")


def CACHE(command: Any) -> Any:  # noqa: N802  # an option as those above
    """A cache, and where what of it comes from an object store is kept."""
    return CACHE_FOLDER(CACHE_DIR(CACHE_BYTES(command)))


def long_run(command: Any) -> Any:
    """The options of every command that may take a while."""
    return QUIET(LOG_JSON(STATUS(command)))


def watching(status: Path | None = None) -> AbstractContextManager[Report]:
    """What the running command reports to. status: the file it keeps where --status names no other."""
    ctx = click.get_current_context()
    watch = ctx.find_root().obj or Watch()
    if watch.status is not None and not watch.status.absolute().parent.is_dir():
        raise WrongInput(f"--status {watch.status}: there is no folder {watch.status.parent} to write it to")
    return watched(watch, str(ctx.info_name), status)


def status_of(saes: Sequence[str], out: str) -> Path | None:
    """The status file of a command that writes into SAE folders: in the one it is about, or where they all are."""
    return status_in(saes[0] if len(saes) == 1 and Path(saes[0]).is_dir() else out)
