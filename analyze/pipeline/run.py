"""Run all stages in one go, and again only what has changed.

    harvest → train → analyze → contexts → interpret → report

out/pipeline.json keeps, for each step, what went into it (settings, and hashes of what it read) and hashes of what it
wrote. A step whose inputs are the same and whose output is as it was left is skipped; train and contexts are a step
for each SAE. A cache is never replaced, nor are answers that were paid for, nor an SAE that was not trained from
here: those are refused, with what to do.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from routesae.analyze.contexts.file import FACTS, PARTS, place_of
from routesae.analyze.contexts.run import contexts
from routesae.analyze.inputs.saes import cache_identity
from routesae.analyze.interpret.ledger import LINES, SUMMARY
from routesae.analyze.interpret.run import interpret
from routesae.analyze.interpret.summary import read_summary, require_answers
from routesae.analyze.pipeline.settings import PipelineSettings
from routesae.analyze.pipeline.together import harvesting
from routesae.analyze.report.run import write_report
from routesae.analyze.scores.results import DESCRIPTIONS, described, read_results
from routesae.analyze.scores.run import analyze
from routesae.harvest.cache.reader import Cache
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.machine.device import require_packages
from routesae.machine.files import file_hash, read_signed, reading, signed, write_json
from routesae.machine.lock import hold
from routesae.reporting import Report, WrongInput, silent
from routesae.train.folder.checkpoint import CONFIG, find_saes, read_source
from routesae.train.jobs import Job, jobs_of
from routesae.train.loading.following import begun_cache
from routesae.train.run import train
from routesae.train.settings import TrainSettings
from routesae.train.state import drop_checkpoints, load_checkpoint, newest_step

log = logging.getLogger(__name__)

RECORD, SCORES, REPORT = "pipeline.json", "scores.json", "report.html"
LARGEST_RECORD = 1 << 26  # it lists every file of the corpus
# Settings that say where and how fast, and change nothing of a cache.
HOW_IT_RUNS = ("device", "batch_sequences", "worker", "workers", "keep")


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    """stages: {stage: whether it ran, or was skipped}, in order. saes: their folders. scores: what analyze found."""

    stages: dict[str, bool]
    saes: list[Path]
    scores: dict[str, Any] | None


def run_pipeline(settings: PipelineSettings, report: Report = silent) -> PipelineResult:
    """Run the stages that the settings have, or what has changed of them.

    Raises WrongInput where something cannot be used or would be lost, or another process runs a pipeline on the same
    folder, and whatever the stages raise; what was done stays, and the same call goes on.
    """
    out = settings.out
    if settings.report is not None:
        require_packages("the report", "report", "jinja2", "matplotlib")
    if settings.interpret is not None and "interpret" not in Record(out / RECORD).steps:
        settings.interpret.key()  # a missing key is reported now and not after the harvest
    out.mkdir(parents=True, exist_ok=True)
    with hold(out / ".pipeline.lock", f"the pipeline's out {out}"):
        return _run(settings, Record(out / RECORD), report)


def _run(settings: PipelineSettings, record: Record, report: Report) -> PipelineResult:
    stages: dict[str, bool] = {}
    together = settings.follow and not _is_whole(settings.cache)
    if together and settings.harvest is not None and settings.train is not None:
        with harvesting(settings.harvest):
            jobs = jobs_of(settings.train, begun_cache(str(settings.cache)))
            _train(settings.train, jobs, {"cache": None}, record, report)
    scores, page = settings.out / SCORES, settings.out / REPORT
    for name in ("harvest", "harvest_analyze", "harvest_contexts"):
        if (corpus := getattr(settings, name)) is not None:
            stages[name] = _harvest(name, corpus, record, report)
    readers = (settings.train, settings.analyze, settings.contexts, settings.report, settings.interpret)
    caches = {of.cache: Cache(of.cache) for of in readers if of is not None and of.cache is not None}
    for cache in caches.values():
        cache.require_whole()
    folders = []
    if settings.train is not None:
        jobs = jobs_of(settings.train, caches[settings.train.cache])
        folders = [job.folder for job in jobs]
        of_cache = _origin(caches[settings.train.cache])
        if together:
            record.keep(*_train_steps(jobs, of_cache))
        stages["train"] = _train(settings.train, jobs, of_cache, record, report) or together
    elif any((settings.analyze, settings.contexts, settings.interpret, settings.report)):
        folders = find_saes(settings.saes)
    of_saes = {f"SAE {folder.name}": hashes(folder) for folder in folders}
    saes = tuple(map(str, folders))
    read = next((of.cache for of in readers[2:] if of is not None), None)  # by contexts, and what comes of them
    described = None if read is None else caches[read]
    facts = [place_of(folder, described.manifest.to_dict()) / FACTS for folder in folders if described is not None]
    origin = of_saes | ({} if described is None else _origin(described))

    if (analyzing := settings.analyze and settings.analyze.replace(saes=saes)) is not None:
        step = Step("analyze", {**analyzing.to_dict(), **of_saes, **_origin(caches[analyzing.cache])}, (scores,))
        stages["analyze"] = record.run([step], lambda stale: write_json(scores, analyze(analyzing, report)))
    if (collecting := settings.contexts) is not None:
        shared = {**collecting.to_dict(), **_origin(caches[collecting.cache])}
        steps = [
            Step(f"contexts {folder.name}", {**shared, one: of_saes[one]}, (of, *map(of.with_name, PARTS)))
            for folder, of, one in zip(folders, facts, of_saes, strict=True)
        ]

        def collect(stale: Sequence[Step]) -> None:
            overwrite = collecting.overwrite or all(map(record.may_replace, stale))
            left = tuple(str(folder) for folder, step in zip(folders, steps, strict=True) if step in stale)
            contexts(collecting.replace(saes=left, overwrite=overwrite), report)

        stages["contexts"] = record.run(steps, collect)
    if (asking := settings.interpret and settings.interpret.replace(saes=saes)) is not None:
        prompts = [Path(file) for file in (asking.prompt,) if file]
        inputs = {**asking.to_dict(), **origin, **hashes(*facts, *prompts)}
        step = Step("interpret", inputs, tuple(folder / SUMMARY for folder in folders))
        lost = any(summary.lost for folder in folders if (summary := read_summary(folder)) is not None)
        stages["interpret"] = record.run([step], lambda stale: interpret(asking, report), again=lost)
    if settings.analyze is not None and described is not None:
        _describe_again(scores, described.manifest.tokens_hash, record)
    if (showing := settings.report) is not None:
        showing = showing.replace(saes=saes, html=str(page), scores=str(scores) if scores.is_file() else None)
        shown = [scores, *facts, *(folder / SUMMARY for folder in folders)]
        step = Step("report", {**showing.to_dict(), **origin, **hashes(*shown)}, (page,))
        stages["report"] = record.run([step], lambda stale: write_report(showing, report))
    if settings.interpret is not None:
        require_answers([summary for folder in folders if (summary := read_summary(folder)) is not None])
    found = read_results(scores) if settings.analyze is not None else None
    return PipelineResult(stages=stages, saes=folders, scores=found)


def _origin(cache: Cache) -> dict[str, str]:
    return {"cache": cache_identity(cache)["fingerprint"]}


def _harvest(stage: str, asked: HarvestSettings, record: Record, report: Report) -> bool:
    cache = Path(asked.out)
    inputs = {name: value for name, value in asked.to_dict().items() if name not in HOW_IT_RUNS}
    inputs |= {"files of data": [listing(data) for data in asked.data], "files of model": listing(asked.model)}
    inputs = plain(inputs)
    whole = _is_whole(cache)
    before = record.steps.get(stage, {}).get("inputs", {})
    for name, shown in (("data", asked.corpus), ("model", asked.model)):
        same_name = before.get(name) == inputs[name] and before.get("out") == inputs["out"]
        if same_name and whole and before.get(f"files of {name}") != inputs[f"files of {name}"]:
            raise WrongInput(
                f"{shown} has changed since {cache} was harvested, and a cache is never replaced; "
                f"give another out or cache, or delete {cache}"
            )
    step = Step(stage, inputs, (cache / "zarr.json",))
    return record.run([step], lambda stale: harvest(asked, report), again=not whole)


def _is_whole(cache: Path) -> bool:
    return (cache / "zarr.json").exists() and not Cache(cache).missing()


def _train_steps(jobs: Sequence[Job], origin: Mapping[str, Any]) -> list[Step]:
    of_job = [{**job.identity["run"], **job.identity["recipe"], **job.identity["pass"], **origin} for job in jobs]
    return [Step(f"train {job.name}", inputs, (job.folder,)) for job, inputs in zip(jobs, of_job, strict=True)]


def _train(
    training: TrainSettings, jobs: Sequence[Job], origin: Mapping[str, Any], record: Record, report: Report
) -> bool:
    """Train the SAEs that are not there as they are asked for.

    One that was not trained from here is not replaced, nor one about which answers were paid for.
    """
    steps = _train_steps(jobs, origin)
    for job, step in zip(jobs, steps, strict=True):
        if step.name not in record.steps and job.folder.exists():
            if read_source(job.folder).identity != job.identity:
                raise WrongInput(
                    f"{job.folder} is there with other settings, and was not trained from here, so it is not "
                    "replaced; give its [[train.run]] a name, or move it away"
                )
            drop_checkpoints(job.folder)  # of a run that was killed just before it dropped them
            record.keep(step)

    def work(stale: Sequence[Step]) -> None:
        again = [job for job, step in zip(jobs, steps, strict=True) if step in stale]
        for job in again:
            if (job.folder / LINES).exists():
                raise WrongInput(
                    f"{job.folder} would be trained again, and holds answers that were paid for, {LINES}; give its "
                    "[[train.run]] another name, or move the folder away"
                )
        stopped = all(
            (at := newest_step([job.partial])) and load_checkpoint(job.partial, at)[1] == job.identity
            for job in again
        )
        runs = tuple(job.settings for job in again)
        train(training.replace(runs=runs, resume=stopped, overwrite=not stopped), report)

    return record.run(steps, work)


def _describe_again(file: Path, tokens_hash: str, record: Record) -> None:
    """Put into the scores what contexts and interpret, which come after analyze, have found since."""
    results = read_results(file)
    rows = [
        {name: value for name, value in row.items() if name not in DESCRIPTIONS}
        | described(Path(row["folder"]), tokens_hash)
        for row in results["saes"]
    ]
    if rows != results["saes"]:
        write_json(file, signed(results | {"saes": rows}))
        record.keep(Step("analyze", record.steps["analyze"]["inputs"], (file,)))


# ------------------------------------------------------------------------------------------------- what was done


class Step(NamedTuple):
    """A stage, or a stage for one SAE. outputs: the files it writes, or the SAE's folder."""

    name: str
    inputs: Mapping[str, Any]
    outputs: tuple[Path, ...]


