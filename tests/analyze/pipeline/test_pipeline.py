"""`routesae run`: every stage once, nothing twice, what changed again, and nothing lost that was not asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from routesae.analyze.contexts.file import read_facts
from routesae.analyze.pipeline import run as pipeline
from routesae.analyze.pipeline.run import PipelineResult, run_pipeline
from routesae.analyze.pipeline.settings import read_pipeline
from routesae.cli import main
from routesae.harvest.cache.reader import Cache
from routesae.machine.files import signed
from routesae.reporting import FailedRun, Progress, Report, WrongInput, silent
from routesae.train.run import train
from routesae.train.settings import settings_of

TRAIN = """
[train]
latents = 64
batch-tokens = 1024
checkpoint-every = 2
device = "cpu"

[[train.run]]
sae = "topk"
layer = 3
k = 8
name = "first"

[[train.run]]
sae = "routesae"
k = 6
name = "second"
"""
ANALYZE = """
[analyze]
metric = ["NormMSE", "KLDiv"]
tokens = 64
device = "cpu"
"""
CONTEXTS = """
[contexts]
threshold = 0.5
device = "cpu"
"""


@pytest.fixture
def begun(tiny_cache: Cache, tmp_path: Path) -> Callable[..., PipelineResult]:
    """Runs a file of these tables on the tiny cache, in tmp_path/out."""

    def run(*tables: str, report: Report = silent) -> PipelineResult:
        file = tmp_path / "pipeline.toml"
        file.write_text(f"out = '{tmp_path / 'out'}'\ncache = '{tiny_cache.path}'\n" + "".join(tables))
        return run_pipeline(read_pipeline(str(file)), report)

    return run


def written(folder: Path) -> dict[str, int]:
    """When each file below was last written."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


# --------------------------------------------------------------------------------------------------- done once


def test_from_text_to_report_once_and_then_nothing(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    out, file, corpus = tmp_path / "out", tmp_path / "pipeline.toml", tmp_path / "texts.jsonl"
    shutil.copy(tiny_corpus, corpus)
    harvest = f"[harvest]\nmodel = '{tiny_model}'\ndata = '{corpus}'\ntokens = 9000\ncontext = 16\n"
    shape = "shard-tokens = 2048\nlayers = '2-5'\ndevice = 'cpu'\n"
    file.write_text(f"out = '{out}'\n" + harvest + shape + TRAIN + ANALYZE + CONTEXTS + "[report]\ndevice = 'cpu'\n")
    first = CliRunner().invoke(main, ["run", "--config", str(file)])
    assert first.exit_code == 0, first.output
    stages = ("harvest", "train", "analyze", "contexts", "report")
    assert "; ".join(f"{stage}: done" for stage in stages) in first.stdout
    lines = [line.split()[0] for line in first.stdout.splitlines() if line.strip()]
    assert {"first", "second"} <= set(lines)
    there = written(out)
    expected = {
        "shards/zarr.json",
        "saes/first/cfg.json",
        "scores.json",
        "report.html",
    }
    assert expected | {"pipeline.json"} <= set(there)
    assert list((out / "saes/second/contexts").glob("*/contexts.parquet"))
    second = CliRunner().invoke(main, ["run", "--config", str(file)])
    assert "; ".join(f"{stage}: unchanged" for stage in stages) in second.stdout
    assert changed(there, written(out)) == set()

    file.write_text(file.read_text().replace("tokens = 9000", "tokens = 8000"))
    refused = CliRunner().invoke(main, ["run", "--config", str(file)])
    assert (refused.exit_code, "begun with other settings: tokens is 9000, not 8000" in refused.stderr) == (2, True)
    file.write_text(file.read_text().replace("tokens = 8000", "tokens = 9000"))
    with corpus.open("a") as more:
        more.write(json.dumps({"text": "another document " * 20}) + "\n")
    refused = CliRunner().invoke(main, ["run", "--config", str(file)])
    assert refused.exit_code == 2
    assert f"{corpus} has changed since {out / 'shards'} was harvested" in refused.stderr
    assert changed(there, written(out)) == set()


def test_stages_without_a_table_do_not_run(begun: Callable[..., PipelineResult], tmp_path: Path) -> None:
    assert begun(TRAIN).stages == {"train": True}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"saes", "pipeline.json"}
    assert begun(ANALYZE).stages == {"analyze": True}  # of every SAE that is there


