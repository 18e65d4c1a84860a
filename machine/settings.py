"""One definition of a setting. Flags, `--help`, TOML keys, messages and what results record are all made from it.

    class HarvestSettings(Settings):
        context: int = setting(512, CORPUS, "Tokens in a row, that is, a sequence of the LM.", ge=2)

A field's type says what it takes: int (also "200k", "10M", "20B"), float, bool, str, or a tuple
of these (a flag given several times, or numbers as "128,512"); `| None` where leaving it out means something.
pydantic checks the values. It is imported with the first of them, because `--help` has no time for it.
"""

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, MISSING, asdict, dataclass, field, fields
from pathlib import Path, PurePath
from types import NoneType
from typing import Annotated, Any, ClassVar, NamedTuple, Self, get_args, get_origin, get_type_hints

from routesae.machine.files import read_bytes, reading
from routesae.reporting import WrongInput, shortened

MODEL, KEPT, DICTIONARY = "Model and corpus", "What is kept", "The dictionary"
VARIANT, OPTIMISER, RUN = "This variant only", "Optimiser", "The run"
SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
LARGEST_COUNT = 10**15
LARGEST_TOML_BYTES, MOST_DOTS = 1 << 18, 200  # tomllib takes the square of a dotted key's length
TYPES = {"int_type": "a whole number", "float_type": "a number", "finite_number": "a finite number"}
TYPES |= {"bool_type": "true or false", "string_type": "text", "tuple_type": "a list"}
BOUNDS = {"greater_than_equal": "below", "greater_than": "not above", "less_than_equal": "above"}
BOUNDS |= {"less_than": "not below"}


@dataclass(frozen=True)
class Setting:
    """A setting as users know it.

    flag: its spelling where that is not the field's name. choices: the words it may be. only_for: the variant or
    trait that has it. unset: what None comes to, in words; none: the word that says None.
    instead_of: the setting that it is an alternative to; at most one of the two is given. needs: the one without
    which it does nothing, and which must then be given too.
    swept: it may be given several times, and every combination is trained. commas: its words may be written as one,
    with commas between them. ge, gt, le, lt: its bounds.
    """

    default: Any  # ... for none
    group: str
    help: str
    _: KW_ONLY
    flag: str | None = None
    metavar: str | None = None
    unset: str | None = None
    none: str | None = None
    only_for: str | None = None
    instead_of: str | None = None
    needs: str | None = None
    choices: Collection[str] = ()
    swept: bool = False
    commas: bool = False
    env: str | None = None
    positional: bool = False
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None


def setting(default: Any, group: str, help: str, **more: Any) -> Any:
    """A Setting, as the value of a field of a Settings class."""
    return Setting(default, group, help, **more)


# Settings that mean the same in several commands.
DEVICE = setting("auto", RUN, "Where it computes.", metavar="auto|cpu|cuda[:i]")
SEED = setting(0, RUN, "Seed of everything that is drawn at random.", ge=0, lt=2**32)
LM_DTYPE = setting(
    "auto",
    RUN,
    "Precision of the LM; auto is the harvest's, and in harvest bfloat16 where the device is fast at it.",
    choices=("auto", "float32", "bfloat16"),
)
ROWS = ("held-out", "all")
CACHE = setting("shards", MODEL, "Folder or URL that harvest wrote.", metavar="PATH")
OUT = setting("saes", RUN, "Folder of SAE folders.", metavar="PATH")
SAE = "SAE folder, or user/repo[/folder][@revision] on the hub."
SAES = setting((), MODEL, SAE, unset="all under --out", flag="sae", metavar="PATH")
ONE_SAE = setting(None, MODEL, SAE, unset="the only one under --out", metavar="PATH")


class Kind(NamedTuple):
    """What a field takes: one, or a tuple, of a type, and perhaps None instead."""

    type: Any
    several: bool
    optional: bool


def kind_of(hint: Any) -> Kind:
    """The kind that a type hint says."""
    optional = NoneType in get_args(hint)
    kind = next(one for one in get_args(hint) if one is not NoneType) if optional else hint
    several = get_origin(kind) is tuple
    return Kind(get_args(kind)[0] if several else kind, several, optional)


