"""The command line: what it prints, how it refuses wrong input, and what Ctrl-C leaves behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from routesae import __version__
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.cli import main
from routesae.console.terminal import COUNT, table
from routesae.harvest.cache.reader import Cache
from routesae.harvest.settings import HarvestSettings
from routesae.train.folder.checkpoint import save_sae
from routesae.train.run import train
from routesae.train.saes import Recipe, build
from routesae.train.settings import RunSettings, TrainSettings, settings_of

OPTIONS = {
    "": ["--help", "--log-json", "--quiet", "--version", "-h"],
    "harvest": [
        "--batch-sequences",
        "--cache-dir",
        "--context",
        "--data",
        "--device",
        "--dtype",
        "--help",
        "--keep-special",
        "--layers",
        "--lm-dtype",
        "--min-chars",
        "--model",
        "--out",
        "--overflow",
        "--seed",
        "--shard-tokens",
        "--skip-positions",
        "--split",
        "--text-field",
        "--tokens",
        "--worker",
        "--workers",
        "-h",
    ],
    "train": [
        "--aggregate",
        "--anneal-k-from",
        "--balance",
        "--batch-tokens",
        "--cache",
        "--checkpoint-every",
        "--clip",
        "--config",
        "--cpu-offload",
        "--dead-after-tokens",
        "--device",
        "--epochs",
        "--expansion",
        "--help",
        "--k",
        "--latents",
        "--layer",
        "--log",
        "--log-every-steps",
        "--lr",
        "--max-memory",
        "--name",
        "--normalize",
        "--out",
        "--overwrite",
        "--pre-act-loss",
        "--precision",
        "--prefixes",
        "--recipe",
        "--resume",
        "--routed",
        "--router",
        "--routing",
        "--sae",
        "--seed",
        "--shard",
        "--sparsity",
        "--sparsity-warmup",
        "--tokens",
        "--verify",
        "-h",
    ],
    "analyze": [
        "--batch-sequences",
        "--cache",
        "--device",
        "--help",
        "--infer-k",
        "--json",
        "--lm-dtype",
        "--metric",
        "--model",
        "--out",
        "--sae",
        "--seed",
        "--theta",
        "--tokens",
        "-h",
    ],
    "contexts": [
        "--batch-tokens",
        "--cache",
        "--device",
        "--help",
        "--max-classes",
        "--min-contexts",
        "--model",
        "--out",
        "--per-class",
        "--sae",
        "--samples",
        "--seed",
        "--threshold",
        "--top",
        "--window",
        "-h",
    ],
    "interpret": [
        "--api-version",
        "--base-url",
        "--cache",
        "--concurrency",
        "--device",
        "--dry-run",
        "--examples",
        "--help",
        "--key-env",
        "--latents",
        "--max-cost",
        "--max-output-tokens",
        "--model",
        "--out",
        "--overwrite",
        "--prices",
        "--prompt",
        "--retries",
        "--retry-unparsed",
        "--sae",
        "--score",
        "--seed",
        "--temperature",
        "--timeout",
        "-h",
    ],
    "ablation": [
        "--batch-tokens",
        "--cache",
        "--config",
        "--contexts",
        "--device",
        "--epochs",
        "--help",
        "--k",
        "--latents",
        "--layer",
        "--lm-dtype",
        "--lr",
        "--model",
        "--out",
        "--plot",
        "--sae",
        "--score-tokens",
        "--seed",
        "--threshold",
        "--tokens",
        "-h",
    ],
    "clamp": [
        "--ablate",
        "--add",
        "--batch-sequences",
        "--chat",
        "--device",
        "--error-term",
        "--help",
        "--hh",
        "--json",
        "--lm-dtype",
        "--max-new-tokens",
        "--max-prompts",
        "--model",
        "--multiply",
        "--out",
        "--prompt",
        "--prompts",
        "--sae",
        "--seed",
        "--set",
        "--temperature",
        "--text-field",
        "-h",
    ],
    "report": [
        "--cache",
        "--contexts",
        "--device",
        "--help",
        "--html",
        "--lm-dtype",
        "--model",
        "--out",
        "--sae",
        "--scores",
        "-h",
    ],
    "run": ["--config", "--help", "-h"],
    "convert": [
        "--aggregate",
        "--help",
        "--k",
        "--layer",
        "--layers",
        "--model",
        "--name",
        "--out",
        "--overwrite",
        "--routing",
        "--sae",
        "-h",
        "file",
    ],
    "push": [
        "--help",
        "--message",
        "--private",
        "-h",
        "folder",
        "repo",
    ],
    "cache": ["--help", "-h"],
    "cache copy": ["--help", "-h", "source", "target"],
    "cache info": ["--help", "-h", "path"],
    "cache merge": ["--help", "--link", "-h", "sources", "target"],
    "cache repair": ["--help", "-h", "path"],
    "cache verify": ["--digest", "--help", "-h", "path"],
}
# Commands that may take a while, and how they are all watched.
LONG = (
    "harvest",
    "train",
    "ablation",
    "analyze",
    "contexts",
    "clamp",
    "interpret",
    "report",
    "run",
    "cache copy",
    "cache merge",
    "cache repair",
    "cache verify",
)
WATCHED = ["--log-json", "--quiet", "--status"]
KEEPS = ("train", "ablation", "analyze", "contexts", "interpret", "report", "cache copy", "cache verify")
BLOCKS = ["--cache-bytes", "--cache-dir"]
LEAVES = (
    "harvest",
    "train",
    "ablation",
    "analyze",
    "contexts",
    "clamp",
    "interpret",
    "report",
    "run",
    "convert",
    "push",
    "cache copy",
    "cache info",
    "cache merge",
    "cache repair",
    "cache verify",
)
SMALL = ("--latents", "64", "--k", "8", "--batch-tokens", "1024", "--device", "cpu")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object, code: int = 2) -> str:
    """The one line on stderr of a command that must end with `code`."""
    result = invoke(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("routesae: ")
    return line


def misused(*arguments: object) -> str:
    """Click's own usage error of a command whose option has a malformed value."""
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.stderr.splitlines()[-1]


