"""The options that commands share beside their own settings, and how long runs are watched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from routesae.console.watch import Watch, configure_logging, status_in, watched
from routesae.machine.settings import RUN, Settings, setting
from routesae.reporting import Report, WrongInput


class BlockOptions(Settings):
    """What this process may keep on disk of what it reads from object stores."""

    cache_dir: str | None = setting(
        None,
        group=RUN,
        help="Where blocks read from an object store, and shards on their way to one, are kept.",
        metavar="PATH",
        env="ROUTESAE_CACHE_DIR",
        unset="routesae in the user's cache folder",
    )
    cache_bytes: int | None = setting(
        None,
        group=RUN,
        help="Bytes of blocks that a process keeps there, such as 500M or 20B (billion).",
        ge=1,
        env="ROUTESAE_CACHE_BYTES",
        unset="10B",
    )


class JsonFile(Settings):
    """Where results go beside the terminal."""

    json_file: str | None = setting(
        None, group=RUN, help="Write the results to this file too, for programs.", flag="json", metavar="PATH"
    )

    def check(self) -> None:
        if self.json_file is not None and not Path(self.json_file).absolute().parent.is_dir():
            folder = Path(self.json_file).parent
            raise WrongInput(f"--json {self.json_file}: there is no folder {folder} to write it to")


class ConfigFile(Settings):
    """A TOML file of settings."""

    config: str | None = setting(
        None, group=RUN, help="TOML file with the names of these flags; flags win.", metavar="PATH"
    )


class PipelineFile(Settings):
    """The TOML file of `routesae run`."""

    config: str = setting(group=RUN, help="TOML file with a table a stage, of its flags.", metavar="PATH")


class DryRun(Settings):
    """Whether to ask at all."""

    dry_run: bool = setting(False, group=RUN, help="Only show the prompts and about what they would cost.")


def take_run_options(ctx: click.Context, flags: dict[str, Any]) -> dict[str, Any]:
    """Act on the flags of Watch and BlockOptions, which hold for the whole process; returns the others."""
    seen = {name: flags.pop(name) for name in Watch.model_fields if name in flags}
    kept = BlockOptions(**{name: flags.pop(name) for name in BlockOptions.model_fields if name in flags})
    root = ctx.find_root()
    root.obj = (root.obj or Watch()).replace(**seen)
    configure_logging(root.obj)
    if kept.cache_dir is not None or kept.cache_bytes is not None:
        from dataclasses import replace

        from routesae.harvest.cache.store import blocks

        before = blocks.chosen()
        folder = before.folder if kept.cache_dir is None else Path(kept.cache_dir)
        blocks.choose(replace(before, folder=folder, limit=kept.cache_bytes or before.limit))
    return flags


def watching(status: Path | None = None) -> AbstractContextManager[Report]:
    """What the running command reports to. status: the file it keeps where --status names no other."""
    ctx = click.get_current_context()
    return watched(ctx.find_root().obj or Watch(), str(ctx.info_name), status)


def status_of(saes: Sequence[str], out: str) -> Path | None:
    """The status file of a command that writes into SAE folders: in the one it is about, or where they all are."""
    return status_in(saes[0] if len(saes) == 1 and Path(saes[0]).is_dir() else out)
