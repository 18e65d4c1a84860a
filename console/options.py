"""The options that commands have beside the settings of their room."""

from typing import Any

from routesae.machine.settings import RUN, Settings, require_writable, setting


class Watch(Settings):
    """How a run is watched."""

    quiet: bool = setting(False, RUN, "Only warnings, errors and results.")
    log_json: bool = setting(False, RUN, "Log and progress on standard error as a JSON object a line.")
    status: str | None = setting(
        None,
        RUN,
        "File that says in JSON how far the run is.",
        metavar="PATH",
        unset="status.json in the folder that is filled",
    )

    def check(self) -> None:
        require_writable("--status", self.status)


class JsonFile(Settings):
    """Where results go beside the terminal."""

    json_file: str | None = setting(
        None, RUN, "Write the results to this file too; - prints them instead.", flag="json", metavar="PATH"
    )

    def check(self) -> None:
        require_writable("--json", None if self.json_file == "-" else self.json_file)


class ConfigFile(Settings):
    """A TOML file of settings."""

    config: str | None = setting(None, RUN, "TOML file with the names of these flags; flags win.", metavar="PATH")


class PipelineFile(Settings):
    """The TOML file of `routesae run`."""

    config: str = setting(..., RUN, "TOML file with a table a stage, of its flags.", metavar="PATH")
    follow: bool = setting(False, RUN, "Train while the harvest runs, in two processes.")

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> Any:
        """The settings of the stages that the file names."""
        from routesae.analyze.pipeline.settings import read_pipeline

        return read_pipeline(**vars(cls(**flags)))


class DryRun(Settings):
    """Whether to ask at all."""

    dry_run: bool = setting(False, RUN, "Only show the prompts and about what they would cost.")
