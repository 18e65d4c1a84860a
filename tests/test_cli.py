"""The command line: what it prints, how it refuses wrong input, and what Ctrl-C leaves behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from routesae import __version__
from routesae.cli import main
from routesae.harvest.cache.arrays import write_group
from routesae.harvest.cache.reader import Cache
from routesae.harvest.settings import HarvestSettings
from routesae.machine.files import read_json
from routesae.reporting import shortened
from routesae.tests.processes import Command
from routesae.train.folder.checkpoint import save_sae
from routesae.train.run import train
from routesae.train.saes import Recipe, build
from routesae.train.settings import settings_of

# Every command with its own flags, and which of the groups of flags that several commands share.
RUN, BLOCKS, SAES = "quiet log-json status", "cache-dir cache-bytes", "sae out cache device model seed"
TRAIN = """cache sae latents expansion k layer sparsity pre-act-loss prefixes routing aggregate routed router balance
    normalize batch-tokens epochs tokens window follow dead-after-tokens anneal-k-from sparsity-warmup recipe lr clip
    precision max-memory log-every-steps log-project checkpoint-every log seed verify device shard cpu-offload out
    freeze from config"""
OPTIONS = {
    "harvest": f"""model data mix data-config split text-field token-field min-chars tokens context layers
        held-out keep-fields keep-roles dtype overflow
        skip-positions keep-special shard-tokens keep batch-sequences seed device lm-dtype device-map worker
        workers out
        {RUN} {BLOCKS}""",
    "train": f"{TRAIN} name overwrite resume {RUN} {BLOCKS}",
    "ablation": f"{TRAIN} score-tokens model lm-dtype plot contexts threshold {RUN} {BLOCKS}",
    "analyze": f"""metric label rows tokens all-positions infer-k theta batch-sequences lm-dtype device-map json
        {SAES} {RUN} {BLOCKS}""",
    "contexts": f"""json rows group-by threshold per-class max-classes min-contexts choose top window
        samples batch-tokens overwrite {SAES} {RUN} {BLOCKS}""",
    "clamp": f"""add multiply set ablate error-term prompt prompts text-field hh max-prompts chat max-new-tokens
        temperature batch-sequences lm-dtype device-map json sae out device model seed {RUN}""",
    "interpret": f"""latents examples prompt score max-cost prices retry-unparsed overwrite base-url api-version
        key-env concurrency timeout retries temperature max-output-tokens dry-run {SAES} {RUN} {BLOCKS}""",
    "report": f"html scores contexts logits serve port lm-dtype device-map sae out cache device model {RUN} {BLOCKS}",
    "latents": f"sae out text file messages top model device lm-dtype device-map json {RUN}",
    "compare": f"A B cache tokens threshold device json {RUN} {BLOCKS}",
    "run": f"config follow {RUN}",
    "convert": "FILE sae k layer layers routing aggregate normalize model out name overwrite",
    "push": "FOLDER REPO private message",
    "cache info": "PATH",
    "cache verify": f"PATH digest {RUN} {BLOCKS}",
    "cache repair": f"PATH {RUN}",
    "cache merge": f"SOURCES TARGET link {RUN} {BLOCKS}",
    "cache copy": f"SOURCE TARGET {RUN} {BLOCKS}",
}
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


def command_of(words: str) -> click.Command:
    found: click.Command = main
    for word in words.split():
        assert isinstance(found, click.Group)
        found = found.commands[word]
    return found


def parameters(words: str) -> list[click.Parameter]:
    command = command_of(words)
    return command.get_params(click.Context(command))


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
    leaves = [name for name, command in main.commands.items() if not isinstance(command, click.Group)]
    leaves += [f"cache {name}" for name in main.commands["cache"].commands]
    assert set(leaves) == OPTIONS.keys()
    for words, names in OPTIONS.items():
        found = [
            p.name.upper() if p.param_type_name == "argument" else max(p.opts, key=len) for p in parameters(words)
        ]
        expected = [name if name.isupper() else f"--{name}" for name in names.split()]
        assert sorted(found) == sorted([*expected, "--help"]), words


@pytest.mark.parametrize("words", OPTIONS)
def test_help_shows_every_option_its_default_and_an_example_that_parses(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = invoke(*words.split(), "--help").stdout
    *_, title, example = text.splitlines()
    assert (title, example[:11]) == ("Example:", "  routesae ")
    assert max(len(line) for line in text.splitlines()[:-1]) <= 80
    command_of(words).make_context(words, shlex.split(example)[len(words.split()) + 1 :])
    flat = "".join(text.split())
    for option in (one for one in parameters(words) if isinstance(one, click.Option)):
        assert option.help
        assert "".join(option.help.split()) in flat
        assert max(option.opts, key=len) in text


def test_help_groups_what_belongs_together() -> None:
    lines = invoke("train", "--help").stdout.splitlines()
    groups = [line for line in lines if line and not line.startswith(" ")]
    names = ["Model and corpus", "The dictionary", "This variant only", "Optimiser", "The run", "Example"]
    assert groups == ["Usage: routesae train [OPTIONS]", *(f"{name}:" for name in names)]
    variant = lines[lines.index("This variant only:") : lines.index("Optimiser:")]
    assert any("--prefixes" in line and "matryoshka:" in line for line in variant)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("harvest --tokens 1x", "--tokens '1x' is not a whole number such as 200000, 200k or 10M"),
        ("harvest --tokens 0", "--tokens 0 is below 1"),
        ("train --lr fast", "--lr 'fast' is not a number"),
        ("train --lr", "option '--lr' requires an argument"),
        ("train --sea topk", "no such option '--sea'; did you mean '--sae'?"),
        ("train --resume --overwrite", "--resume goes on with what --overwrite would delete; give one of them"),
        ("train --epochs 1 --tokens 1k", "--epochs 1 and --tokens 1000 exclude each other; give one of them"),
        ("train --sae topkk", "did you mean 'topk'?"),
        ("train --k 16,32", "--k '16,32' is not a whole number such as 200000, 200k or 10M; give --k once for each"),
        ("train --config no.toml", "--config no.toml does not exist"),
        ("analyze --metric KL", "--metric 'KL' is none of NormMSE, FVU"),
        ("analyze --json no/x.json", "--json no/x.json: there is no folder no to write it to"),
        ("analyze --status no/x.json", "--status no/x.json: there is no folder no to write it to"),
        ("analyze --json /dev/stdout", "--json /dev/stdout is a folder or a device; give the name of a file"),
        ("train --status /dev/null", "--status /dev/null is a folder or a device"),
        ("train --status /dev/fd/1", "--status /dev/fd/1 is a folder or a device"),
        ("report --html /", "--html / is a folder or a device"),
        ("convert", "missing argument 'FILE'; `routesae convert --help` lists what there is"),
        ("run", "--config is missing"),
        ("interpret --latents some", "--latents 'some' is not a whole number"),
        ("trian", "no such command 'trian'"),
    ],
)
def test_wrong_input_of_every_kind_is_one_line_and_exit_code_2(arguments: str, line: str) -> None:
    assert line in refused(*arguments.split())


@pytest.mark.parametrize(
    ("command", "room", "remedy"),
    [
        ("harvest", "harvest.run.harvest", "lower --batch-sequences"),
        ("analyze", "analyze.scores.run.analyze", "lower --batch-sequences"),
        ("train", "train.run.train", "lower --batch-tokens or --max-memory"),
        ("contexts", "analyze.contexts.run.contexts", "lower --batch-tokens"),
        ("report", "analyze.report.run.write_report", "lower what it has to hold"),
        ("cache verify shards", "harvest.cache.verify.verify", "lower what it has to hold"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"
        ),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_where_memory_runs_out_one_line_names_the_flag_to_lower(
    error: Exception, command: str, room: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: Any) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"routesae.{room}", full)
    line = refused(*command.split(), code=1)
    assert f"out of memory: {remedy} (" in line
    assert str(error).split("\n")[0] in line


def test_flags_say_which_ones_stand_on_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bytes, paths and choices come through as typed, --no-… as False, and `all` as None."""
    seen: list[Any] = []
    monkeypatch.setattr("routesae.harvest.run.harvest", lambda settings, report: seen.append(settings))
    monkeypatch.setattr("routesae.analyze.interpret.run.interpret", lambda settings, report: seen.append(settings))
    monkeypatch.setattr("routesae.analyze.clamp.run.clamp", lambda settings, report: seen.append(settings))
    invoke("harvest", "--tokens", "2M", "--keep-special", "--out", tmp_path / "x")
    invoke("interpret", "--latents", "all", "--score", "fuzzing", "--out", tmp_path)
    invoke("clamp", "--no-error-term", "--no-chat", "--set", "1=2", "--set", "3=4")
    harvest, interpret, clamp = seen
    assert harvest == HarvestSettings(tokens=2_000_000, keep_special=True, out=str(tmp_path / "x"))
    assert (interpret.latents, interpret.scores) == (None, ("fuzzing",))
    assert (clamp.error_term, clamp.chat, clamp.set) == (False, False, ("1=2", "3=4"))


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


