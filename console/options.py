"""The options that commands have beside the settings of their room, and what these set up before it is called."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from routesae.console.watch import Watch, configure_logging, status_beside, status_in, watched
from routesae.machine.settings import RUN, Settings, setting
from routesae.reporting import Report, WrongInput


class JsonFile(Settings):
    """Where results go beside the terminal."""

    json_file: str | None = setting(
        None, RUN, "Write the results to this file too, for programs.", flag="json", metavar="PATH"
    )

    def check(self) -> None:
        if self.json_file is not None and not Path(self.json_file).absolute().parent.is_dir():
            folder = Path(self.json_file).parent
            raise WrongInput(f"--json {self.json_file}: there is no folder {folder} to write it to")


class ConfigFile(Settings):
    """A TOML file of settings."""

    config: str | None = setting(None, RUN, "TOML file with the names of these flags; flags win.", metavar="PATH")


class PipelineFile(Settings):
    """The TOML file of `routesae run`."""

    config: str = setting(..., RUN, "TOML file with a table a stage, of its flags.", metavar="PATH")

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> Any:
        """The settings of the stages that the file names."""
        from routesae.analyze.pipeline.settings import read_pipeline

        return read_pipeline(cls(**flags).config)


class DryRun(Settings):
    """Whether to ask at all."""

    dry_run: bool = setting(False, RUN, "Only show the prompts and about what they would cost.")


def taken(of: type[Settings], flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that belong to a class, taken out of the others."""
    return {name: flags.pop(name) for name in list(flags) if name in of.model_fields}


def set_up(ctx: click.Context, flags: dict[str, Any]) -> None:
    """Act on the flags of Watch and BlockOptions, which hold for the whole process, and take them out."""
    from routesae.harvest.cache.settings import BlockOptions

    root, kept = ctx.find_root(), taken(BlockOptions, flags)
    root.obj = (root.obj or Watch()).replace(**taken(Watch, flags))
    configure_logging(root.obj)
    if kept:
        from routesae.harvest.cache.store import blocks

        blocks.options = blocks.options.replace(**kept)


def watching(settings: Any = None) -> AbstractContextManager[Report]:
    """What the running command reports to. It keeps the status file that --status names, or that of its folder."""
    ctx = click.get_current_context()
    return watched(ctx.find_root().obj or Watch(), str(ctx.info_name), status_of(str(ctx.info_name), settings))


def status_of(command: str, settings: Any) -> Path | None:
    """The status file of a command that fills a folder, or None."""
    match command:
        case "harvest":
            return status_beside(settings.out, settings.worker)
        case "train" if os.environ.get("RANK", "0") != "0":  # of torchrun's processes, the first reports for all
            return None
        case "contexts" | "interpret" if len(settings.saes) == 1 and Path(settings.saes[0]).is_dir():
            return status_in(settings.saes[0])
        case "train" | "ablation" | "contexts" | "interpret" | "run":
            return status_in(settings.out)
    return None
