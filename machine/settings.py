"""One definition of a setting. Flags, `--help`, TOML keys, messages and what results record are all made from it.

    class HarvestSettings(Settings):
        context: int = setting(512, group=CORPUS, help="Tokens in a row, that is, a sequence of the LM.", ge=2)

A field's type says what it takes: int (also "200k", "10M", "20B"), float, bool, str, or a tuple
of these (a flag given several times, or numbers as "128,512"); `| None` where leaving it out means something.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import PurePath
from types import NoneType
from typing import Annotated, Any, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from routesae.machine.files import read_bytes
from routesae.reporting import WrongInput

MODEL, KEPT, DICTIONARY = "Model and corpus", "What is kept", "The dictionary"
VARIANT, OPTIMISER, RUN = "This variant only", "Optimiser", "The run"
SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9}
LARGEST_COUNT = 10**15
TYPES = {"int_type": "a whole number", "float_type": "a number", "finite_number": "a finite number"}
TYPES |= {"bool_type": "true or false", "string_type": "text", "tuple_type": "a list"}
BOUNDS = {"greater_than_equal": "below", "greater_than": "not above", "less_than_equal": "above"}
BOUNDS |= {"less_than": "not below"}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """How a setting appears to users.

    flag: its spelling where that is not the field's name; "" for a setting that has no flag.
    choices: the words it may be. unset: what None comes to, in words. only_for: the variant or trait that has it.
    instead_of: the setting that says the same in another unit; at most one of the two is given.
    swept: it may be given several times, and every combination is trained.
    """

    group: str
    flag: str | None = None
    metavar: str | None = None
    unset: str | None = None
    only_for: str | None = None
    instead_of: str | None = None
    choices: Collection[str] = ()
    swept: bool = False
    env: str | None = None
    positional: bool = False


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    **shown: Any,
) -> Any:
    """A field of a Settings class. ge, gt, le and lt are its bounds; the rest goes to Shown."""
    extra: dict[str, Any] = {"shown": Shown(group=group, **shown)}
    return Field(default, description=help, ge=ge, gt=gt, le=le, lt=lt, json_schema_extra=extra)


# Settings that mean the same in several commands.
DEVICE = setting("auto", RUN, "Where it computes.", metavar="auto|cpu|cuda[:i]")
SEED = setting(0, RUN, "Seed of everything that is drawn at random.", ge=0, lt=2**32)
LM_DTYPE = setting(
    "auto",
    RUN,
    "Precision of the LM; auto is bfloat16 where the device is fast at it.",
    choices=("auto", "float32", "bfloat16"),
)
CACHE = setting("shards", MODEL, "Folder or URL that harvest wrote.", metavar="PATH")
OUT = setting("saes", RUN, "Folder of SAE folders.", metavar="PATH")
SAES = setting(
    (),
    MODEL,
    "SAE folder, or user/repo[/folder][@revision] on the hub.",
    unset="all under --out",
    flag="sae",
    metavar="PATH",
)


class Settings(BaseModel):
    """Settings of one command. Constructing one with a wrong or unknown value raises WrongInput, in one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise WrongInput(_message(type(self), error.errors()[0])) from None
        for name, (_, shown) in described(type(self)).items():
            if shown.instead_of and getattr(self, name) is not None and getattr(self, shown.instead_of) is not None:
                both = [f"{flag_of(type(self), one)} {getattr(self, one)}" for one in (name, shown.instead_of)]
                raise WrongInput(f"{' and '.join(both)} exclude each other; give one of them")
        self.check()

    def check(self) -> None:
        """Raise WrongInput where values that are fine alone do not go together."""

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> Self:
        """Settings from flags by field name, as typed."""
        return cls(**flags)

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its name, as JSON can hold it."""
        return self.model_dump()

    def replace(self, **changes: Any) -> Self:
        """The same settings with some changed, checked again."""
        return type(self)(**{**dict(self), **changes})

    @field_validator("*", mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: ValidationInfo) -> Any:
        """What a command line or a TOML file holds, as the field's type: "10M" is 10,000,000, "16,32" is (16, 32)."""
        name = str(info.field_name)
        kind, several = kind_of(cls.model_fields[name])
        choices = described(cls)[name][1].choices if name in described(cls) else ()
        if value is None or not several:
            return _read(value, kind, choices)
        if isinstance(value, str) and kind in (int, float):
            value = value.split(",")
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_read(item, kind, choices) for item in items)