# ----------------------------------------------------------------------------------------------- what changed


def test_an_sae_whose_settings_changed_and_all_that_rests_on_it_run_again(
    begun: Callable[..., PipelineResult], tmp_path: Path
) -> None:
    begun(TRAIN, ANALYZE, CONTEXTS)
    before = written(tmp_path / "out")
    result = begun(TRAIN.replace("k = 8", "k = 4"), ANALYZE, CONTEXTS)
    assert result.stages == {"train": True, "analyze": True, "contexts": True}
    touched = changed(before, written(tmp_path / "out"))
    assert {"saes/first/sae_weights.safetensors", "scores.json"} <= touched
    assert any(name.startswith("saes/first/contexts/") for name in touched)
    assert [name for name in touched if name.startswith("saes/second")] == []
    assert json.loads((tmp_path / "out/saes/first/cfg.json").read_text())["k"] == 4


def test_an_sae_is_trained_again_if_the_one_that_it_began_from_was_replaced(
    begun: Callable[..., PipelineResult], tiny_cache: Cache, tmp_path: Path
) -> None:
    source = {"sae": "topk", "layer": 3, "latents": 32, "k": 8, "cache": str(tiny_cache.path), "out": str(tmp_path)}
    train(settings_of({**source, "name": "source", "device": "cpu"}))
    warm = TRAIN.replace('name = "first"', f'name = "first"\nfrom = "{tmp_path}/source"')
    assert begun(warm).stages == {"train": True}
    assert begun(warm).stages == {"train": False}
    train(settings_of({**source, "name": "source", "device": "cpu", "seed": 1, "overwrite": True}))
    assert begun(warm).stages == {"train": True}


def test_scores_hold_what_contexts_and_interpret_found_after_analyze(
    begun: Callable[..., PipelineResult], tmp_path: Path
) -> None:
    """analyze comes before them, so its file is written again, and stays what it is when nothing changes."""
    scores = tmp_path / "out" / "scores.json"
    first = begun(TRAIN, ANALYZE, CONTEXTS)
    features = {folder.name: read_facts(folder)["features"] for folder in first.saes}
    assert {row["sae"]: row["Features"] for row in json.loads(scores.read_text())["saes"]} == features
    assert first.scores == json.loads(scores.read_text())
    before = written(tmp_path / "out")
    assert begun(TRAIN, ANALYZE, CONTEXTS).stages == {"train": False, "analyze": False, "contexts": False}
    assert changed(before, written(tmp_path / "out")) == set()
    begun(TRAIN, ANALYZE, CONTEXTS.replace("0.5", "1000.0"))
    assert {row["Features"] for row in json.loads(scores.read_text())["saes"]} == {0}
    assert begun(TRAIN, ANALYZE, CONTEXTS.replace("0.5", "1000.0")).stages["analyze"] is False


def test_an_sae_more_leaves_the_others_as_they_are(begun: Callable[..., PipelineResult], tmp_path: Path) -> None:
    begun(TRAIN)
    before = written(tmp_path / "out/saes")
    assert begun(TRAIN, "[[train.run]]\nsae = 'vanilla'\nlayer = 4\nname = 'third'\n", ANALYZE).stages["train"]
    assert all(name.startswith("third/") for name in changed(before, written(tmp_path / "out/saes")))
    rows = json.loads((tmp_path / "out/scores.json").read_text())["saes"]
    assert [row["sae"] for row in rows] == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ((ANALYZE, ANALYZE.replace("64", "32")), "analyze"),
        ((CONTEXTS, CONTEXTS.replace("0.5", "0.25")), "contexts"),
    ],
)
def test_a_stage_whose_settings_changed_runs_again_alone(
    change: tuple[str, str], again: str, begun: Callable[..., PipelineResult], caplog: pytest.LogCaptureFixture
) -> None:
    tables = (TRAIN, ANALYZE, CONTEXTS)
    begun(*tables)
    caplog.set_level("INFO", logger="routesae")
    result = begun(*(change[1] if table == change[0] else table for table in tables))
    assert result.stages == {name: name == again for name in ("train", "analyze", "contexts")}
    named = {"analyze": "tokens", "contexts": "threshold"}[again]
    assert any(f"runs again, changed: {named}" in record.getMessage() for record in caplog.records)
    assert any(record.getMessage() == "train first: unchanged, skipped" for record in caplog.records)