def commands() -> dict[str, click.Command]:
    """Every command by its words; "" is routesae itself."""
    found: dict[str, click.Command] = {}

    def walk(words: str, command: click.Command) -> None:
        found[words] = command
        for name, child in getattr(command, "commands", {}).items():
            walk(f"{words} {name}".strip(), child)

    walk("", main)
    return found


def defaults(words: str) -> dict[str, Any]:
    """What a command's options come to when none is given."""
    return dict(commands()[words].make_context(words, []).params)


@pytest.fixture(scope="module")
def saes(tiny_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a topk of layer 3 and a hard routesae."""
    out = tmp_path_factory.mktemp("saes")
    small: dict[str, Any] = {"latents": 64, "k": 8, "batch_tokens": 1024, "device": "cpu", "out": str(out)}
    train(settings_of({"cache": str(tiny_cache.path), "sae": "topk", "layer": 3, "name": "topk", **small}))
    train(settings_of({"cache": str(tiny_cache.path), "name": "routesae", **small}))
    return out


# --------------------------------------------------------------------------------------------- the interface


def test_commands_and_options_are_those_frozen_here() -> None:
    found = {}
    for words, command in commands().items():
        parameters = command.get_params(click.Context(command, **command.context_settings))
        inherited = main.context_settings["help_option_names"]
        opts = {o for p in parameters for o in (inherited if p.name == "help" else p.opts)}
        found[words] = sorted(opts | set(inherited))
    assert found == {
        words: sorted(opts + WATCHED * (words in LONG) + BLOCKS * (words in KEEPS)) for words, opts in OPTIONS.items()
    }


def test_every_command_has_an_example_that_parses() -> None:
    for words in LEAVES:
        command = commands()[words]
        assert command.epilog is not None
        program, *example = shlex.split(command.epilog.removeprefix("Example: "))
        assert program == "routesae"
        assert example[: len(words.split())] == words.split()
        command.make_context(words, example[len(words.split()) :])
        help_text = " ".join(invoke(*words.split(), "--help").output.split())
        assert command.epilog in help_text


def test_help_shows_every_default() -> None:
    shown = 0
    for words, command in commands().items():
        text = " ".join(invoke(*words.split(), "--help").output.split())
        for option in command.params:
            if (
                isinstance(option, click.Option)
                and not option.is_flag
                and isinstance(option.default, int | float | str)
            ):
                assert f"[default: {option.default}]" in text, (words, option.name)
                shown += 1
    assert shown > 25


def test_every_option_has_a_help_text() -> None:
    options = [o for command in commands().values() for o in command.params if isinstance(o, click.Option)]
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize(("words", "settings"), [("harvest", HarvestSettings), ("analyze", AnalyzeSettings)])
def test_defaults_of_the_command_line_are_those_of_the_settings(words: str, settings: Callable[[], Any]) -> None:
    expected = asdict(settings())
    found = defaults(words)
    if words == "analyze":
        assert found.pop("json_file") is None
        assert found["metrics"] == ()  # the command then leaves the choice to the settings
        found["metrics"] = expected["metrics"]
    assert found == expected


def test_defaults_of_train_are_those_of_the_settings_wherever_help_shows_one() -> None:
    """Only what stands on the command line is passed on; so a default is shown, and never used."""
    own = {**asdict(TrainSettings(runs=(RunSettings(),))), **asdict(RunSettings())}
    own["checkpoint_every"] = own.pop("checkpoint_every_steps")
    del own["runs"]
    found = defaults("train")
    assert found.pop("config") is None
    assert found.keys() == own.keys()
    assert {name: value for name, value in found.items() if value not in (None, ())} == {
        name: own[name] for name, value in found.items() if value not in (None, ())
    }
    stated = {o.name: o.help for o in commands()["train"].params if isinstance(o, click.Option) and o.help}
    for name in (name for name, value in found.items() if value in (None, ()) and own[name] not in (None, ())):
        assert f"[default: {own[name]}]" in stated[name]


def test_defaults_are_those_of_the_design() -> None:
    harvest, training = defaults("harvest"), defaults("train")
    assert (harvest["model"], harvest["data"]) == ("meta-llama/Llama-3.2-1B", "Skylion007/openwebtext")
    assert (harvest["tokens"], harvest["context"], harvest["dtype"]) == (10_000_000, 512, "float16")
    assert (harvest["layers"], harvest["out"]) == (None, "shards")
    assert (RunSettings().sae, RunSettings().k, training["lr"]) == ("routesae", 64, 5e-4)
    assert (training["cache"], training["out"], defaults("analyze")["out"]) == ("shards", "saes", "saes")


def test_the_three_lines_work_on_their_defaults(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Harvest's default model is not to be had here; its place is taken by a cache in shards/, of width 32."""
    monkeypatch.chdir(tmp_path)
    Path("shards").symlink_to(tiny_cache.path, target_is_directory=True)
    trained = invoke("train", "--cache", "shards/")
    assert (trained.exit_code, trained.stderr) == (0, "")
    assert re.fullmatch(
        r"saes/routesae_hard_256_k64: held-out NormMSE [\d.]+, L0 [\d.]+ on \d+ tokens\n", trained.stdout
    )
    analyzed = invoke("analyze", "--metric", "KLDiv")
    assert (analyzed.exit_code, analyzed.stderr) == (0, "")
    assert "routesae_hard_256_k64" in analyzed.stdout
    everything = invoke("analyze")
    assert everything.exit_code == 0
    assert {"NormMSE", "FVU", "L0", "Dead", "Entropy", "Shares"} <= set(everything.stdout.split())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("200000", 200_000),
        ("200_000", 200_000),
        ("200k", 200_000),
        ("200K", 200_000),
        ("10M", 10_000_000),
        ("10m", 10_000_000),
        ("1.5B", 1_500_000_000),
        ("0.5k", 500),
        ("16.1k", 16_100),
        ("2.01k", 2_010),
        ("1.001k", 1_001),
        ("9.301M", 9_301_000),
        (" 7 ", 7),
    ],
)
def test_counts_parse(text: str, count: int) -> None:
    assert COUNT.convert(text, None, None) == count


