"""Commands whose options are made from Settings classes, and how a failed one ends: one line and an exit code."""

import importlib
import inspect
import select
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import click
from click.core import ParameterSource

from routesae.console.options import DryRun, JsonFile, Watch
from routesae.console.terminal import Styled, echo, styled
from routesae.machine.settings import DICTIONARY, KEPT, MODEL, OPTIMISER, RUN, VARIANT, Setting, Settings, flag_of
from routesae.machine.stop import Terminated
from routesae.reporting import FailedRun, Report, Stopped, WrongInput, is_out_of_memory, shortened

FIRST, LAST = (MODEL, KEPT, DICTIONARY, VARIANT, OPTIMISER), RUN  # groups of --help
BLOCKS, WATCH, JSON = "harvest.cache.settings:BlockOptions", "console.options:Watch", "console.options:JsonFile"
CONFIG, PIPELINE, DRY_RUN = (f"console.options:{name}" for name in ("ConfigFile", "PipelineFile", "DryRun"))
BATCHES = ("batch_sequences", "batch_tokens", "max_memory")  # what takes less memory where it is lower
LONGEST_CHOICES = 28  # characters; longer lists of choices stand in the help text
LONGEST_MESSAGE = 2_000  # characters
HUNG_UP = 141  # what a shell says of a program that SIGPIPE ended


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
        found: dict[str, tuple[str, click.Parameter]] = {}
        for of in map(imported, self.settings):
            for field, one in of.described.items():
                if field not in self.without and field not in found:
                    found[field] = one.group, make_option(of, field, one)
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
                with formatter.section(styled(name, bold=True)):
                    formatter.write_dl(shown)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example, on a line of its own however long it is, to be copied whole."""
        formatter.write(f"\n{styled('Example', bold=True)}:\n  {self.epilog}\n")

    def typed(self, ctx: click.Context) -> dict[str, Any]:
        """The flags that were given, on the command line or in the environment."""
        typed = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
        return {name: value for name, value in ctx.params.items() if ctx.get_parameter_source(name) in typed}

    def invoke(self, ctx: click.Context) -> Any:
        from routesae.machine.files import as_json, write_json

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
        if file == "-":
            return echo(*as_json(result).split("\n"))
        try:
            if file is not None:
                write_json(file, result)
        finally:  # shown, too, where the disk does not take the file
            ctx.invoke(self.callback, settings, result)


def taken(of: type[Settings], flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that belong to a class, taken out of the others."""
    return {name: flags.pop(name) for name in list(flags) if name in of.described}


def set_up(ctx: click.Context, flags: dict[str, Any]) -> None:
    """Act on the flags of Watch and BlockOptions, which hold for the whole process, and take them out."""
    from routesae.console.watch import configure_logging
    from routesae.harvest.cache.settings import BlockOptions

    root, kept = ctx.find_root(), taken(BlockOptions, flags)
    root.obj |= taken(Watch, flags)
    configure_logging(Watch(**root.obj))
    if kept:
        from routesae.harvest.cache.store import blocks

        blocks.options = blocks.options.replace(**kept)


def watching(settings: Any = None) -> AbstractContextManager[Report]:
    """What the running command reports to. It keeps the status file that --status names, or that of its folder."""
    from routesae.console.watch import status_path, watched

    ctx = click.get_current_context()
    command = str(ctx.info_name)
    return watched(Watch(**ctx.find_root().obj), command, status_path(command, settings))


def make_option(of: type[Settings], field: str, one: Setting) -> click.Parameter:
    """The option, or argument, of one setting. It takes text; the settings class says what is wrong with it."""
    kind, several, _ = of.kinds[field]
    if one.positional:
        return click.Argument([field], help=one.help)
    flag, text, choices = flag_of(of, field), one.help, "|".join(one.choices)
    if len(choices) > LONGEST_CHOICES:
        text = f"{text[:-1]}: {', '.join(one.choices)}."
        choices = ""
    if one.only_for:
        text = f"{one.only_for}: {text}"
    default = one.unset if one.default in (None, ()) else default_text(one.default, several)
    if default is not None and one.default is not ...:
        text += f"  [default: {default}]"
    if kind is bool:
        flags = flag if one.default is False else f"{flag}/--no-{flag[2:]}"
        return click.Option([flags, field], is_flag=True, default=None, help=text, envvar=one.env)
    metavar = choices or one.metavar or {int: "N", float: "X"}.get(kind, "TEXT")
    repeated = one.swept or (several and kind not in (int, float) and not one.commas)
    return click.Option(
        [flag, field], metavar=metavar + "..." * repeated, multiple=repeated, help=text, envvar=one.env
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
        stdout = sys.stdout
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # one of latin-1 has no ℓ
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
        except click.Abort:
            self.end(None, "stopped", 130)
        except SystemExit:
            if sys.stdout is not stdout:  # click saw that its reader hung up, as that of `routesae … | head` does
                sys.exit(HUNG_UP)
            raise
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except WrongInput as error:
            self.end(ctx, error, 2)
        except Stopped as error:
            self.end(ctx, error, error.code)
        except (FailedRun, OSError) as error:
            if isinstance(error, BrokenPipeError) and hung_up():
                raise
            self.end(ctx, error, 1)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            options = getattr(self.commands[str(ctx.invoked_subcommand)], "generated", {})
            flags = [options[field][1].opts[0] for field in BATCHES if field in options] or ["what it has to hold"]
            self.end(ctx, f"out of memory: lower {' or '.join(flags)} ({shortened(str(error).split(chr(10))[0])})", 1)
        except Terminated as error:
            self.end(ctx, f"{error}; the same command begins again, harvest and train where they stood", 143)
        except KeyboardInterrupt:
            self.end(ctx, "stopped; the same command goes on where harvest stood, train with --resume", 130)

    def end(self, ctx: click.Context | None, message: object, code: int) -> None:
        """Say on standard error what ended the program. An empty message: another process of the run says it."""
        text = shortened(str(message), LONGEST_MESSAGE)
        if text and ctx and (ctx.find_root().obj or {}).get("log_json"):
            from routesae.console.watch import json_line

            level = "warning" if code in (0, 130, 143) else "error"
            echo(json_line(level, text, exit_code=code), err=True)
        elif text:
            echo(Styled(styled("routesae:", sys.stderr, fg="red", bold=True) + styled(f" {text}")), err=True)
        sys.exit(code)


def hung_up() -> bool:
    """Whether nobody reads standard output any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout, 0)
        return bool(poll.poll(0))
    except (OSError, ValueError):  # it is no file, or a closed one
        return False