@pytest.mark.parametrize("lost", ["scores.json", "saes/first/contexts/*/contexts.parquet", "saes/first"])
def test_what_is_gone_is_made_again(lost: str, begun: Callable[..., PipelineResult], tmp_path: Path) -> None:
    begun(TRAIN, ANALYZE, CONTEXTS)
    (path,) = (tmp_path / "out").glob(lost)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    begun(TRAIN, ANALYZE, CONTEXTS)
    assert path.exists()
    assert set(begun(TRAIN, ANALYZE, CONTEXTS).stages.values()) == {False}


def test_altered_weights_are_trained_anew_to_what_they_were(
    begun: Callable[..., PipelineResult], tmp_path: Path
) -> None:
    begun(TRAIN)
    file = tmp_path / "out/saes/first/sae_weights.safetensors"
    expected, altered = load_file(file), load_file(file)
    altered["W_dec"] = altered["W_dec"] * 2
    save_file(altered, file)
    assert begun(TRAIN).stages == {"train": True}
    assert {name: tensor.tolist() for name, tensor in load_file(file).items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }


def test_a_stopped_training_goes_on_from_its_checkpoint(begun: Callable[..., PipelineResult]) -> None:
    steps: list[int] = []

    def interrupt(progress: Progress) -> None:
        if progress.unit == "steps":
            steps.append(progress.done)
            if progress.done == 5:
                raise KeyboardInterrupt

    often = TRAIN.replace("checkpoint-every = 2", "checkpoint-every = 2\nlog-every-steps = 1")
    with pytest.raises(KeyboardInterrupt):
        begun(often, report=interrupt)
    assert steps == [1, 2, 3, 4, 5]
    steps.clear()
    assert begun(often, report=lambda p: steps.append(p.done) if p.unit == "steps" else None).stages["train"]
    assert steps[0] == 5  # the checkpoint is of step 4


# ------------------------------------------------------------------------------------------------ nothing lost


def test_an_sae_of_the_same_name_from_elsewhere_is_refused_and_kept(
    begun: Callable[..., PipelineResult], tiny_cache: Cache, tmp_path: Path
) -> None:
    other = {"sae": "topk", "layer": 3, "latents": 32, "k": 2, "batch_tokens": 4096, "name": "first", "device": "cpu"}
    train(settings_of({**other, "cache": str(tiny_cache.path), "out": str(tmp_path / "out/saes")}))
    before = written(tmp_path / "out/saes")
    with pytest.raises(WrongInput, match=r"first is there with other settings, and was not trained from here"):
        begun(TRAIN)
    assert changed(before, written(tmp_path / "out/saes")) == set()


def test_without_its_record_what_is_trained_is_recognised(
    begun: Callable[..., PipelineResult], tmp_path: Path
) -> None:
    begun(TRAIN)
    before = written(tmp_path / "out/saes")
    (tmp_path / "out/pipeline.json").unlink()
    assert begun(TRAIN).stages == {"train": False}
    assert changed(before, written(tmp_path / "out/saes")) == set()


def test_a_checkpoint_that_a_killed_run_left_is_no_part_of_its_sae(
    begun: Callable[..., PipelineResult], tmp_path: Path
) -> None:
    sae = begun(TRAIN).saes[0]
    record = (tmp_path / "out/pipeline.json").read_bytes()
    (tmp_path / "out/pipeline.json").unlink()
    shutil.copy(sae / "sae_weights.safetensors", sae / "step-00000004.safetensors")  # killed just before it went
    begun(TRAIN)
    assert not list(sae.glob("step-*"))
    assert (tmp_path / "out/pipeline.json").read_bytes() == record