@pytest.mark.parametrize("text", ["x", "", "k", "1.5", "1.0001k", "10MB", "10 000", "inf", "nan", "1e400", "0x10"])
def test_malformed_counts_are_usage_errors(text: str) -> None:
    assert "is not a whole number such as 200000, 200k or 10M" in misused("harvest", "--tokens", text)


@pytest.mark.parametrize("text", ["-1", "0", "-5k"])
def test_counts_below_one_are_refused(text: str) -> None:
    assert "below 1" in refused("harvest", "--tokens", text)
    assert "below 1" in refused("train", "--tokens", text)
    assert "below 1" in refused("analyze", "--tokens", text)


def test_version_is_the_packages() -> None:
    assert invoke("--version").stdout.split()[-1] == __version__


# --------------------------------------------------------------------------------------------------- results


def test_table_and_json_hold_the_same_numbers(tiny_cache: Cache, saes: Path, tmp_path: Path) -> None:
    metrics = [word for name in ("NormMSE", "L0", "KLDiv", "DeltaCE", "Recovered") for word in ("--metric", name)]
    file = tmp_path / "scores.json"
    result = invoke("analyze", *metrics, "--cache", tiny_cache.path, "--out", saes, "--json", file)
    assert result.exit_code == 0, result.output
    header, _, *lines, last = result.stdout.splitlines()
    scores = json.loads(file.read_text())
    assert last == f"on {scores['tokens_scored']:,} held-out tokens"
    assert len(lines) == len(scores["saes"]) == 2
    for line, row in zip(lines, scores["saes"], strict=True):
        shown = dict(zip(header.split(), line.split(), strict=True))
        assert set(row) - set(shown) == {"folder", "intervals"}
        for name, cell in shown.items():
            value, _, half = cell.partition("±")
            if isinstance(row[name], float):
                digits = len(value.partition(".")[2])
                assert digits >= 1
                assert float(value.replace(",", "")) == round(row[name], digits)
                low, high = row["intervals"][name]
                assert float(half) == round((high - low) / 2, digits)
            else:
                assert value == str(row[name])
        for name in ("NormMSE", "L0", "KLDiv", "KLDiv_seq", "DeltaCE", "CE_clean", "Recovered"):
            assert isinstance(row[name], float)