def _read(value: Any, kind: Any, choices: Collection[str]) -> Any:
    if isinstance(value, PurePath) and kind is str:
        return str(value)
    if isinstance(value, str) and choices and value not in choices:
        raise ValueError(not_one_of(value, choices))
    if isinstance(value, str) and kind is int:
        return read_count(value)
    if isinstance(value, str) and kind is float:
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{value!r} is not a number") from None
    return value


def read_count(text: str) -> int:
    """200000, 200k, 10M or 1.5B as a number. Raises ValueError for anything else."""
    number, factor = text.strip().lower(), 1
    if number and number[-1] in SUFFIXES:
        number, factor = number[:-1], SUFFIXES[number[-1]]
    try:
        count = Decimal(number) * factor  # exact: 16.1k is 16,100, and as a float it is not
        if count == int(count) and abs(count) <= LARGEST_COUNT:
            return int(count)
    except (InvalidOperation, OverflowError, ValueError):
        pass
    raise ValueError(f"{text!r} is not a whole number such as 200000, 200k or 10M")


def kind_of(info: FieldInfo) -> tuple[Any, bool]:
    """A field's type without `| None`, or the type of its items, and whether it is a tuple of them."""
    kinds = [kind for kind in get_args(info.annotation) if kind is not NoneType]
    kind = kinds[0] if NoneType in get_args(info.annotation) else info.annotation
    if get_origin(kind) is not tuple:
        return kind, False
    item = get_args(kind)[0]
    return (get_args(item)[0] if get_origin(item) is Annotated else item), True


def described(of: type[Settings]) -> dict[str, tuple[FieldInfo, Shown]]:
    """The settings of a class that users see, by field."""
    fields = of.model_fields.items()
    return {name: (info, info.json_schema_extra["shown"]) for name, info in fields if info.json_schema_extra}  # type: ignore


def flag_of(of: type[Settings], name: str) -> str:
    """How users write a setting: --checkpoint-every, or FILE for an argument."""
    shown = described(of)[name][1] if name in described(of) else Shown(group="")
    return name.upper() if shown.positional else "--" + (shown.flag or name.replace("_", "-"))


def _message(of: type[Settings], error: Any) -> str:
    """One line of what is wrong, from pydantic's account of it."""
    name, value, kind, context = str(error["loc"][0]), error["input"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown(name, of.model_fields)
    flag = flag_of(of, name)
    if kind == "missing":
        return f"{flag} is missing"
    if kind == "value_error":
        return str(context["error"]) if isinstance(context["error"], WrongInput) else f"{flag} {context['error']}"
    if kind in BOUNDS:
        return f"{flag} {value:.10g} is {BOUNDS[kind]} {next(iter(context.values())):.10g}"
    return f"{flag} {value!r} is not {TYPES.get(kind, error['msg'])}"


def not_one_of(value: object, choices: Collection[str]) -> str:
    """Complain of a word that is none of the choices, and name the one that was perhaps meant."""
    meant = difflib.get_close_matches(str(value), choices, n=1)
    return f"{value!r} is none of {', '.join(choices)}" + (f"; did you mean {meant[0]!r}?" if meant else "")


def unknown(name: str, names: Collection[str]) -> str:
    """Complain of a setting that does not exist."""
    meant = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {meant[0]!r}?" if meant else f"the settings are {', '.join(sorted(names))}"
    return f"unknown setting {name!r}; {remedy}"


def read_toml(path: str) -> dict[str, Any]:
    """The TOML file of --config. Raises WrongInput where it cannot be read."""
    try:
        return tomllib.loads(read_bytes(path).decode())
    except FileNotFoundError:
        raise WrongInput(f"--config {path} does not exist") from None
    except RecursionError:
        raise WrongInput(f"--config {path} cannot be read: nested too deeply") from None
    except (OSError, ValueError) as error:  # ValueError: not TOML, not text, too large, or not a regular file
        raise WrongInput(f"--config {path} cannot be read: {error}") from error


def by_field(table: Mapping[str, Any], where: str, *classes: type[Settings]) -> dict[str, Any]:
    """The values of a TOML table by the names of fields. Keys are spelled as flags are, with - or _.

    Raises WrongInput for a key that is not a setting of the classes. where: what messages call the table.
    """
    names = {name.replace("_", "-"): name for of in classes for name in described(of)}
    names |= {flag_of(of, name).lstrip("-"): name for of in classes for name in described(of)}
    for key in table:
        if key.replace("_", "-") not in names:
            raise WrongInput(f"{where}: {unknown(key, names)}")
    return {names[key.replace("_", "-")]: value for key, value in table.items()}