class Record:
    """pipeline.json: {step: its inputs and outputs when it last ended}."""

    def __init__(self, path: Path):
        self.path = path
        self.steps: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        with reading(path, "delete it, and stages run again"):
            self.steps = dict(read_signed(path, LARGEST_RECORD)["steps"])

    def is_stale(self, step: Step) -> bool:
        """Whether it has not ended, or not with these inputs, or its output is not as it left it."""
        if (kept := self.steps.get(step.name)) is None:
            return True
        then, now = kept["inputs"], plain(step.inputs)
        changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        if not changed and kept["outputs"] == hashes(*step.outputs):
            log.info("%s: unchanged, skipped", step.name)
            return False
        why = f"changed: {', '.join(changed)}" if changed else "what it left is gone or was altered"
        log.info("%s runs again, %s", step.name, why)
        return True

    def may_replace(self, step: Step) -> bool:
        """Whether what is there of a step's outputs is what the step left."""
        outputs = hashes(*step.outputs)
        return not any(outputs.values()) or self.steps.get(step.name, {}).get("outputs") == outputs

    def keep(self, *steps: Step) -> None:
        """Note steps that ended; on the disk at once."""
        for step in steps:
            self.steps[step.name] = {"inputs": plain(step.inputs), "outputs": hashes(*step.outputs)}
        write_json(self.path, signed({"steps": self.steps}))

    def run(self, steps: Sequence[Step], work: Callable[[list[Step]], object], *, again: bool = False) -> bool:
        """Do the work of the stale steps, if any; returns whether there were. again: they are all stale."""
        stale = [step for step in steps if again or self.is_stale(step)]
        if stale:
            work(stale)
            self.keep(*stale)
        return bool(stale)


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def hashes(*paths: Path) -> dict[str, str | None]:
    """The hash of each file, or None if it is not there; of a folder, those of what makes an SAE."""
    files = [
        file
        for path in paths
        for file in ((path / CONFIG, *sorted(path.glob("*.safetensors"))) if path.is_dir() else (path,))
    ]
    return {str(file): file_hash(file) if file.is_file() else None for file in files}


def listing(path: str) -> list[tuple[str, int, int]] | None:
    """Name, bytes and time of every file at a path; None if there is none, as with a hub id."""
    at = Path(path)
    if not at.exists():
        return None
    files = [at] if at.is_file() else sorted(file for file in at.rglob("*") if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