def test_routing_shows_the_largest_shares_and_a_dash_where_there_is_no_router(tiny_cache: Cache, saes: Path) -> None:
    result = invoke("analyze", "--metric", "Routing", "--cache", tiny_cache.path, "--out", saes)
    routed, single = result.stdout.splitlines()[2:4]
    assert routed.count("%") == 3
    assert single.split()[-2:] == ["-", "-"]


def test_table_keeps_columns_that_only_some_rows_have() -> None:
    lines = table([{"sae": "a", "L0": 1.0}, {"sae": "b", "Dead": 0.25}]).splitlines()
    assert lines[0].split() == ["sae", "L0", "Dead"]
    assert [line.split() for line in lines[2:]] == [["a", "1.0000", "-"], ["b", "-", "0.2500"]]


def test_harvest_says_what_it_wrote(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    arguments = ("harvest", "--model", tiny_model, "--data", tiny_corpus, "--tokens", "1k", "--context", "16")
    result = invoke(*arguments, "--layers", "3", "--device", "cpu", "--out", tmp_path / "shards")
    assert result.exit_code == 0, result.output
    kept = Cache(tmp_path / "shards").manifest.kept_tokens
    assert result.stdout == f"{tmp_path / 'shards'}: {kept:,} tokens x 1 layers x 32 in 1 shards\n"


def test_cache_info_shows_manifest_shards_and_layers(tiny_cache: Cache, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_cache.path, tmp_path / "shards")
    shutil.rmtree(copy / "shard-00002")
    result = invoke("cache", "info", copy)
    assert result.exit_code == 0
    for expected in (tiny_cache.manifest.model, tiny_cache.manifest.corpus, "4 of 5; missing 2", "max abs"):
        assert expected in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines()[-4:]] == ["2", "3", "4", "5"]


def test_verify_passes_a_whole_cache(tiny_cache: Cache) -> None:
    result = invoke("cache", "verify", tiny_cache.path)
    assert (result.exit_code, result.stdout) == (0, f"{tiny_cache.path}: every shard is whole\n")


def test_verify_names_every_bad_shard_and_exits_1(tiny_cache: Cache, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_cache.path, tmp_path / "shards")
    altered = copy / "shard-00001" / "layer_03" / "c" / "0" / "0"
    data = bytearray(altered.read_bytes())
    data[100] ^= 1
    altered.write_bytes(data)
    os.truncate(copy / "shard-00003" / "layer_05" / "c" / "0" / "0", 1000)
    shutil.rmtree(copy / "shard-00004")
    result = invoke("cache", "verify", copy)
    assert result.exit_code == 1
    named = [line.partition(":")[0] for line in result.stdout.splitlines()]
    assert named == ["shard-00001/layer_03", "shard-00003/layer_05", "shard-00004"]
    assert result.stderr.splitlines() == [
        f"routesae: {copy}: 3 problems; `routesae cache repair {copy}` removes bad shards, and the same routesae "
        "harvest then writes what is missing"
    ]


def test_the_digest_is_one_line_whether_or_not_the_cache_is_whole(tiny_cache: Cache, tmp_path: Path) -> None:
    result = invoke("cache", "verify", tiny_cache.path, "--digest")
    assert result.exit_code == 0
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", result.stdout)
    copy = shutil.copytree(tiny_cache.path, tmp_path / "shards")
    shutil.rmtree(copy / "shard-00004")
    other = invoke("cache", "verify", copy, "--digest")
    assert other.exit_code == 1
    missing, digest = other.stdout.splitlines()
    assert missing == "shard-00004: missing"
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
    assert digest != result.stdout.strip()


