"""Commands whose options are made from Settings classes, and how a failed one ends: one line and an exit code."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from routesae.reporting import FailedRun, Stopped, WrongInput

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from routesae.machine.settings import Settings, Shown

FIRST = ("Model and corpus", "What is kept", "The dictionary", "This variant only", "Optimiser")  # groups of --help
LAST = "The run"
WATCH, BLOCKS, JSON = "console.watch:Watch", "harvest.cache.settings:BlockOptions", "console.options:JsonFile"
CONFIG, PIPELINE, DRY_RUN = (f"console.options:{name}" for name in ("ConfigFile", "PipelineFile", "DryRun"))
LONGEST_CHOICES = 28  # characters; longer lists of choices stand in the help text


def imported(path: str) -> Any:
    """What "module:name", below routesae, names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"routesae.{module}"), name)


class SettingsCommand(click.Command):
    """A command whose options are the fields of Settings classes.

    It builds settings of the first class, calls the room with them, and gives the callback both. Without a room to
    call, the callback gets the settings; without classes of a room, the flags. Classes and room are imported when
    they are needed, so that `routesae --help` waits for none.
    """

    def __init__(self, *args: Any, settings: tuple[str, ...], room: str | None, hidden: tuple[str, ...], **rest: Any):
        super().__init__(*args, **rest)
        self.settings, self.room, self.without = settings, room, hidden

    @cached_property
    def generated(self) -> dict[str, tuple[str, click.Parameter]]:
        """Group and option of every setting, by field."""
        from routesae.machine.settings import described

        found: dict[str, tuple[str, click.Parameter]] = {}
        for path in self.settings:
            of = imported(path)
            for field, (info, shown) in described(of).items():
                if field not in self.without and field not in found:
                    found[field] = shown.group, make_option(of, field, info, shown)
        return found

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*(option for _, option in self.generated.values()), *super().get_params(ctx)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options in the groups of their settings."""
        options = [*self.generated.values(), *((LAST, option) for option in super().get_params(ctx))]
        options = [(group, option) for group, option in options if isinstance(option, click.Option)]
        names = [*FIRST, *(group for group, _ in options if group != LAST), LAST]
        for name in dict.fromkeys(names):
            rows = [option.get_help_record(ctx) for group, option in options if group == name]
            if shown := [row for row in rows if row]:
                with formatter.section(name):
                    formatter.write_dl(shown)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example, on a line of its own however long it is, to be copied whole."""
        formatter.write(f"\nExample:\n  {self.epilog}\n")

    def typed(self, ctx: click.Context) -> dict[str, Any]:
        """The flags that were given, on the command line or in the environment."""
        typed = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
        return {name: value for name, value in ctx.params.items() if ctx.get_parameter_source(name) in typed}

    def invoke(self, ctx: click.Context) -> Any:
        from routesae.console.options import DryRun, JsonFile, set_up, taken, watching
        from routesae.machine.files import write_json

        flags = self.typed(ctx)
        set_up(ctx, flags)
        assert self.callback is not None
        if not self.settings or self.settings[0] in (WATCH, BLOCKS):
            return ctx.invoke(self.callback, **flags)
        file, more = JsonFile(**taken(JsonFile, flags)).json_file, taken(DryRun, flags)
        settings = imported(self.settings[0]).from_flags(flags)
        if self.room is None:
            return ctx.invoke(self.callback, settings, **more)
        run = imported(self.room)
        with watching(settings) as report:
            result = run(settings, report)
        if file is not None:
            write_json(file, result)
        return ctx.invoke(self.callback, settings, result)


def make_option(of: type[Settings], field: str, info: FieldInfo, shown: Shown) -> click.Parameter:
    """The option, or argument, of one setting. It takes text; the settings class says what is wrong with it."""
    from routesae.machine.settings import flag_of, kind_of

    kind, several = kind_of(info)
    if shown.positional:
        return click.Argument([field], help=str(info.description))
    flag, text = flag_of(of, field), str(info.description)
    choices = "|".join(shown.choices)
    if len(choices) > LONGEST_CHOICES:
        text = f"{text[:-1]}: {', '.join(shown.choices)}."
        choices = ""
    if shown.only_for:
        text = f"{shown.only_for}: {text}"
    default = shown.unset if info.default in (None, ()) else default_text(info.default, several)
    if default is not None and not info.is_required():
        text += f"  [default: {default}]"
    if kind is bool:
        flags = flag if info.default is False else f"{flag}/--no-{flag[2:]}"
        return click.Option([flags, field], is_flag=True, default=None, help=text, envvar=shown.env)
    metavar = choices or shown.metavar or {int: "N", float: "X"}.get(kind, "TEXT")
    repeated = shown.swept or (several and kind not in (int, float))
    return click.Option(
        [flag, field], metavar=metavar + "..." * repeated, multiple=repeated, help=text, envvar=shown.env
    )


def default_text(value: Any, several: bool) -> str | None:
    """A default as one would type it: 10M for 10,000,000; None for what needs no words."""
    if several:
        return ", ".join(map(str, value)) or None
    if isinstance(value, bool) or value == "":
        return None
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        for factor, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
            if value >= 10_000 and value % factor == 0:
                return f"{value // factor}{suffix}"
    return str(value)


def command(
    group: click.Group, *settings: str, run: str | None = None, hidden: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], SettingsCommand]:
    """Make a function a command of the group. The last line of its docstring is an example of its use.

    settings: "module:Class" of each class whose fields are its options; hidden: fields that are not options here.
    run: "module:function" of the room.
    """

    def decorate(function: Callable[..., None]) -> SettingsCommand:
        text, _, example = inspect.cleandoc(str(function.__doc__)).partition("\n\nExample: ")
        more: dict[str, Any] = {"settings": settings, "room": run, "hidden": hidden, "help": text, "epilog": example}
        made = click.command(cls=SettingsCommand, **more)(function)
        group.add_command(made)
        return made

    return decorate


class Commands(click.Group):
    """Turns what goes wrong into one line and an exit code: 2 wrong input, 1 failed run, 130 Ctrl-C, 143 SIGTERM."""

    def main(self, *args: Any, **more: Any) -> Any:
        """Run, and end as a program does."""
        try:
            code = super().main(*args, **{**more, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.ClickException as error:
            context, meant = getattr(error, "ctx", None), getattr(error, "possibilities", None)
            text = error.message if meant else error.format_message()
            remedy = f"; did you mean {meant[0]!r}?" if meant else ""
            if context and not meant:
                remedy = f"; `{context.command_path} --help` lists what there is"
            self.end(context, text[:1].lower() + text[1:].rstrip(".") + remedy, 2)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        from routesae.console.watch import Terminated

        try:
            return super().invoke(ctx)
        except WrongInput as error:
            self.end(ctx, error, 2)
        except Stopped as error:
            self.end(ctx, error, error.code)
        except (FailedRun, OSError) as error:
            self.end(ctx, error, 1)
        except Terminated as error:
            self.end(ctx, f"{error}; the same command begins again, harvest and train where they stood", 143)
        except KeyboardInterrupt:
            self.end(ctx, "stopped; the same command goes on where harvest stood, train with --resume", 130)

    def end(self, ctx: click.Context | None, message: object, code: int) -> None:
        """Say on standard error what ended the program. An empty message: another process of the run says it."""
        from routesae.console.watch import Watch, message_of

        if str(message):
            watch = ctx.find_root().obj if ctx else None
            click.echo(message_of(watch or Watch(), message, code), err=True)
        sys.exit(code)
