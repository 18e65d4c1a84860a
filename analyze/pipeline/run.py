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
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.inputs.identity import cache_identity, file_hash
from routesae.analyze.interpret.run import SUMMARY, interpret, lost, require_answers
from routesae.analyze.pipeline.settings import PipelineSettings
from routesae.analyze.report.run import require_libraries, write_report
from routesae.analyze.scores.run import DESCRIPTIONS, analyze, described
from routesae.harvest.cache.reader import Cache
from routesae.harvest.run import harvest
from routesae.machine.device import pick_device
from routesae.machine.files import read_json, write_json
from routesae.reporting import Report, WrongInput, silent
from routesae.train.folder.checkpoint import CONFIG, find_saes, read_config
from routesae.train.jobs import Job, jobs_of
from routesae.train.run import train
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
    stays, and the same call goes on.
    """
    out, stages = settings.out, {}
    record = Record(out / RECORD)
    if settings.report is not None:
        require_libraries()
    if settings.interpret is not None and "interpret" not in record.steps:
        settings.interpret.key()  # a missing key is reported now and not after the harvest
    out.mkdir(parents=True, exist_ok=True)
    if settings.harvest is not None:
        stages["harvest"] = _harvest(settings, record, report)
    cache = Cache(settings.cache)
    cache.require_whole()
    origin = {"cache": cache_identity(cache)["fingerprint"]}
    if settings.train is not None:
        jobs = jobs_of(settings.train, cache, pick_device(settings.train.device))
        stages["train"] = _train(settings, jobs, origin, record, report)
        folders = [job.folder for job in jobs]
    else:
        needed = any((settings.analyze, settings.contexts, settings.interpret, settings.report))
        folders = find_saes(settings.saes) if needed else []
    of_saes = {folder: {**origin, f"SAE {folder.name}": sae_files(folder)} for folder in folders}
    origin = {name: value for one in of_saes.values() for name, value in one.items()}
    saes = tuple(map(str, folders))
    facts = {folder: place_of(folder, cache.manifest.to_dict()) / FACTS for folder in folders}
    if (analyzing := settings.analyze) is not None:
        analyzing = analyzing.replace(saes=saes)
        step = Step("analyze", {**analyzing.to_dict(), **origin}, (out / SCORES,))
        stages["analyze"] = record.run(step, lambda: write_json(out / SCORES, analyze(analyzing, report)))
    if (collecting := settings.contexts) is not None:
        stages["contexts"] = _contexts(collecting, of_saes, facts, record, report)
    if (asking := settings.interpret) is not None:
        asking = asking.replace(saes=saes)
        read = [*facts.values()] + [Path(file) for file in [asking.prompt] if file]
        summaries = tuple(folder / SUMMARY for folder in folders)
        step = Step("interpret", {**asking.to_dict(), **origin, **hashes(*read)}, summaries)
        unanswered = any(lost(json.loads(file.read_bytes())) for file in summaries if file.is_file())
        stages["interpret"] = record.run(step, lambda: interpret(asking, report), again=unanswered)
    if settings.analyze is not None:
        _describe_again(out / SCORES, cache.manifest.tokens_hash, record)
    if (showing := settings.report) is not None:
        scores = str(out / SCORES) if (out / SCORES).is_file() else None
        showing = showing.replace(saes=saes, html=str(out / REPORT), scores=scores)
        read = [out / SCORES, *facts.values(), *(folder / SUMMARY for folder in folders)]
        step = Step("report", {**showing.to_dict(), **origin, **hashes(*read)}, (out / REPORT,))
        stages["report"] = record.run(step, lambda: write_report(showing, report))
    if settings.interpret is not None:
        require_answers([json.loads((folder / SUMMARY).read_bytes()) for folder in folders])
    found = json.loads((out / SCORES).read_bytes()) if settings.analyze is not None else None
    return PipelineResult(stages=stages, saes=folders, scores=found)


def _harvest(settings: PipelineSettings, record: Record, report: Report) -> bool:
    asked = settings.harvest
    assert asked is not None
    inputs = {name: value for name, value in asked.to_dict().items() if name not in HOW_IT_RUNS}
    inputs |= {"files of data": listing(asked.data), "files of model": listing(asked.model)}
    whole = (settings.cache / "zarr.json").exists() and not Cache(settings.cache).missing()
    before = record.steps.get("harvest", {}).get("inputs", {})
    for name in ("data", "model"):
        same_name = before.get(name) == inputs[name] and before.get("out") == inputs["out"]
        if same_name and whole and before[f"files of {name}"] != plain(inputs[f"files of {name}"]):
            raise WrongInput(
                f"{inputs[name]} has changed since {settings.cache} was harvested, and a cache is never replaced; "
                f"give another out or cache, or delete {settings.cache}"
            )
    step = Step("harvest", inputs, (settings.cache / "zarr.json",))
    return record.run(step, lambda: harvest(asked, report), again=not whole)


def _train(
    settings: PipelineSettings, jobs: Sequence[Job], origin: Mapping[str, Any], record: Record, report: Report
) -> bool:
    """Train the SAEs that are not there as they are asked for. One that was not trained from here is not replaced."""
    assert settings.train is not None
    steps = []
    for job in jobs:
        inputs = {**job.identity["run"], **job.identity["recipe"], **job.identity["pass"], **origin}
        step = Step(f"train {job.name}", inputs, (job.folder / CONFIG, *sorted(job.folder.glob("*.safetensors"))))
        if step.name not in record.steps and job.folder.exists():
            source = read_config(job.folder).get("metadata", {}).get("routesae", {}).get("source", {})
            if source.get("identity") != job.identity:
                raise WrongInput(
                    f"{job.folder} is there with other settings, and was not trained from here, so it is not "
                    "replaced; give its [[train.run]] a name, or move it away"
                )
            record.keep(step)
        steps.append(step)
    again = record.stale(steps)
    stale = [(step, job) for step, job in zip(steps, jobs, strict=True) if step in again]
    if stale:
        stopped = all(
            (at := newest_step([job.partial])) and load_checkpoint(job.partial, at)[1] == job.identity
            for _, job in stale
        )
        runs = tuple(job.settings for _, job in stale)
        train(settings.train.replace(runs=runs, resume=stopped, overwrite=not stopped), report)
        for step, job in stale:
            record.keep(step._replace(outputs=(job.folder / CONFIG, *sorted(job.folder.glob("*.safetensors")))))
    return bool(stale)


def _contexts(
    settings: ContextSettings,
    of_saes: Mapping[Path, Mapping[str, Any]],
    facts: Mapping[Path, Path],
    record: Record,
    report: Report,
) -> bool:
    shared = settings.to_dict()
    steps = [
        Step(f"contexts {folder.name}", {**shared, **inputs}, (facts[folder], *map(facts[folder].with_name, PARTS)))
        for folder, inputs in of_saes.items()
    ]
    if stale := record.stale(steps):
        overwrite = settings.overwrite or all(map(record.may_replace, stale))
        saes = tuple(str(folder) for folder, step in zip(of_saes, steps, strict=True) if step in stale)
        contexts(settings.replace(saes=saes, overwrite=overwrite), report)
        record.keep(*stale)
    return bool(stale)


def _describe_again(file: Path, tokens_hash: str, record: Record) -> None:
    """Put into the scores what contexts and interpret, which come after analyze, have found since."""
    results = json.loads(file.read_bytes())
    rows = [
        {name: value for name, value in row.items() if name not in DESCRIPTIONS}
        | described(Path(row["folder"]), tokens_hash)
        for row in results["saes"]
    ]
    if rows != results["saes"]:
        write_json(file, results | {"saes": rows})
        record.keep(Step("analyze", record.steps["analyze"]["inputs"], (file,)))


# ------------------------------------------------------------------------------------------------- what was done


class Step(NamedTuple):
    """A stage, or a stage for one SAE. outputs: the files it writes."""

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
        try:
            content = read_json(path, largest=1 << 26)  # it lists every file of the corpus
            if content["format"] == FORMAT:
                self.steps = dict(content["steps"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WrongInput(f"{path} cannot be read ({error!r}); delete it, and stages run again") from error

    def stale(self, steps: Sequence[Step]) -> list[Step]:
        """The steps that have not ended, or not with these inputs, or whose output is not as they left it."""
        stale = []
        for step in steps:
            kept, inputs = self.steps.get(step.name), plain(step.inputs)
            then = kept["inputs"] if kept else {}
            changed = sorted(name for name in inputs.keys() | then.keys() if inputs.get(name) != then.get(name))
            if kept and not changed and kept["outputs"] == hashes(*step.outputs):
                log.info("%s: unchanged, skipped", step.name)
                continue
            if kept:
                why = f"changed: {', '.join(changed)}" if changed else "what it left is gone or was altered"
                log.info("%s runs again, %s", step.name, why)
            stale.append(step)
        return stale

    def may_replace(self, step: Step) -> bool:
        """Whether what is there of a step's outputs is what the step left."""
        outputs = hashes(*step.outputs)
        return not any(outputs.values()) or self.steps.get(step.name, {}).get("outputs") == outputs

    def keep(self, *steps: Step) -> None:
        """Note steps that ended; on the disk at once."""
        for step in steps:
            self.steps[step.name] = {"inputs": plain(step.inputs), "outputs": hashes(*step.outputs)}
        write_json(self.path, {"format": FORMAT, "steps": self.steps})

    def run(self, step: Step, work: Callable[[], object], *, again: bool = False) -> bool:
        """Do the work unless it is done; returns whether there was any. again: do it whatever the record says."""
        if not again and not self.stale([step]):
            return False
        work()
        self.keep(step)
        return True


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def hashes(*files: Path) -> dict[str, str | None]:
    """The hash of each file, or None if it is not there."""
    return {str(file): file_hash(file) if file.is_file() else None for file in files}


def sae_files(folder: Path) -> dict[str, str | None]:
    """Hashes of what makes an SAE."""
    return hashes(folder / CONFIG, *sorted(folder.glob("*.safetensors")))


def listing(path: str) -> list[tuple[str, int, int]] | None:
    """Name, bytes and time of every file at a path; None if there is none, as with a hub id."""
    at = Path(path)
    if not at.exists():
        return None
    files = [at] if at.is_file() else sorted(file for file in at.rglob("*") if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