class Settings:
    """Settings of one command. Constructing one with a wrong or unknown value raises WrongInput, in one line."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # each class below this one is a frozen dataclass
    checker: ClassVar[Any]  # the pydantic model of the fields, made when it is first needed
    kinds: ClassVar[dict[str, Kind]]  # of every field
    described: ClassVar[dict[str, Setting]]  # those that users see

    def __init_subclass__(cls) -> None:
        for name, value in list(vars(cls).items()):
            if isinstance(value, Setting):
                default = MISSING if value.default is ... else value.default
                setattr(cls, name, field(default=default, metadata={"setting": value}))
        dataclass(frozen=True, init=False)(cls)
        hints = get_type_hints(cls)
        cls.checker = None
        cls.kinds = {one.name: kind_of(hints[one.name]) for one in fields(cls)}
        cls.described = {one.name: one.metadata["setting"] for one in fields(cls) if one.metadata}

    def __init__(self, **values: Any) -> None:
        from pydantic import ValidationError

        of = type(self)
        try:
            of.checker = of.checker or _checker(of)
            checked = of.checker(**{name: _from_text(of, name, value) for name, value in values.items()})
        except ValidationError as error:
            raise WrongInput(_message(of, error.errors()[0])) from None
        vars(self).update(checked)
        given = {name for name, one in of.described.items() if getattr(self, name) != one.default}
        for name, one in of.described.items():
            if name in given and one.instead_of in given:
                both = [f"{flag_of(of, which)} {getattr(self, which)}" for which in (name, one.instead_of)]
                raise WrongInput(f"{' and '.join(both)} exclude each other; give one of them")
            if name in given and one.needs and one.needs not in given:
                without = f"{flag_of(of, name)} {getattr(self, name)} does nothing without {flag_of(of, one.needs)}"
                raise WrongInput(f"{without}; give that too, or leave it out")
        self.check()

    def check(self) -> None:
        """Raise WrongInput where values that are fine alone do not go together."""

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> Self:
        """Settings from flags by field name, as typed."""
        return cls(**flags)

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its name, as JSON can hold it."""
        return asdict(self)

    def replace(self, **changes: Any) -> Self:
        """The same settings with some changed, checked again."""
        return type(self)(**{**vars(self), **changes})


class LMSettings(Settings):
    """Settings of whatever loads an LM."""

    device: str = DEVICE
    lm_dtype: str = LM_DTYPE
    device_map: str | None = setting(
        None,
        RUN,
        "Where the parts of an LM larger than --device are: auto, or accelerate's map as JSON or a file of it.",
        metavar="auto|JSON|FILE",
        unset="all on --device",
    )


def flag_of(of: type[Settings], name: str) -> str:
    """How users write a setting: --checkpoint-every, or FILE for an argument."""
    one = of.described.get(name)
    return name.upper() if one and one.positional else "--" + ((one and one.flag) or name.replace("_", "-"))


def _checker(of: type[Settings]) -> Any:
    """A pydantic model that checks types and bounds."""
    from pydantic import ConfigDict, Field, create_model

    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
    checks: dict[str, Any] = {}
    for one in fields(of):
        kind, several, optional = of.kinds[one.name]
        bounds = {name: getattr(one.metadata.get("setting"), name, None) for name in ("ge", "gt", "le", "lt")}
        bounded = Annotated[kind, Field(**bounds)]  # type: ignore[valid-type]
        taken: Any = tuple[bounded, ...] if several else bounded
        checks[one.name] = (taken | None if optional else taken, ... if one.default is MISSING else one.default)
    return create_model(of.__name__, __config__=config, **checks)


def _from_text(of: type[Settings], name: str, value: Any) -> Any:
    """What a command line or a TOML file holds, as the field's type: "10M" is 10,000,000, "16,32" is (16, 32)."""
    if name not in of.kinds:
        raise WrongInput(unknown(name, of.kinds))
    kind, several, _ = of.kinds[name]
    one = of.described.get(name)
    if value is None or (one and one.none and str(value).strip().lower() == one.none):
        return None
    if one and one.metavar == "LIST" and isinstance(value, int | list | tuple):  # layers = [4, 8]
        value = ",".join(map(str, value if isinstance(value, list | tuple) else [value]))
    try:
        if not several:
            return _read(value, kind, one.choices if one else ())
        if isinstance(value, str) and (kind in (int, float) or (one and one.commas)):
            value = [item.strip() for item in value.split(",")]
        items = value if isinstance(value, list | tuple) else [value]
        items = [*{repr(item): item for item in items}.values()] if one and one.commas else items
        return tuple(_read(item, kind, one.choices if one else ()) for item in items)
    except ValueError as error:
        remedy = f"; give {flag_of(of, name)} once for each" if one and one.swept and "," in str(value) else ""
        raise WrongInput(f"{flag_of(of, name)} {error}{remedy}") from None


