"""All stages in one go: their settings in; cache, SAEs, scores, contexts, explanations and report out.

    harvest → train → analyze → contexts → interpret → report

out/pipeline.json keeps what each stage was given (settings, and hashes of what it read) and hashes of what it left.
A stage whose inputs are the same and whose output is still there as it was left is skipped. One whose inputs changed
runs again, train and contexts for the SAEs concerned alone. A cache is never replaced, nor are answers that were paid
for, nor an SAE that was not trained from here: those are refused, with what to do.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routesae.analyze.contexts.file import CONTEXTS, LATENTS
from routesae.analyze.contexts.run import contexts
from routesae.analyze.inputs.identity import cache_identity, file_hash
from routesae.analyze.interpret.run import SUMMARY, interpret, lost, require_answers
from routesae.analyze.pipeline.settings import PipelineSettings
from routesae.analyze.report.run import require_libraries, write_report
from routesae.analyze.scores.run import DESCRIPTIONS, analyze, described
from routesae.harvest.cache.reader import Cache
from routesae.harvest.run import harvest
from routesae.machine.device import pick_device
from routesae.machine.files import read_json
from routesae.reporting import Report, WrongInput, silent
from routesae.train.folder.checkpoint import CONFIG, find_saes, read_config
from routesae.train.jobs import Job, jobs_of
from routesae.train.run import train
from routesae.train.settings import TrainSettings
from routesae.train.state import load_checkpoint, newest_step

log = logging.getLogger(__name__)

FORMAT = 1
RECORD, SCORES, REPORT = "pipeline.json", "scores.json", "report.html"
# Settings that say where and how fast, and change nothing of a cache.
HOW_IT_RUNS = ("device", "batch_sequences", "worker", "workers")


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    """stages: {stage: whether it ran, or was skipped}, in order. saes: their folders. scores: what analyze found."""

    stages: dict[str, bool]
    saes: list[Path]
    scores: dict[str, Any] | None


def run_pipeline(settings: PipelineSettings, report: Report = silent) -> PipelineResult:
    """Run the stages that the settings have, or what has changed of them.

    Raises WrongInput where something cannot be used or would be lost, and whatever the stages raise; what was done
    stands, and the same call goes on.
    """
    record = Record(settings.out / RECORD)
    if settings.report is not None:
        require_libraries()
    if settings.interpret is not None and not record.kept("interpret"):
        settings.interpret.chat.key()  # missing, it is said now and not after the harvest
    settings.out.mkdir(parents=True, exist_ok=True)
    stages: dict[str, bool] = {}
    if settings.harvest is not None:
        stages["harvest"] = _harvest(settings, record, report)
    cache = Cache(settings.cache)
    cache.require_whole()
    fingerprint = cache_identity(cache)["fingerprint"]
    if settings.train is not None:
        jobs = jobs_of(settings.train, cache, pick_device(settings.train.device))
        stages["train"] = _train(settings.train, jobs, fingerprint, record, report)
        folders = [job.folder for job in jobs]
    else:
        needed = any((settings.analyze, settings.contexts, settings.interpret, settings.report))
        folders = find_saes(settings.saes) if needed else []
    inputs = {"cache": fingerprint, **{f"SAE {folder.name}": sae_files(folder) for folder in folders}}
    saes = tuple(map(str, folders))
    if settings.analyze is not None:
        stages["analyze"] = _analyze(settings, saes, inputs, record, report)
    if settings.contexts is not None:
        stages["contexts"] = _contexts(settings, folders, inputs, record, report)
    if settings.interpret is not None:
        stages["interpret"] = _interpret(settings, folders, inputs, record, report)
    if settings.analyze is not None:
        _describe_anew(settings.out / SCORES, record)
    if settings.report is not None:
        stages["report"] = _report(settings, folders, inputs, record, report)
    if settings.interpret is not None:
        require_answers([json.loads((folder / SUMMARY).read_bytes()) for folder in folders])
    scores = json.loads((settings.out / SCORES).read_text()) if settings.analyze is not None else None
    return PipelineResult(stages=stages, saes=folders, scores=scores)


# ------------------------------------------------------------------------------------------------- what was done


Outputs = Mapping[str, Any] | None
"""Hashes of what a step leaves; None while it is not all there."""


class Record:
    """pipeline.json: {step: inputs and outputs}. A step is a stage, or a stage and an SAE."""

    def __init__(self, path: Path):
        self.path = path
        self.steps: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            found = read_json(path, largest=1 << 26)  # it has a hash for every file of the corpus
            if found["format"] == FORMAT:
                self.steps = dict(found["steps"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WrongInput(f"{path} cannot be read ({error!r}); delete it, and stages run again") from error

    def kept(self, step: str) -> dict[str, Any]:
        """Inputs and outputs of a step; {} where it never ended."""
        return self.steps.get(step, {})

    def unchanged(self, step: str, inputs: Mapping[str, Any], outputs: Outputs) -> bool:
        """Whether the step ended with these inputs and left these outputs; says in the log why it did not."""
        kept = self.kept(step)
        if not kept:
            return False
        now, then = _plain(inputs), kept["inputs"]
        changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        if not changed and outputs is not None and kept["outputs"] == _plain(outputs):
            return True
        why = f"changed: {', '.join(changed)}" if changed else "what it left is gone or was altered"
        log.info("%s runs again, %s", step, why)
        return False

    def keep(self, step: str, inputs: Mapping[str, Any], outputs: Outputs) -> None:
        """Note a step that ended; on the disk at once."""
        if outputs is None:
            return
        self.steps[step] = {"inputs": _plain(inputs), "outputs": _plain(outputs)}
        _write_whole(self.path, json.dumps({"format": FORMAT, "steps": self.steps}, indent=2) + "\n")

    def run(
        self, step: str, inputs: Mapping[str, Any], outputs: Callable[[], Outputs], work: Callable[[], None]
    ) -> bool:
        """Do the work unless it is done; whether there was any to do."""
        if self.unchanged(step, inputs, outputs()):
            log.info("%s: unchanged, skipped", step)
            return False
        work()
        self.keep(step, inputs, outputs())
        return True


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def hashes(*files: Path) -> dict[str, str | None]:
    """Of each file, None where it is not there."""
    return {str(file): file_hash(file) if file.is_file() else None for file in files}


def sae_files(folder: Path) -> dict[str, str | None]:
    """Hashes of what makes an SAE."""
    return hashes(folder / CONFIG, *sorted(folder.glob("*.safetensors")))


def listing(path: str) -> list[tuple[str, int, int]] | None:
    """Name, bytes and time of every file at a path; None where there is none, as with a hub id."""
    at = Path(path)
    if not at.exists():
        return None
    files = [at] if at.is_file() else sorted(file for file in at.rglob("*") if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


# ----------------------------------------------------------------------------------------------------- the stages


def _harvest(settings: PipelineSettings, record: Record, report: Report) -> bool:
    asked = settings.harvest
    assert asked is not None
    what = {name: value for name, value in asked.to_dict().items() if name not in HOW_IT_RUNS}
    inputs = {**what, "files of data": listing(asked.data), "files of model": listing(asked.model)}

    def outputs() -> dict[str, Any] | None:
        if not (settings.cache / "zarr.json").exists() or (cache := Cache(settings.cache)).missing():
            return None
        return {"fingerprint": cache_identity(cache)["fingerprint"]}

    before = record.kept("harvest").get("inputs", {})
    for name in ("data", "model"):
        files = f"files of {name}"
        same_name = before.get(name) == what[name] and before.get("out") == what["out"]
        if same_name and outputs() and before[files] != _plain(inputs)[files]:
            raise WrongInput(
                f"{what[name]} has changed since {settings.cache} was harvested, and a cache is never replaced; "
                f"give another out or cache, or delete {settings.cache}"
            )
    return record.run("harvest", inputs, outputs, lambda: _ignore(harvest(asked, report)))


def _ignore(result: object) -> None:
    """What a stage returns is read from its files."""


def _train(settings: TrainSettings, jobs: Sequence[Job], cache: str, record: Record, report: Report) -> bool:
    def inputs(job: Job) -> dict[str, Any]:
        return {**job.identity["run"], **job.identity["recipe"], **job.identity["pass"], "cache": cache}

    stale = []
    for job in jobs:
        step = f"train {job.folder.name}"
        if record.unchanged(step, inputs(job), sae_files(job.folder)):
            log.info("%s: unchanged, skipped", step)
        elif not record.kept(step) and job.folder.exists():
            _require_ours(job)
            record.keep(step, inputs(job), sae_files(job.folder))
            log.info("%s: trained already, skipped", step)
        else:
            stale.append(job)
    if not stale:
        return False
    runs = tuple(job.settings for job in stale)
    goes_on = all(_goes_on(job) for job in stale)
    train(settings.replace(runs=runs, resume=goes_on, overwrite=not goes_on), report)
    for job in stale:
        record.keep(f"train {job.folder.name}", inputs(job), sae_files(job.folder))
    return True


def _require_ours(job: Job) -> None:
    """Raises WrongInput unless the SAE that is there is the one that would be trained."""
    config = read_config(job.folder)
    source = config.get("metadata", {}).get("routesae", {}).get("source", {})
    if source.get("identity") != job.identity:
        raise WrongInput(
            f"{job.folder} is there with other settings, and was not trained from here, so it is not replaced; "
            "give its [[train.run]] a name, or move it away"
        )


def _goes_on(job: Job) -> bool:
    """Whether a stopped run of just this SAE left a checkpoint."""
    step = newest_step([job.partial])
    return bool(step) and load_checkpoint(job.partial, step)[1] == job.identity


def _analyze(
    settings: PipelineSettings, saes: tuple[str, ...], inputs: Mapping[str, Any], record: Record, report: Report
) -> bool:
    asked, file = settings.analyze, settings.out / SCORES
    assert asked is not None
    asked = asked.replace(saes=saes)

    def work() -> None:
        _write_whole(file, json.dumps(analyze(asked, report), indent=2) + "\n")

    return record.run("analyze", {**asked.to_dict(), **inputs}, lambda: hashes(file), work)


def _describe_anew(file: Path, record: Record) -> None:
    """Put into the scores what contexts and interpret, which come after analyze, have found since."""
    results = json.loads(file.read_bytes())
    rows = [
        {name: value for name, value in row.items() if name not in DESCRIPTIONS} | described(Path(row["folder"]))
        for row in results["saes"]
    ]
    if rows != results["saes"]:
        _write_whole(file, json.dumps(results | {"saes": rows}, indent=2) + "\n")
        record.keep("analyze", record.kept("analyze")["inputs"], hashes(file))


def _write_whole(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)


def _contexts(
    settings: PipelineSettings, folders: Sequence[Path], inputs: Mapping[str, Any], record: Record, report: Report
) -> bool:
    asked = settings.contexts
    assert asked is not None

    def given(folder: Path) -> dict[str, Any]:
        own = {"cache": inputs["cache"], "SAE": inputs[f"SAE {folder.name}"]}
        return {**asked.to_dict(), **own}

    stale = []
    for folder in folders:
        step = f"contexts {folder.name}"
        if record.unchanged(step, given(folder), hashes(folder / CONTEXTS, folder / LATENTS)):
            log.info("%s: unchanged, skipped", step)
        else:
            stale.append(folder)
    if not stale:
        return False
    contexts(asked.replace(saes=tuple(map(str, stale))), report)
    for folder in stale:
        record.keep(f"contexts {folder.name}", given(folder), hashes(folder / CONTEXTS, folder / LATENTS))
    return True


def _interpret(
    settings: PipelineSettings, folders: Sequence[Path], inputs: Mapping[str, Any], record: Record, report: Report
) -> bool:
    asked = settings.interpret
    assert asked is not None
    asked = asked.replace(saes=tuple(map(str, folders)))
    read = hashes(*(folder / CONTEXTS for folder in folders), *(Path(file) for file in [asked.prompt] if file))

    def outputs() -> Outputs:
        files = [folder / SUMMARY for folder in folders]
        summaries = [json.loads(file.read_bytes()) for file in files if file.is_file()]
        return None if any(map(lost, summaries)) else hashes(*files)

    given = {**asked.to_dict(), **inputs, **read}
    return record.run("interpret", given, outputs, lambda: _ignore(interpret(asked, report)))


def _report(
    settings: PipelineSettings, folders: Sequence[Path], inputs: Mapping[str, Any], record: Record, report: Report
) -> bool:
    asked, file, scores = settings.report, settings.out / REPORT, settings.out / SCORES
    assert asked is not None
    asked = asked.replace(
        saes=tuple(map(str, folders)),
        html=str(file),
        scores=str(scores) if scores.is_file() else None,
    )
    read = hashes(scores, *(folder / name for folder in folders for name in (CONTEXTS, SUMMARY)))
    given = {**asked.to_dict(), **inputs, **read}
    return record.run("report", given, lambda: hashes(file), lambda: _ignore(write_report(asked, report)))
