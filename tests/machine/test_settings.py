"""One definition of a setting: text, wrong values and unknown names, on the mechanism and over every command."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from routesae.analyze.clamp.settings import ClampSettings
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.interpret.settings import InterpretSettings
from routesae.analyze.latents.settings import CompareSettings, LatentsSettings
from routesae.analyze.pipeline.settings import AblationSettings
from routesae.analyze.report.settings import ReportSettings
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.console.options import ConfigFile, DryRun, JsonFile, PipelineFile, Watch
from routesae.harvest.cache.settings import BlockOptions
from routesae.harvest.settings import HarvestSettings
from routesae.machine.settings import Settings, by_field, flag_of, read_count, read_toml, setting
from routesae.reporting import WrongInput
from routesae.train.settings import ConvertSettings, PushSettings, RunSettings, TrainSettings

REQUIRED: dict[type[Settings], dict[str, Any]] = {
    ClampSettings: {"ablate": ("1",)},
    ConvertSettings: {"file": "x.pt"},
    PushSettings: {"folder": "saes/x", "repo": "user/x"},
    TrainSettings: {"runs": (RunSettings(),)},
    AblationSettings: {"training": TrainSettings(runs=(RunSettings(),))},
    PipelineFile: {"config": "x.toml"},
    LatentsSettings: {"text": "x"},
    CompareSettings: {"a": "saes/x", "b": "saes/y"},
}
CLASSES = [
    HarvestSettings,
    RunSettings,
    TrainSettings,
    AblationSettings,
    AnalyzeSettings,
    ContextSettings,
    ClampSettings,
    InterpretSettings,
    ReportSettings,
    LatentsSettings,
    CompareSettings,
    ConvertSettings,
    PushSettings,
    Watch,
    BlockOptions,
    JsonFile,
    ConfigFile,
    PipelineFile,
    DryRun,
]
FIELDS = [(of, name) for of in CLASSES for name in of.described]


def make(of: type[Settings], **values: Any) -> Settings:
    return of(**{**REQUIRED.get(of, {}), **values})


def refused(of: type[Settings], **values: Any) -> str:
    """The message of the WrongInput that these values raise, which is one line."""
    with pytest.raises(WrongInput) as raised:
        make(of, **values)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def by_flag(of: type[Settings], name: str) -> str:
    return f"{of.__name__} {flag_of(of, name)}"


# ---------------------------------------------------------------------------------------- every setting there is


def test_the_table_below_is_of_every_settings_class() -> None:
    def below(of: type[Settings]) -> set[type[Settings]]:
        return {of, *(deeper for one in of.__subclasses__() for deeper in below(one))}

    ours = {
        of.__name__ for of in below(Settings) if of.__module__.startswith("routesae.") and "test" not in of.__module__
    }
    assert ours - {of.__name__ for of in CLASSES} == {
        "Settings",
        "LMSettings",
        "Arithmetic",
        "PipelineSettings",
        "Recipe",
    }


@pytest.mark.parametrize("of", CLASSES)
def test_every_setting_has_help_a_group_and_a_default_that_is_of_its_type(of: type[Settings]) -> None:
    for name, one in of.described.items():
        assert one.help.endswith("."), name
        assert one.group, name
        if one.unset:
            assert one.default in (None, ()), name
        if one.default is not ... and name not in REQUIRED.get(of, {}):
            make(of, **{name: one.default})
    assert of.described.keys() == of.kinds.keys() - {"runs", "training"}


@pytest.mark.parametrize(("of", "name"), FIELDS)
def test_every_bound_refuses_what_lies_beyond_it(of: type[Settings], name: str) -> None:
    for bound, step, says in (
        ("ge", -1, "below"),
        ("gt", 0, "not above"),
        ("le", 1, "above"),
        ("lt", 0, "not below"),
    ):
        if (limit := getattr(of.described[name], bound)) is not None:
            assert refused(of, **{name: limit + step}) == f"{flag_of(of, name)} {limit + step} is {says} {limit}"


@pytest.mark.parametrize(("of", "name"), [(of, name) for of, name in FIELDS if of.described[name].choices])
def test_every_choice_refuses_other_words_and_names_them_all(of: type[Settings], name: str) -> None:
    choices = of.described[name].choices
    assert refused(of, **{name: "soggy"}).startswith(f"{flag_of(of, name)} 'soggy' is none of {', '.join(choices)}")


@pytest.mark.parametrize(("of", "name"), FIELDS)
def test_every_setting_refuses_what_is_not_of_its_type(of: type[Settings], name: str) -> None:
    kind = of.kinds[name].type
    wrong: dict[Any, list[Any]] = {
        int: [6.5, True, "x", {}],
        float: [True, "x", {}, "nan"],
        str: [5, {}, ""],
        bool: ["yes", 1],
    }
    for value in wrong[kind][of.described[name].metavar == "LIST" :]:  # 5 is a list of layers
        assert refused(of, **{name: value}).startswith(f"{flag_of(of, name)} ")


@pytest.mark.parametrize(("given", "text"), [(15, "15"), ([9, 15], "9,15"), ((4, 5), "4,5"), ("4-6", "4-6")])
def test_layers_may_be_numbers_in_python_and_toml(given: Any, text: str) -> None:
    assert make(HarvestSettings, layers=given).to_dict()["layers"] == text


def test_a_word_twice_in_a_list_with_commas_is_one() -> None:
    for words in ("url,label,url", ["url", "label", "url"]):
        assert make(HarvestSettings, keep_fields=words).to_dict()["keep_fields"] == ("url", "label")
    assert refused(HarvestSettings, keep_fields="url,").startswith("--keep-fields '' is empty")
    assert refused(HarvestSettings, keep_fields=[["url"], ["url"]]).startswith("--keep-fields ")


def test_numbers_are_bounded_in_lists_too() -> None:
    assert refused(AnalyzeSettings, infer_k=(8, 0)) == "--infer-k 0 is below 1"
    assert refused(AnalyzeSettings, theta="1,-1") == "--theta -1 is below 0"


# ------------------------------------------------------------------------------------------------------ mechanism


class Small(Settings):
    """Settings to try things on."""

    count: int | None = setting(None, "G", "A count.", ge=1, instead_of="share")
    share: float | None = setting(None, "G", "A share.")
    sizes: tuple[int, ...] = setting((), "G", "Sizes.")
    names: tuple[str, ...] = setting((), "G", "Names.", flag="name")
    every_steps: int = setting(10, "G", "Steps.", flag="every")
    foot: str = setting("left", "G", "Which.", choices=("left", "right"))

    def check(self) -> None:
        if self.foot == "right" and self.every_steps == 13:
            raise WrongInput("--foot right stumbles at --every 13; give another number")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("200000", 200_000),
        ("200_000", 200_000),
        ("200k", 200_000),
        ("10m", 10_000_000),
        ("1.5B", 1_500_000_000),
        ("0.5k", 500),
        ("16.1k", 16_100),
        ("1.001k", 1_001),
        ("9.301M", 9_301_000),
        (" 7 ", 7),
    ],
)
def test_counts_parse(text: str, count: int) -> None:
    assert read_count(text) == count
    assert Small(count=text).count == count


@pytest.mark.parametrize("text", ["x", "", "k", "1.5", "1.0001k", "10MB", "10 000", "inf", "nan", "1e400", "0x10"])
def test_malformed_counts_are_refused(text: str) -> None:
    assert refused(Small, count=text) == f"--count {text!r} is not a whole number such as 200000, 200k or 10M"


def test_text_and_lists_mean_the_same() -> None:
    assert Small(sizes="128,1k") == Small(sizes=[128, 1000]) == Small(sizes=("128", "1k"))
    assert Small(sizes=64).sizes == (64,)
    assert Small(names="a,b").names == ("a,b",)
    assert Small(names=["a", "b"]).names == ("a", "b")
    assert Small(share="0.5") == Small(share=0.5)
    assert Small(share=1).share == 1.0
    assert HarvestSettings(out=Path("x")).out == "x"


def test_messages_name_flag_value_and_remedy() -> None:
    assert refused(Small, every_steps="x") == "--every 'x' is not a whole number such as 200000, 200k or 10M"
    assert refused(Small, foot="rihgt") == "--foot 'rihgt' is none of left, right; did you mean 'right'?"
    assert refused(Small, foo=1) == "unknown setting 'foo'; did you mean 'foot'?"
    assert refused(Small, xyzzy=1).startswith("unknown setting 'xyzzy'; the settings are count, every_steps, foot")
    assert refused(Small, count=1, share=0.5) == "--count 1 and --share 0.5 exclude each other; give one of them"
    assert refused(Small, foot="right", every_steps=13).startswith("--foot right stumbles")
    assert refused(ConvertSettings, file=5) == "FILE 5 is not text"
    with pytest.raises(WrongInput, match=r"^FILE is missing$"):
        ConvertSettings()
    assert refused(Small, sizes=(1, 2.5)) == "--sizes 2.5 is not a whole number"


NEEDS: dict[tuple[type[Settings], str], tuple[Any, dict[str, Any]]] = {  # a value, and beside what it does something
    (ReportSettings, "port"): (8000, {"serve": True}),
    (AblationSettings, "threshold"): (4.0, {"contexts": True}),
    (ClampSettings, "text_field"): ("question", {"prompts": "x.jsonl"}),
    (ClampSettings, "hh"): ("text", {"prompts": "x.jsonl"}),
    (ClampSettings, "seed"): (1, {"temperature": 0.7}),
}


def test_the_table_above_is_of_every_setting_that_needs_another() -> None:
    assert NEEDS.keys() == {(of, name) for of, name in FIELDS if of.described[name].needs}


@pytest.mark.parametrize(("of", "name"), NEEDS)
def test_a_setting_that_does_nothing_without_another_is_refused_alone(of: type[Settings], name: str) -> None:
    value, beside = NEEDS[of, name]
    (needed,) = (flag_of(of, other) for other in beside)
    alone = f"{flag_of(of, name)} {value} does nothing without {needed}; give that too, or leave it out"
    assert refused(of, **{name: value}) == alone
    make(of, **{name: value}, **beside)
    make(of, **{name: of.described[name].default})


@pytest.mark.parametrize(("name", "value"), [("text_field", "body"), ("min_chars", 5)])
def test_what_is_for_texts_is_refused_beside_token_ids(name: str, value: Any) -> None:
    both, _, _ = refused(HarvestSettings, token_field="ids", **{name: value}).partition(" exclude each other")
    assert set(both.split(" and ")) == {f"{flag_of(HarvestSettings, name)} {value}", "--token-field ids"}
    make(HarvestSettings, token_field="ids", min_chars=100, text_field="text")
    make(HarvestSettings, **{name: value})


def test_messages_and_the_one_text_of_hh_are_refused_together() -> None:
    prompts = {"prompts": "x.jsonl", "hh": "text"}
    assert refused(ClampSettings, chat=True, **prompts).startswith("--chat fills in messages, and --hh text makes")
    make(ClampSettings, chat=False, **prompts)


def test_settings_are_frozen_and_a_changed_copy_is_checked() -> None:
    small = Small(every_steps=13)
    with pytest.raises(AttributeError, match="cannot assign"):
        small.every_steps = 5  # type: ignore[misc]
    assert small.replace(every_steps="1k").every_steps == 1000
    with pytest.raises(WrongInput, match="stumbles"):
        small.replace(foot="right")
    assert small.to_dict() == {**Small().to_dict(), "every_steps": 13}


def test_tables_are_spelled_as_flags_are(tmp_path: Path) -> None:
    assert by_field({"every": 5, "name": ["a"]}, "t", Small) == {"every_steps": 5, "names": ["a"]}
    assert by_field({"every-steps": 5}, "t", Small) == by_field({"every_steps": 5}, "t", Small) == {"every_steps": 5}
    with pytest.raises(WrongInput, match=r"^f.toml, \[x\]: unknown setting 'evry'; did you mean 'every'\?$"):
        by_field({"evry": 5}, "f.toml, [x]", Small)


@pytest.mark.parametrize(
    "text",
    [
        ".".join("a" * 20_000) + " = 1",
        "[" + ".".join("a" * 100_000) + "]",
        "a = " + "[" * 100_000,
        "a = " + "{a = " * 5_000,
        "k = " + "1" * 100_000,
        "a" * 300_000 + " = 1",
        "\n".join(f"k{i} = 1" for i in range(100_000)),
        "a" * 200_000 + " = 1",
        "k = '" + "1" * 200_000 + "'",
        "k = '1e999999999'",
        "k = [" + "'x'," * 50_000 + "]",
        "[[run]]\n" * 20_000,
        f"k = {list(range(1, 5000))}\nlayer = {list(range(5000))}",
    ],
)
def test_an_absurd_toml_file_is_refused_in_one_short_line_within_seconds(text: str, tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text(text)
    began = time.process_time()
    with pytest.raises(WrongInput) as refusal:
        TrainSettings.from_flags({"config": str(file)})
    assert time.process_time() - began < 2
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 2_000 + len(str(file))


def test_a_toml_file_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    for path in (tmp_path / "fifo.toml", tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(WrongInput, match=rf"--config {path} cannot be read \(not a regular file\)"):
            read_toml(str(path))


def test_a_toml_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    absent, file = tmp_path / "absent.toml", tmp_path / "train.toml"
    with pytest.raises(WrongInput, match=rf"--config {absent} does not exist"):
        read_toml(str(absent))
    for text in (b"k = ", b"k = 1\nk = 2", b"lr: 3", b"name = '\xff'", b"a = " + b"[" * 100_000):
        file.write_bytes(text)
        with pytest.raises(WrongInput, match=rf"--config {file} cannot be read \([^\n]+\); give a TOML file$"):
            read_toml(str(file))
    with pytest.raises(WrongInput, match=rf"--config {tmp_path} cannot be read"):
        read_toml(str(tmp_path))