def test_contexts_are_the_same_whether_or_not_others_were_there(
    begun: Callable[..., PipelineResult], tmp_path: Path
) -> None:
    begun(TRAIN, CONTEXTS)
    names = ("contexts.json", "facts.json")
    files = [path for name in names for path in (tmp_path / "out/saes").glob(f"*/contexts/*/{name}")]
    first = [path.read_bytes() for path in files]
    (tmp_path / "out/pipeline.json").unlink()
    files[-1].unlink()
    begun(TRAIN, CONTEXTS)
    assert (len(files), [path.read_bytes() for path in files]) == (4, first)


def test_a_second_pipeline_on_a_folder_is_refused_naming_the_owner(begun: Callable[..., PipelineResult]) -> None:
    refusals: list[str] = []

    def again(progress: Progress) -> None:
        if not refusals:
            with pytest.raises(WrongInput, match=r"the pipeline's out .* is in use by process \d+") as refusal:
                begun(TRAIN)
            refusals.append(str(refusal.value))

    assert begun(TRAIN, report=again).stages == {"train": True}
    assert len(refusals) == 1
    assert begun(TRAIN).stages == {"train": False}


def test_an_sae_about_which_answers_were_paid_for_is_not_trained_again(
    begun: Callable[..., PipelineResult], tmp_path: Path
) -> None:
    begun(TRAIN)
    for name in ("first", "second"):
        (tmp_path / f"out/saes/{name}/interpretations.jsonl").write_text("paid for")
    before = written(tmp_path / "out/saes")
    with pytest.raises(WrongInput, match=r"first would be trained again, and holds answers that were paid for"):
        begun(TRAIN.replace("latents = 64", "latents = 64\nlr = 0.002"))
    assert changed(before, written(tmp_path / "out/saes")) == set()
    assert begun(TRAIN).stages == {"train": False}


@pytest.mark.parametrize("name", ["pipeline.json", "scores.json"])
def test_a_flipped_digit_of_what_the_pipeline_reads_is_named(
    name: str, begun: Callable[..., PipelineResult], tmp_path: Path
) -> None:
    begun(TRAIN, ANALYZE)
    file = tmp_path / "out" / name
    file.write_text(file.read_text().replace('"first"', '"firsu"').replace("1", "2", 1))
    if name == "scores.json":
        assert begun(TRAIN, ANALYZE).stages == {"train": False, "analyze": True}  # it is made again
        return
    with pytest.raises(WrongInput, match=r"pipeline.json cannot be read \(it is not what was written"):
        begun(TRAIN, ANALYZE)