def test_repair_says_what_is_wrong_what_it_removed_and_what_to_do(
    tiny_cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(tiny_cache.path, tmp_path / "shards")
    os.truncate(copy / "shard-00003" / "layer_05" / "c" / "0" / "0", 1000)
    result = invoke("cache", "repair", copy)
    assert result.exit_code == 0
    assert "shard-00003/layer_05: 1,000 bytes where" in caplog.text
    assert result.stdout.splitlines() == [
        "removed shard-00003",
        f"{copy}: 1 shards are missing; the same routesae harvest writes just those",
    ]
    assert invoke("cache", "repair", tiny_cache.path).stdout == f"{tiny_cache.path}: every shard is whole\n"


def test_merge_says_how_many_shards_came_and_how_many_are_missing(tiny_cache: Cache, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_cache.path, tmp_path / "part")
    shutil.rmtree(copy / "shard-00003")
    result = invoke("cache", "merge", copy, tmp_path / "whole")
    assert (result.exit_code, result.stdout.splitlines()) == (
        0,
        [
            f"{tmp_path / 'whole'}: 4 shards copied",
            f"{tmp_path / 'whole'}: 1 shards are in none of these; merge further parts, or harvest the rest",
        ],
    )
    assert invoke("cache", "merge", tiny_cache.path, tmp_path / "whole").stdout.startswith(
        f"{tmp_path / 'whole'}: 1 shards copied"
    )


def test_train_prints_one_line_for_every_sae_of_the_pass(tiny_cache: Cache, tmp_path: Path) -> None:
    several = ("--sae", "topk", "--sae", "jumprelu", "--sae", "routesae", "--layer", "3", "--k", "4")
    result = invoke("train", "--cache", tiny_cache.path, *SMALL, *several, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    names = [f"{name}_64_k{k}" for name in ("topk_layer3", "jumprelu_layer3", "routesae_hard") for k in (8, 4)]
    held_out = r"held-out NormMSE \d\.\d{4}, L0 \d+\.\d on [\d,]+ tokens"
    for line, name in zip(result.stdout.splitlines(), names, strict=True):
        assert re.fullmatch(rf"{tmp_path}/{name}: {held_out}", line), line
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(names)


def test_a_config_file_gives_the_runs_and_flags_win(tiny_cache: Cache, tmp_path: Path) -> None:
    config, out = tmp_path / "train.toml", tmp_path / "saes"
    config.write_text(
        f'cache = "{tiny_cache.path}"\nlatents = 64\nk = 8\nbatch-tokens = 1024\n'
        '[[run]]\nsae = "topk"\nname = "a"\n[[run]]\nrouter = "top2"\nname = "b"\n'
    )
    result = invoke("train", "--config", config, "--k", "4", "--out", out)
    assert result.exit_code == 0, result.output
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [f"{out}/a", f"{out}/b"]
    for name, sae in (("a", "topk"), ("b", "routesae")):
        source = json.loads((out / name / "cfg.json").read_text())["metadata"]["routesae"]["source"]
        asked = source["settings"]
        assert (asked["run"]["sae"], asked["run"]["k"], asked["run"]["latents"]) == (sae, 4, 64)
        assert (asked["batch_tokens"], asked["seed"]) == (1024, 0)


def test_resuming_what_is_finished_prints_nothing_and_exits_0(tiny_cache: Cache, tmp_path: Path) -> None:
    arguments = ("train", "--cache", tiny_cache.path, *SMALL, "--out", tmp_path)
    assert invoke(*arguments).exit_code == 0
    (sae,) = (path for path in tmp_path.iterdir() if path.is_dir())
    before = {path: path.stat().st_mtime_ns for path in (sae, *sae.rglob("*"))}
    again = invoke(*arguments, "--resume")
    assert (again.exit_code, again.stdout) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in (sae, *sae.rglob("*"))} == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("k = ", "cannot be read"),
        ("sead = 1", "sead is no setting"),
        ("[[run]]\nseed = 1", "[[run]]: seed is no setting"),
        ('k = "64"', "--k '64' is of the wrong type"),
        ('lr = "x"', "--lr 'x' is of the wrong type"),
        ("epochs = 1.5", "--epochs 1.5 is of the wrong type"),
        ("run = 3", "write [[run]] above each"),
    ],
)
def test_a_wrong_config_file_is_refused(text: str, expected: str, tiny_cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text(text)
    out = tmp_path / "saes"
    line = refused("train", "--cache", tiny_cache.path, "--config", tmp_path / "train.toml", "--out", out)
    assert expected in line
    assert not out.exists()


# ----------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "other zarr"])
@pytest.mark.parametrize(
    "command", ["train --cache", "analyze --cache", "cache info", "cache verify", "cache repair"]
)
def test_a_folder_that_is_no_cache_is_refused(command: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "shards"
    if kind == "file":
        path.write_text("not a cache")
    elif kind != "missing":
        path.mkdir()
    if kind == "other zarr":
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"model": "gpt2"}}
        (path / "zarr.json").write_text(json.dumps(group))
    line = refused(*command.split(), path)
    assert (
        "not the manifest of a routesae cache" in line if kind == "other zarr" else f"{path} is not a cache" in line
    )