def _read(value: Any, kind: Any, choices: Collection[str]) -> Any:
    if value == "" and kind is str:
        raise ValueError("'' is empty; give a value or leave it out")
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
            raise ValueError(f"{shortened(repr(value))} is not a number") from None
    return value


def read_count(text: str) -> int:
    """200000, 200k, 10M or 1.5B as a number. Raises ValueError for anything else."""
    from decimal import Decimal

    number, factor = text.strip().lower(), 1
    if number and number[-1] in SUFFIXES:
        number, factor = number[:-1], SUFFIXES[number[-1]]
    try:
        count = Decimal(number) * factor  # exact: 16.1k is 16,100, and as a float it is not
        if abs(count) <= LARGEST_COUNT and count == int(count):  # in this order: int() of 1e999999999 takes for ever
            return int(count)
    except (ArithmeticError, ValueError):
        pass
    raise ValueError(f"{shortened(repr(text))} is not a whole number such as 200000, 200k or 10M")


def _message(of: type[Settings], error: Any) -> str:
    """One line of what is wrong, from pydantic's account of it."""
    flag, value, kind = flag_of(of, str(error["loc"][0])), error["input"], error["type"]
    if kind == "missing":
        return f"{flag} is missing"
    if kind in BOUNDS:
        return f"{flag} {value:.10g} is {BOUNDS[kind]} {next(iter(error['ctx'].values())):.10g}"
    return f"{flag} {shortened(repr(value))} is not {TYPES.get(kind, error['msg'])}"


def not_one_of(value: str, choices: Collection[str]) -> str:
    """Complain of a word that is none of the choices, and name the one that was perhaps meant."""
    meant = difflib.get_close_matches(value[:100], choices, n=1)
    remedy = f"; did you mean {meant[0]!r}?" if meant else ""
    return f"{shortened(repr(value))} is none of {', '.join(choices)}{remedy}"


def unknown(name: str, names: Collection[str]) -> str:
    """Complain of a setting that does not exist."""
    meant = difflib.get_close_matches(name[:100], names, n=1)
    remedy = f"did you mean {meant[0]!r}?" if meant else f"the settings are {', '.join(sorted(names))}"
    return f"unknown setting {shortened(repr(name))}; {remedy}"


def read_toml(path: str) -> dict[str, Any]:
    """The TOML file that --config names. Raises WrongInput where it cannot be read."""
    import tomllib

    with reading(f"--config {path}", "give a TOML file"):
        text = read_bytes(path, LARGEST_TOML_BYTES).decode()
        if max(line.count(".") for line in f"{text}\n".splitlines()) > MOST_DOTS:
            raise ValueError(f"a line has more than {MOST_DOTS} dots")
        return tomllib.loads(text)


def require_writable(flag: str, file: str | None) -> None:
    """Raise WrongInput if a file cannot be written whole: its folder is missing or read-only, or it is no file.

    Writing replaces what is there, and root would replace even /dev/null.
    """
    if file is None:
        return
    place = Path(file).absolute()
    if not place.parent.is_dir():
        raise WrongInput(f"{flag} {file}: there is no folder {Path(file).parent} to write it to")
    of_system = any(place.parent.resolve().is_relative_to(folder) for folder in ("/dev", "/proc"))
    if (of_system and not place.is_relative_to("/dev/shm")) or (place.exists() and not place.is_file()):
        raise WrongInput(f"{flag} {file} is a folder or a device; give the name of a file")
    if not os.access(place.parent, os.W_OK):
        raise WrongInput(f"{flag} {file}: {place.parent} is read-only; give another folder")


def by_field(table: Mapping[str, Any], where: str, *classes: type[Settings]) -> dict[str, Any]:
    """The values of a TOML table by the names of fields. Keys are spelled as flags are, with - or _.

    Raises WrongInput for a key that is not a setting of the classes. where: what messages call the table.
    """
    names = {name.replace("_", "-"): name for of in classes for name in of.described}
    names |= {flag_of(of, name).lstrip("-"): name for of in classes for name in of.described}
    for key in table:
        if key.replace("_", "-") not in names:
            raise WrongInput(f"{where}: {unknown(key, names)}")
    return {names[key.replace("_", "-")]: value for key, value in table.items()}