def test_version_is_the_packages() -> None:
    assert invoke("--version").stdout.split()[-1] == __version__


# --------------------------------------------------------------------------------------------------- results


def test_table_and_json_hold_the_same_numbers(
    tiny_cache: Cache, saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    metrics = [word for name in ("NormMSE", "L0", "KLDiv", "DeltaCE", "Recovered") for word in ("--metric", name)]
    file = tmp_path / "scores.json"
    result = invoke("analyze", *metrics, "--cache", tiny_cache.path, "--out", saes, "--json", file)
    assert result.exit_code == 0, result.output
    header, units, _, *lines, last = result.stdout.splitlines()
    assert units.split() == ["nats"] * 4
    scores = json.loads(file.read_text())
    assert last == f"on {scores['tokens_scored']:,} held-out tokens of {shortened(tiny_cache.manifest.corpus, 40)}"
    assert len(lines) == len(scores["saes"]) == 2
    for line, row in zip(lines, scores["saes"], strict=True):
        shown = dict(zip(header.split(), re.split(r"\s{2,}", line.strip()), strict=True))
        assert set(row) - set(shown) == {"folder", "intervals"}
        for name, cell in shown.items():
            value, _, half = cell.partition(" ±")
            if isinstance(row[name], float):
                digits = len(value.partition(".")[2])
                assert float(value.replace(",", "")) == round(row[name], digits)
                low, high = row["intervals"][name]
                assert float(half or 0) == round((high - low) / 2, digits)
                assert not half or len(half.replace(".", "").lstrip("0")) == 2
            else:
                assert value == str(row[name])
        for name in ("NormMSE", "L0", "KLDiv", "KLDiv_seq", "DeltaCE", "CE_clean", "Recovered"):
            assert isinstance(row[name], float)


def test_json_files_never_hold_a_bare_nan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = {"sae": "x", "NormMSE": float("nan"), "intervals": {"NormMSE": (float("nan"), float("inf"))}}
    results = {"saes": [row], "tokens_scored": 1, "rows": "all", "cache": {"corpus": "x"}}
    monkeypatch.setattr("routesae.analyze.scores.run.analyze", lambda settings, report: results)
    assert invoke("analyze", "--json", tmp_path / "scores.json").exit_code == 0
    assert read_json(tmp_path / "scores.json")["saes"] == [
        {"sae": "x", "NormMSE": None, "intervals": {"NormMSE": [None, None]}}
    ]
    printed = invoke("analyze", "--json", "-")  # alone on standard output, for a pipe
    assert json.loads(printed.stdout)["saes"][0]["NormMSE"] is None


def test_results_are_shown_where_the_disk_does_not_take_their_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = {"saes": [{"sae": "x", "L0": 8.5}], "tokens_scored": 1, "rows": "all", "cache": {"corpus": "x"}}

    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("routesae.analyze.scores.run.analyze", lambda settings, report: results)
    monkeypatch.setattr("routesae.machine.files.write_json", full)
    result = invoke("analyze", "--json", tmp_path / "scores.json")
    assert result.exit_code == 1
    assert "8.5" in result.stdout
    assert "No space left" in result.stderr


def test_routing_shows_the_largest_shares_and_a_dash_where_there_is_no_router(tiny_cache: Cache, saes: Path) -> None:
    result = invoke("analyze", "--metric", "Routing", "--cache", tiny_cache.path, "--out", saes)
    *_, routed, single, _ = result.stdout.splitlines()
    assert routed.count("%") == 3
    assert single.split()[-2:] == ["-", "-"]


def test_harvest_says_what_it_wrote(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    arguments = ("harvest", "--model", tiny_model, "--data", tiny_corpus, "--tokens", "1k", "--context", "16")
    result = invoke(*arguments, "--layers", "3", "--device", "cpu", "--out", tmp_path / "shards")
    assert result.exit_code == 0, result.output
    kept = Cache(tmp_path / "shards").manifest.kept_tokens
    assert result.stdout == f"{tmp_path / 'shards'}: {kept:,} tokens x 1 layer x 32 in 1 shard\n"


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
        f"{copy}: 1 shard missing, which the same routesae harvest writes",
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
            f"{tmp_path / 'whole'}: 1 shard missing in {copy}; add further parts with "
            "routesae cache merge, or harvest them",
        ],
    )
    assert invoke("cache", "merge", tiny_cache.path, tmp_path / "whole").stdout.startswith(
        f"{tmp_path / 'whole'}: 1 shard copied"
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
    other = tmp_path / "other"
    other.mkdir()
    save_sae(other, build(Recipe(sae="topk", layers=(6,), width=32, latents=64, k=8)), {})
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
        ("train --cache CACHE --sae matryoshka --prefixes 8,16", "must rise and end with the SAE's 256"),
        ("train --cache CACHE --anneal-k-from 257", "--anneal-k-from 257 is more than the SAE's 256 latents"),
        ("train --cache CACHE --name x --k 8 --k 16", "two SAEs of this run would be saes/x"),
        ("train --cache CACHE --name ../x", "--name '../x'"),
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


def test_a_model_the_hub_will_not_give_is_refused_with_the_ways_out(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "shards"
    line = refused("harvest", "--model", "nobody/no-such-model", "--data", tiny_corpus, "--out", out)
    assert line.startswith("routesae: model 'nobody/no-such-model' cannot be loaded")
    assert all(way in line for way in ("hf auth login", "local folder", ".gguf", "demo"))
    assert not out.exists()


@pytest.mark.parametrize("device", ["cuda:3"])
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
    assert bool(re.search("missing|does not exist", line)) == (damage == "missing")


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


def interrupted(run: Command, when: Callable[[], bool]) -> list[str]:
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
    lines = interrupted(Command(*arguments, cwd=tmp_path), lambda: (shards / "shard-00001").exists())
    assert len(lines) == 1
    assert "run the same command again to go on" in lines[0]
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
    run = Command(*arguments, cwd=tmp_path)
    (line,) = interrupted(run, lambda: metrics.exists() and metrics.stat().st_size > 0)
    found = re.fullmatch(r"routesae: stopped after step (\d+) of \d+; the same command with --resume goes on", line)
    assert found is not None, line
    assert [path for path in (tmp_path / "saes").iterdir() if path.is_dir()] == [metrics.parent]
    (state,) = metrics.parent.glob("step-*")
    assert int(state.stem[5:]) == int(found[1])
    again = refused(*arguments, "--out", tmp_path / "saes")
    assert f"long was stopped after step {int(found[1])}; --resume continues it, --overwrite starts again" in again
    shorter = refused(*arguments, "--out", tmp_path / "saes", "--resume", "--epochs", "1")
    assert "long was begun with other settings: pass.epochs (was 100000, now 1)" in shorter


def cpu_seconds(*command: str, cwd: Path) -> float:
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=cwd, stdout=subprocess.DEVNULL, check=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime


def test_help_takes_less_time_than_importing_pydantic_and_click(tmp_path: Path) -> None:
    """The least of up to five runs of either: on a busy machine one may take half as long again."""
    for words in ("", "harvest", "train", "ablation", "interpret"):
        imports, helps = list[float](), list[float]()
        while not helps or min(helps) >= min(imports):
            assert len(helps) < 5, (words, imports, helps)
            imports.append(cpu_seconds("-c", "import pydantic.main, click", cwd=tmp_path))
            helps.append(cpu_seconds("-m", "routesae", *words.split(), "--help", cwd=tmp_path))


def test_no_help_imports_what_it_does_not_show(tmp_path: Path) -> None:
    """Values are checked by pydantic and rooms bring torch; help has no time for either."""
    heavy = ("torch", "numpy", "pydantic", "zarr", "transformers", "datasets", "openai", "pyarrow", "socket", "tqdm")
    code = f"""
import sys, click
from routesae.cli import main
for words in {[*OPTIONS, ""]!r}:
    command = main
    for word in words.split():
        command = command.commands[word]
    command.get_help(click.Context(command))
    assert not [name for name in {heavy} if name in sys.modules], words
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("words", ["--help", "train --help", "cache info SHARDS"])
def test_a_reader_that_hangs_up_ends_it_quietly_as_sigpipe_would(
    words: str, tiny_cache: Cache, tmp_path: Path
) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "routesae", *words.replace("SHARDS", str(tiny_cache.path)).split()]
    run = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (run.returncode, run.stderr) == (128 + signal.SIGPIPE, "")


# ------------------------------------------------------------------------------------- what strangers have written


ATTACK = "x\x1b[2J\x9b\u202e\u2028\ny"
SPELLED = "x<U+001B>[2J<U+009B><U+202E><U+2028><U+000A>y"


def test_what_a_stranger_wrote_does_not_act_on_the_terminal(tiny_cache: Cache, tmp_path: Path) -> None:
    shards = shutil.copytree(tiny_cache.path, tmp_path / "shards")
    attributes = tiny_cache.manifest.to_dict() | {"model": ATTACK, "corpus": ATTACK, "versions": {ATTACK: ATTACK}}
    write_group(shards, attributes)
    outputs = [invoke("cache", "info", shards).output]
    nowhere = tmp_path / ATTACK
    outputs += [invoke("train", "--cache", nowhere).output, invoke("train", "--config", nowhere).output]
    outputs += [invoke("train", ATTACK).output, invoke(ATTACK).output, invoke("train", f"--{ATTACK}").output]
    outputs += [invoke("push", nowhere, "user/name").output, invoke("train", "--sae", ATTACK).output]
    (tmp_path / "evil.toml").write_text(json.dumps(ATTACK) + " = 1\n")
    outputs += [invoke("train", "--config", tmp_path / "evil.toml").output]
    for output in outputs:
        assert not set(output) & set(ATTACK) - set("x[2Jy\n")
        assert "U+001B" in output or "\\x1b" in output
    assert len([line for line in outputs[0].splitlines() if line == "y"]) == 0
    for output in outputs[1:]:
        assert len(output.splitlines()) == 1


def test_a_terminal_without_unicode_is_no_reason_to_fail(tiny_cache: Cache, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "routesae", "cache", "info", str(tiny_cache.path)]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (0, b"")
    assert b"layer \\u2113" in run.stdout


@pytest.mark.parametrize(
    "name", ["a b", "a\x1b[2J", "a\n", "ä", "-x", ".x", "a/b", "..", "a\udc80", "x" * 201, "a\u202e"]
)
@pytest.mark.parametrize("command", ["train", "convert x.pt"])
def test_names_take_plain_characters_alone_and_one_message_says_so(command: str, name: str) -> None:
    line = refused(*command.split(), f"--name={name}")
    assert line.endswith("is not a plain folder name; use letters, digits and . _ - + = only")


# ---------------------------------------------------------------------------------------- latents of a text, compared


def test_latents_of_a_text_a_file_and_a_conversation_are_listed(saes: Path, tmp_path: Path) -> None:
    text = "the router reads a hidden state"
    (tmp_path / "text.txt").write_text(text)
    shown = invoke(
        "latents", "--sae", saes / "topk", "--text", text, "--device", "cpu", "--json", tmp_path / "a.json"
    )
    assert shown.exit_code == 0, shown.output
    assert invoke("latents", "--sae", saes / "topk", "--file", tmp_path / "text.txt").stdout == shown.stdout
    rows = json.loads((tmp_path / "a.json").read_text())
    assert "".join({row["position"]: row["token"] for row in rows}.values()) == text
    first = next(row for row in rows if row["latent"] is not None)
    assert f"{first['latent']} ({first['activation']:.1f})" in shown.stdout
    for given, message in (
        ((), "give the text by one of --text, --file and --messages"),
        (("--text", "a", "--file", "b"), "give the text by one of"),
        (("--file", tmp_path / "absent"), "--file .*absent does not exist"),
        (("--messages", "[{"), "--messages cannot be read"),
        (("--messages", '[{"role": "user", "content": "a"}]'), "no chat template"),
        (("--text", ""), "--text '' is empty"),
    ):
        assert re.search(message, refused("latents", "--sae", saes / "topk", *given))


def test_two_saes_are_compared(tiny_cache: Cache, saes: Path, tmp_path: Path) -> None:
    given = ("--cache", tiny_cache.path, "--threshold", "0.2", "--json", tmp_path / "a.json")
    shown = invoke("compare", saes / "topk", saes / "routesae", *given)
    assert shown.exit_code == 0, shown.output
    written = json.loads((tmp_path / "a.json").read_text())
    assert [row["by"] for row in written["counts"]] == ["decoder", "activations", "both"]
    assert str(written["counts"][0]["shared"]) in shown.stdout
    assert "are one SAE" in refused("compare", saes / "topk", saes / "topk", *given)
    assert "is above 1" in refused("compare", saes / "topk", saes / "routesae", "--threshold", "2")