def test_a_layer_that_was_not_harvested_is_refused(tiny_cache: Cache, saes: Path, tmp_path: Path) -> None:
    line = refused(
        "train", "--cache", tiny_cache.path, "--sae", "topk", "--layer", "6", "--k", "8", "--out", tmp_path
    )
    assert "layer 6 was not harvested" in line
    assert "2, 3, 4, 5" in line
    other = shutil.copytree(saes / "topk", tmp_path / "other")
    config = json.loads((other / "cfg.json").read_text())
    config["metadata"]["routesae"]["recipe"]["layers"] = [6]
    (other / "cfg.json").write_text(json.dumps(config))
    for metric in ("NormMSE", "KLDiv"):
        line = refused("analyze", "--metric", metric, "--cache", tiny_cache.path, "--sae", other)
        assert "layer 6" in line
        assert str(other) in line


def test_k_larger_than_the_latents_is_refused(tiny_cache: Cache, tmp_path: Path) -> None:
    small = ("--cache", tiny_cache.path, "--out", tmp_path / "saes")
    assert "--k 65 is more than the SAE's 64 latents" in refused("train", *small, "--latents", "64", "--k", "65")
    assert "--k 300" in refused("train", *small, "--k", "300")  # of 8 x 32 latents
    assert not (tmp_path / "saes").exists()