def test_unanswered_questions_are_asked_again_and_answered_ones_are_not(
    begun: Callable[..., PipelineResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []

    def fake(settings: Any, report: Report) -> list[dict[str, Any]]:
        calls.append(settings.saes)
        summary = signed({"unanswered": 1 if len(calls) == 1 else 0, "last_loss": "hung up", "score": 3.0})
        for folder in settings.saes:
            (Path(folder) / "interpretations.json").write_text(json.dumps(summary))
        return [summary]

    monkeypatch.setattr(pipeline, "interpret", fake)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    tables = (TRAIN, CONTEXTS, "[interpret]\nlatents = 'all'\nmax-cost = 1\n")
    with pytest.raises(FailedRun, match=r"2 questions got no answer \(hung up\)"):
        begun(*tables)
    assert [begun(*tables).stages["interpret"] for _ in range(2)] == [True, False]
    assert [len(saes) for saes in calls] == [2, 2]


def test_a_missing_key_is_said_before_anything_runs(
    begun: Callable[..., PipelineResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(WrongInput, match="OPENAI_API_KEY"):
        begun(TRAIN, CONTEXTS, "[interpret]\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "has no stage to run"),
        ("[analyse]", "unknown setting 'analyse'; did you mean 'analyze'"),
        ("analyze = 3", "analyze is not a table"),
        ("out = 3\n[analyze]", "out = 3 is not the path"),
        ("[harvest]\ntoken = 3", r"\[harvest\]: unknown setting 'token'; did you mean 'tokens'"),
        ("[harvest]\ntokens = '9x'", r"\[harvest\]: --tokens '9x' is not a whole number"),
        ("[harvest]\nout = 'x'", r"\[harvest\]: out does not belong there, for `run` decides it; .* set out, cache"),
        ("[train]\nlatent = 3", r"\[train\]: unknown setting 'latent'; did you mean 'latents'"),
        ("[[train.run]]\nsaes = 'topk'", r"\[train\], \[\[run\]\]: unknown setting 'saes'; did you mean 'sae'"),
        (
            "follow = true\n[train]",
            r"\.toml: follow does not belong there, for `run` decides it; .* give the flag --follow",
        ),
        ("[train]\nfollow = true", r"\[train\]: follow does not belong there, .* give the flag --follow"),
        ("[train]\noverwrite = true", r"\[train\]: overwrite does not belong there, .*: what was stopped goes on"),
        ("[report]\nserve = true", r"\[report\]: serve does not belong there, .* give it to routesae report"),
        ("[analyze]\nmetric = ['KL']", r"\[analyze\]: --metric 'KL' is none of"),
        ("[analyze]\ninfer-k = [8, 'x']", r"\[analyze\]: --infer-k 'x' is not a whole number"),
        ("[contexts]\nthreshold = true", r"\[contexts\]: --threshold True is not a number"),
        ("[interpret]\ntemperatur = 1", r"\[interpret\]: unknown setting 'temperatur'; did you mean 'temperature'"),
        ("[interpret]\nretries = -1", r"\[interpret\]: --retries -1 is below 0"),
        ("[report]\nhtml = 'x'", r"\[report\]: html does not belong there, for `run` decides it"),
    ],
)
def test_a_mistake_in_the_file_is_named_before_anything_runs(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(text)
    with pytest.raises(WrongInput, match=named) as error:
        read_pipeline(str(file))
    assert str(error.value).count(str(file)) == 1
    assert list(tmp_path.iterdir()) == [file]


def test_the_example_is_one() -> None:
    settings = read_pipeline(str(Path(__file__).parents[3] / "examples/pipeline.toml"))
    assert settings.harvest is not None
    assert settings.harvest.model == "demo"
    assert settings.train is not None
    assert [run.sae for run in settings.train.runs] == ["topk", "routesae"]
    assert settings.analyze is not None
    assert "KLDiv" in settings.analyze.metrics
    assert read_pipeline(str(Path(__file__).parents[3] / "examples/three-corpora.toml")).contexts is not None


def test_one_file_trains_on_one_corpus_scores_on_another_and_reads_a_third(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    lines = tiny_corpus.read_text().splitlines(keepends=True)
    for name, part in (("eval", lines[40:80]), ("apply", lines[80:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    file = tmp_path / "three.toml"
    file.write_text(
        f"""out = "{tmp_path}/out"
[harvest]
model = "{tiny_model}"
data = "{tiny_corpus}"
tokens = 1500
context = 16
layers = "3"
held-out = 0
device = "cpu"
[harvest_analyze]
data = "{tmp_path}/eval.jsonl"
tokens = 400
[harvest_contexts]
data = "{tmp_path}/apply.jsonl"
tokens = 500
"""
        + TRAIN.replace('[[train.run]]\nsae = "routesae"\nk = 6\nname = "second"\n', "")
        + '[analyze]\nmetric = ["NormMSE"]\ndevice = "cpu"\n'
        + CONTEXTS
    )
    result = run_pipeline(read_pipeline(str(file)))
    assert result.scores is not None
    assert result.scores["cache"]["corpus"] == f"{tmp_path}/eval.jsonl"
    assert result.scores["rows_scored"] == [0, 25]
    assert result.scores["saes"][0]["Features"] >= 0  # of the contexts of the third
    facts = read_facts(result.saes[0])
    assert facts is not None
    assert facts["cache"]["corpus"] == f"{tmp_path}/apply.jsonl"
    assert Cache(tmp_path / "out/shards-contexts").manifest.train_rows == 0
    assert set(run_pipeline(read_pipeline(str(file))).stages.values()) == {False}
    named = f'[analyze]\ncache = "{tmp_path}/out/shards-contexts"'
    table = f'[harvest_analyze]\ndata = "{tmp_path}/eval.jsonl"\ntokens = 400\n'
    file.write_text(file.read_text().replace(table, "").replace("[analyze]", named))
    again = run_pipeline(read_pipeline(str(file)))
    assert again.scores is not None
    assert again.scores["cache"]["corpus"] == f"{tmp_path}/apply.jsonl"