def test_an_sae_of_another_width_is_refused(tiny_cache: Cache, tmp_path: Path) -> None:
    save_sae(tmp_path, build(Recipe(sae="topk", layers=(3,), width=16, latents=64, k=8)), {})
    line = refused("analyze", "--cache", tiny_cache.path, "--sae", tmp_path)
    assert "width 16 is not the 32" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train --cache CACHE --sae dense", "--sae 'dense' is none of vanilla, gated, topk"),
        ("train --cache CACHE --routing soggy", "--routing 'soggy' is none of hard, soft"),
        ("train --cache CACHE --aggregate max", "--aggregate 'max' is none of sum, mean"),
        ("train --cache CACHE --layer 3", "--layer 3 is not for routesae: it reads every layer"),
        ("train --cache CACHE --sae topk --router top2", "--router top2 is not for topk"),
        ("train --cache CACHE --sae topk --sparsity 0.1", "--sparsity 0.1 is not for topk"),
        ("train --cache CACHE --router best", "--router 'best' is none of published, top2"),
        ("train --cache CACHE --normalize layer", "--normalize 'layer' is none of token, dataset, none"),
        ("train --cache CACHE --precision int8", "--precision 'int8' is none of auto, float32"),
        ("train --cache CACHE --recipe paper", "--recipe 'paper' is none of routesae, published"),
        ("train --cache CACHE --sae gated --recipe published", "--recipe published needs --sparsity"),
        ("train --cache CACHE --sae matryoshka --prefixes 1,x", "--prefixes '1,x' is no list such as"),
        ("train --cache CACHE --sae matryoshka --prefixes 8,16", "must rise and end with the SAE's 256"),
        ("train --cache CACHE --anneal-k-from 257", "--anneal-k-from 257 is more than the SAE's 256 latents"),
        ("train --cache CACHE --clip -1", "--clip -1.0 is not a number of 0 or more"),
        ("train --cache CACHE --checkpoint-every 0", "--checkpoint-every 0 is below 1"),
        ("train --cache CACHE --sparsity-warmup 2", "--sparsity-warmup 2.0 is not a share"),
        ("train --cache CACHE --log mlflow", "--log 'mlflow' is none of tensorboard, wandb, trackio"),
        ("train --cache CACHE --resume --overwrite", "--resume goes on with what --overwrite would delete"),
        ("train --cache CACHE --config no.toml", "--config no.toml does not exist"),
        ("train --cache CACHE --seed 5000000000", "--seed 5000000000 is not below 2^32"),
        ("train --cache CACHE --name x --k 8 --k 16", "two SAEs of this run would be saes/x"),
        ("train --cache CACHE --epochs 1 --tokens 1k", "both say how long"),
        ("train --cache CACHE --lr 0", "--lr 0.0 is not above 0"),
        ("train --cache CACHE --name ../x", "--name '../x'"),
        ("analyze --cache CACHE --metric Perplexity", "--metric 'Perplexity' is none of NormMSE"),
        ("analyze --cache CACHE --metric KLDiv --lm-dtype int4 --out SAES", "'int4' is none of auto, float32"),
        ("analyze --cache CACHE --batch-sequences 0", "--batch-sequences 0 is below 1"),
        ("harvest --dtype float8", "--dtype 'float8' is none of float16, float32"),
        ("harvest --lm-dtype int4", "'int4' is none of auto, float32"),
        ("harvest --overflow wrap", "--overflow 'wrap' is none of error, clip"),
        ("harvest --device tpu", "unknown device 'tpu'; give auto, cpu, cuda"),
        ("harvest --model MODEL --layers 0-9 --context 16", "layers 1 to 6"),
        ("harvest --model MODEL --layers x --context 16", "--layers 'x' is not a list"),
        ("harvest --model MODEL --context 65", "--context 65 is more than the 64 positions"),
    ],
)
def test_unknown_and_impossible_values_are_refused(
    arguments: str,
    expected: str,
    tiny_cache: Cache,
    tiny_model: Path,
    saes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"CACHE": tiny_cache.path, "MODEL": tiny_model, "SAES": saes}
    assert expected in refused(*(places.get(word, word) for word in arguments.split()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("corpus", ["empty file", "short documents", "empty folder", "missing"])
def test_an_empty_corpus_is_refused_and_leaves_nothing(corpus: str, tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / ("folder" if corpus == "empty folder" else "texts.jsonl")
    if corpus == "empty folder":
        data.mkdir()
    elif corpus != "missing":
        data.write_text('{"text": "too short"}\n' * (corpus == "short documents"))
    out = tmp_path / "shards"
    line = refused("harvest", "--model", tiny_model, "--data", data, "--context", "16", "--out", out)
    assert str(data) in line
    assert not out.exists()


def test_a_corpus_too_small_for_one_row_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "texts.jsonl", tmp_path / "shards"
    data.write_text(json.dumps({"text": "the router reads a layer of the model and writes a row " * 2}))
    line = refused("harvest", "--model", tiny_model, "--data", data, "--context", "64", "--out", out)
    assert "64" in line
    assert "row" in line
    assert not out.exists()


def test_a_model_the_hub_will_not_give_is_refused_with_the_ways_out(tiny_corpus: Path, tmp_path: Path) -> None:
    arguments = ("harvest", "--model", "nobody/no-such-model", "--data", str(tiny_corpus))
    run = routesae(*arguments, cwd=tmp_path, environment={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")})
    output, errors = run.communicate(timeout=60)
    assert (run.returncode, output) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("routesae: model 'nobody/no-such-model' cannot be loaded")
    assert all(way in line for way in ("hf auth login", "local folder", ".gguf", "demo"))
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
@pytest.mark.parametrize("command", ["harvest", "train", "analyze"])
def test_cuda_is_refused_where_there_is_none(
    command: str, device: str, tiny_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cache = [] if command == "harvest" else ["--cache", tiny_cache.path]
    line = refused(command, *cache, "--device", device)
    assert f"--device {device} is not here: there is no CUDA device" in line
    assert "--device cpu" in line


@pytest.mark.parametrize("damage", ["missing", "truncated", "emptied"])
@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors", "router.safetensors"])
def test_an_sae_folder_with_a_missing_or_truncated_file_is_refused(
    file: str, damage: str, tiny_cache: Cache, saes: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(saes / "routesae", tmp_path / "broken") / file
    if damage == "missing":
        broken.unlink()
    else:
        os.truncate(broken, broken.stat().st_size // 2 if damage == "truncated" else 0)
    line = refused("analyze", "--cache", tiny_cache.path, "--sae", broken.parent)
    assert file in line
    assert str(broken.parent) in line
    assert ("missing" in line) == (damage == "missing")


def test_sae_folders_that_are_not_there_are_refused(tiny_cache: Cache, tmp_path: Path) -> None:
    assert "no SAE under" in refused("analyze", "--cache", tiny_cache.path, "--out", tmp_path)
    assert "not an SAE folder" in refused("analyze", "--cache", tiny_cache.path, "--sae", tmp_path / "none")


def test_train_refuses_to_replace_an_sae_unless_told(tiny_cache: Cache, saes: Path, tmp_path: Path) -> None:
    shutil.copytree(saes / "topk", tmp_path / "topk")
    arguments = ("train", "--cache", tiny_cache.path, *SMALL, "--out", tmp_path, "--name", "topk")
    before = (tmp_path / "topk" / "cfg.json").read_bytes()
    assert "exists; give another --name, or --overwrite" in refused(*arguments)
    assert (tmp_path / "topk" / "cfg.json").read_bytes() == before
    assert invoke(*arguments, "--overwrite").exit_code == 0
    assert (tmp_path / "topk" / "router.safetensors").exists()


def test_a_json_file_that_cannot_be_written_still_shows_the_table(
    tiny_cache: Cache, saes: Path, tmp_path: Path
) -> None:
    """Hours of scoring must not be lost to a mistyped folder: say so before, or print what there is."""
    file = tmp_path / "none" / "scores.json"
    result = invoke("analyze", "--metric", "L0", "--cache", tiny_cache.path, "--out", saes, "--json", file)
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("routesae: ")
    assert str(file.parent) in line
    assert result.exit_code == 2 or "topk" in result.stdout


# ------------------------------------------------------------------------------------------- real processes


def routesae(*arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "routesae", *arguments],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts its jobs in the background has them ignore SIGINT, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def interrupted(run: subprocess.Popen[str], when: Callable[[], bool]) -> list[str]:
    """The lines on stderr of a process that gets SIGINT at the moment `when`, and must end with 130."""
    deadline = time.monotonic() + 60
    while not when():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    output, errors = run.communicate(timeout=60)
    assert (run.returncode, output) == (130, ""), errors
    assert "Traceback" not in errors
    return [line for line in errors.splitlines() if line.startswith("routesae: ")]


def test_ctrl_c_leaves_a_cache_that_resumes(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    size = ("--tokens", "3k", "--context", "16", "--shard-tokens", "512", "--batch-sequences", "1")
    arguments = ("harvest", "--model", str(tiny_model), "--data", str(tiny_corpus), *size, "--out", "shards")
    shards = tmp_path / "shards"
    lines = interrupted(routesae(*arguments, cwd=tmp_path), lambda: (shards / "shard-00001").exists())
    assert len(lines) == 1
    assert "the same command goes on" in lines[0]
    missing = Cache(shards).missing()
    assert missing
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("shard-*/zarr.json")}
    resumed = invoke(*arguments[:-1], shards)
    assert resumed.exit_code == 0, resumed.output
    assert Cache(shards).missing() == []
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # what was there was not written again
    assert invoke("cache", "verify", shards).exit_code == 0


def test_ctrl_c_leaves_no_sae_but_a_checkpoint_that_the_same_goes_on_from(tiny_cache: Cache, tmp_path: Path) -> None:
    arguments = ("train", "--cache", str(tiny_cache.path), *SMALL, "--epochs", "100000", "--name", "long")
    metrics = tmp_path / "saes" / ".long.partial" / "metrics.jsonl"
    run = routesae(*arguments, cwd=tmp_path)
    (line,) = interrupted(run, lambda: metrics.exists() and metrics.stat().st_size > 0)
    found = re.fullmatch(r"routesae: stopped after step (\d+) of \d+; the same command with --resume goes on", line)
    assert found is not None, line
    assert [path for path in (tmp_path / "saes").iterdir() if path.is_dir()] == [metrics.parent]
    (state,) = metrics.parent.glob("step-*")
    assert int(state.name[5:]) == int(found[1])
    again = refused(*arguments, "--out", tmp_path / "saes")
    assert f"long was stopped after step {int(found[1])}; --resume continues it, --overwrite starts again" in again
    shorter = refused(*arguments, "--out", tmp_path / "saes", "--resume", "--epochs", "1")
    assert "long was begun with other settings: pass.epochs (was 100000, now 1)" in shorter


def test_help_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    seconds = []
    for words in ([], ["harvest"], ["train"], ["analyze"]):
        begin = time.perf_counter()
        command = [sys.executable, "-X", "importtime", "-m", "routesae", *words, "--help"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begin)
        assert "routesae.cli" in run.stderr or "click" in run.stderr
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
        assert imported & {"torch", "numpy", "zarr", "transformers", "datasets", "openai"} == set()
    assert min(seconds) < 0.5
