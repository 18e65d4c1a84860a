"""Train SAEs on a cache, all of them in one pass over its batches, with no LM in sight.

    shards → batches → normalised → each SAE: loss → gradient → Adam → … → saes/NAME/

Dimension letters: L layers, N tokens a batch.
"""

import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch

from routesae import __version__
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.verify import require_intact
from routesae.machine.device import has_bfloat16_units, keep_freed_memory, require_packages
from routesae.machine.files import disk_faults
from routesae.machine.lock import Lock, hold
from routesae.machine.stop import stop_code, stop_requests
from routesae.reporting import FailedRun, Progress, Report, Stopped, WrongInput, silent
from routesae.train.evaluate import CacheScores, score_on_cache
from routesae.train.folder.checkpoint import commit_folder, save_sae
from routesae.train.jobs import Job, first_step, is_finished, jobs_of, source_of
from routesae.train.loading.batches import (
    Batch,
    Plan,
    Selection,
    epoch_plans,
    largest_share,
    load,
    read_sample,
    share_of,
    windows_of,
)
from routesae.train.loading.following import Following, begun_cache
from routesae.train.log import StepLog
from routesae.train.ranks.distributed import ALONE, Ranks, joined_ranks
from routesae.train.saes import SAE, build
from routesae.train.saes.normalise import Hidden
from routesae.train.settings import TrainSettings
from routesae.train.sparse.policy import chosen, exactly
from routesae.train.state import drop_checkpoints
from routesae.train.trackers import open_trackers
from routesae.train.trainee import Pace, Trainee

log = logging.getLogger(__name__)

INITIAL_SAMPLE_TOKENS = 8192  # what b_dec's geometric median is taken over
DEAD_AFTER_TOKENS = 10_000_000  # 2406.04093, appendix A.2
MANY_DEAD = 0.3  # of the latents; a run that ends with more is remarked on
WORSE = 1.25  # times the NormMSE of the first step; however short, a run that learns ends below
_FAILED = 1 << 16  # what ranks agree on when one of them cannot go on; above the number of any signal


class TrainResult(NamedTuple):
    """folder: where the SAE is. held_out: its scores on the held-out rows; None if the cache has none."""

    folder: Path
    held_out: CacheScores | None


def train(settings: TrainSettings, report: Report = silent) -> list[TrainResult]:
    """Train the settings' SAEs on the cache's training rows and write each, whole or not at all.

    With `resume`, SAEs that are finished already stay as they are and have no result. Of several ranks, rank 0 reads
    and writes the folders and has the results.
    Raises WrongInput for a cache or setting that cannot be used and for an SAE that another process trains, FailedRun
    if training cannot go on or an SAE, which is kept, did not learn, Stopped if asked to stop: a checkpoint is left.
    """
    for name in settings.log:
        require_packages(f"--log {name}", name, name)
    locks: list[Lock] = []
    kept, again = "the last checkpoint stays", "give the same command with --resume"
    faults = disk_faults(Path(settings.out), lambda: kept, lambda: bool(locks), again)
    joined = joined_ranks(settings.device, dividing=settings.shard or settings.cpu_offload)
    with faults, joined as ranks, ExitStack() as stack:
        report = report if ranks.first else silent
        with ranks.all_or_none():
            device = ranks.device(settings.device)
            stack.enter_context(torch.autocast(device.type, enabled=False))  # a caller's own
            cache = begun_cache(settings.cache) if settings.follow else Cache(settings.cache)
            if settings.verify and ranks.first:
                require_intact(cache, report)
            jobs = jobs_of(settings, cache)
            folders = [job.folder for job in jobs]
            selection = _selection(cache, jobs, settings, ranks)
            pace = pace_of(selection, settings, device)
            for job in jobs if ranks.first else []:
                job.folder.parent.mkdir(parents=True, exist_ok=True)
                lock = hold(job.folder.with_name(f".{job.name}.lock"), f"the SAE {job.folder}")
                locks.append(stack.enter_context(lock))
            finished = [ranks.first and is_finished(job, settings) for job in jobs]
        jobs = [job for job, done in zip(jobs, ranks.broadcast(finished), strict=True) if not done]
        if not jobs:
            return []
        with ranks.all_or_none():
            _require_memory(jobs, settings, pace)
            begun = first_step(jobs, settings) if ranks.first else 0
        begun = int(ranks.broadcast([begun])[0])
        with ranks.all_or_none():
            windows = windows_of(selection, settings.batch_tokens, settings.window)
            following = Following(selection, windows, pace.total_steps) if settings.follow else None
            if following and ranks.first:
                following.register(folders, begun, stack)
            for job in jobs if begun == 0 and ranks.first else []:  # now that nothing refuses the run any more
                shutil.rmtree(job.partial, ignore_errors=True)
                job.partial.mkdir(parents=True)
        keep_freed_memory()
        log.info("peak learning rate %s", ", ".join(f"{lr:g}" for lr in sorted({job.lr for job in jobs})))
        with ranks.all_or_none():
            trainees = [trainee_of(job, settings, pace, device, stack, ranks) for job in jobs]
        _set_weights(trainees, begun, selection, settings, following)
        arithmetic = trainees[0].arithmetic
        log.info("training on %s: %s", device, arithmetic)
        with arithmetic.applied():
            fit(trainees, selection, settings, begun, report, locks, following)
            if following:
                following.wait(range(cache.manifest.first_held_out_shard, cache.manifest.shard_count))
            saes = [trainee.whole_sae().eval() for trainee in trainees]  # which every rank takes part in
            _own_again(locks)
            finishing = zip(trainees, saes, strict=True) if ranks.first else ()
            with exactly(device.type):  # as analyze scores
                results = [_finish(trainee, sae, settings, cache, report) for trainee, sae in finishing]
    for trainee, result in zip(trainees if ranks.first else [], results, strict=True):
        _require_learning(trainee, result)
    return results


def _selection(cache: Cache, jobs: Sequence[Job], settings: TrainSettings, ranks: Ranks) -> Selection:
    """The training rows of every layer that an SAE reads. Raises WrongInput if there are too few."""
    layers = sorted({layer for job in jobs for layer in job.recipe.layers})
    if not settings.follow:
        cache.require_whole()
        if cache.ring():
            raise WrongInput(f"{cache.path} is a ring, whose shards go once they are used; train on it with --follow")
    selection = Selection(cache, 0, cache.manifest.train_rows, layers, growing=settings.follow)
    if cache.manifest.train_rows == 0:
        raise WrongInput(
            f"{cache.path} was harvested with --held-out {cache.manifest.held_out:g}, for scoring alone, so there is "
            "no row to train on; give another --cache"
        )
    if len(selection) == 0:
        raise WrongInput(f"{cache.path} has no kept token in its training rows; harvest more text")
    if settings.batch_tokens < ranks.world:
        raise WrongInput(
            f"--batch-tokens {settings.batch_tokens} is below the {ranks.world} processes that divide it; raise it"
        )
    return selection


def pace_of(selection: Selection, settings: TrainSettings, device: torch.device) -> Pace:
    total_steps, _ = planned(selection, settings)
    run_tokens = total_steps * min(settings.batch_tokens, len(selection))
    units, asked = has_bfloat16_units(device), {"threads": torch.get_num_threads(), "max_memory": settings.max_memory}
    return Pace(
        total_steps=total_steps,
        epoch_steps=len(step_tokens(selection, settings)),
        dead_after_tokens=settings.dead_after_tokens or min(DEAD_AFTER_TOKENS, max(1, run_tokens // 4)),
        sparsity_warmup=settings.sparsity_warmup,
        arithmetic=chosen(device.type, bfloat16_units=units, precision=settings.precision, **asked),
        seed=settings.seed,
    )


def _require_memory(jobs: Sequence[Job], settings: TrainSettings, pace: Pace) -> None:
    """Raises WrongInput if --max-memory is too small."""
    most = max(job.recipe.latents for job in jobs)
    if pace.arithmetic.rows_at_once(1, most, torch.float32) == 0:
        raise WrongInput(
            f"--max-memory {settings.max_memory:,} bytes do not hold the {most:,} pre-activations of one token; "
            f"give {4 * most:,} or more"
        )


def trainee_of(
    job: Job, settings: TrainSettings, pace: Pace, device: torch.device, stack: ExitStack, ranks: Ranks = ALONE
) -> Trainee:
    """A new SAE ready to be trained; the stack closes its log."""
    sae = build(job.recipe, torch.Generator().manual_seed(settings.seed)).to(device).train()
    names = settings.log if ranks.first else ()
    trackers = open_trackers(names, job.name, job.partial, job.settings.to_dict(), settings.log_project)
    step_log = StepLog(sae, job.partial if ranks.first else None, trackers, job.lr)
    stack.callback(step_log.close)
    return Trainee(sae, job, pace, step_log, ranks)


def _set_weights(
    trainees: Sequence[Trainee],
    begun: int,
    selection: Selection,
    settings: TrainSettings,
    following: Following | None,
) -> None:
    """Give the SAEs their weights after step `begun`: initial ones of step 0, else those of the checkpoints."""
    if begun == 0 and following:
        following.open(following.windows[0])
    if begun == 0:
        _initialise(trainees, selection, settings)
    for trainee in trainees if settings.shard or settings.cpu_offload else []:
        trainee.divide(offload=settings.cpu_offload)
    with trainees[0].ranks.all_or_none():
        for trainee in trainees if begun else []:
            trainee.load(begun)


@torch.no_grad()
def _initialise(trainees: Sequence[Trainee], selection: Selection, settings: TrainSettings) -> None:
    """Start biases, thresholds and scales from a sample of the data, the same on every rank."""
    ranks, device = trainees[0].ranks, trainees[0].device
    with ranks.all_or_none():
        if ranks.first:
            size, window = INITIAL_SAMPLE_TOKENS, settings.window
            sample = read_sample(selection, seed=settings.seed, tokens=size, window=window)
            hidden = Hidden(*(tensor.to(device) for tensor in sample), layers=selection.layers)
            for trainee in trainees:
                torch.manual_seed(settings.seed << 32)  # a random router draws
                trainee.sae.initialise(hidden)
                if source := source_of(trainee.job.settings):
                    if dict(source.hashes) != trainee.job.identity["run"]["warm_start"]:
                        raise FailedRun(f"--from {trainee.job.settings.warm_start} was replaced; begin again")
                    begin_from(trainee.sae, source)
    for trainee in trainees:
        ranks.share(list(trainee.sae.state_dict().values()))
        (trainee.sae.scale,) = ranks.broadcast([trainee.sae.scale])


@torch.no_grad()
def begin_from(sae: SAE, source: SAE) -> None:
    """Give the SAE the weights of another, whose latents are its first; the others keep their own."""
    if sae.recipe.normalize == "dataset":
        source.fold_scale(1 / sae.scale)
    theirs = dict(source.named_parameters())
    for name, parameter in sae.named_parameters():
        parameter[tuple(map(slice, theirs[name].shape))] = theirs[name].to(sae.device)


def fit(
    trainees: Sequence[Trainee],
    selection: Selection,
    settings: TrainSettings,
    begun: int,
    report: Report = silent,
    locks: Sequence[Lock] = (),
    following: Following | None = None,
) -> None:
    """The training loop: each round takes one step of every SAE. begun: steps that are done already."""
    total_steps, plans = planned(selection, settings)
    tokens_of_steps = step_tokens(selection, settings)
    ranks, device = trainees[0].ranks, trainees[0].device
    shares = (share_of(plan, ranks.rank, ranks.world) for plan in islice(plans, begun, None))
    most = largest_share(settings.batch_tokens, ranks.world)
    stage = f"train {trainees[0].job.name}" if len(trainees) == 1 else f"train {len(trainees)} SAEs"
    saved = begun
    with stop_requests() as stop, ExitStack() as stack:
        arriving = following.batches(shares, begun, most, device, stop) if following else None
        batches = stack.enter_context(closing(arriving or load(selection, shares, most, device)))
        for step in range(begun + 1, total_steps + 1):
            began = time.perf_counter()
            batch: Batch | None = None
            failure: Exception | None = None
            try:
                batch = next(batches)
            except (FailedRun, WrongInput, OSError, Stopped) as error:
                failure = error  # the other ranks wait for this one, to end together
            waited = time.perf_counter() - began
            request = stop() if step > begun + 1 or failure else None
            if request and isinstance(failure, Stopped):
                failure = None
            # All ranks end with the same step, whichever of them was asked to stop or has no batch.
            if reason := ranks.largest(_FAILED if failure else request or 0):
                if saved < step - 1:
                    _checkpoint(trainees, step - 1, locks)
                if failure is not None:
                    raise failure
                if reason == _FAILED:
                    raise Stopped("", 1)  # the rank that failed reports why
                line = f"stopped after step {step - 1} of {total_steps}; the same command with --resume goes on"
                raise Stopped(line if ranks.first else "", stop_code(signal.Signals(reason)))
            assert batch is not None
            hidden = Hidden(*batch, layers=selection.layers)
            tokens = tokens_of_steps[(step - 1) % len(tokens_of_steps)]
            for trainee in trainees:
                trainee.log.waited_seconds += waited
                trainee.step(step, hidden, tokens)
            last = step == total_steps
            if last or step % settings.log_every_steps == 0:
                shown = {trainee.job.name: trainee.log.write(step, len(trainee.dead_d)) for trainee in trainees}
                one = next(iter(shown.values())) if len(shown) == 1 else None
                facts = one or {name: line["NormMSE"] for name, line in shown.items()}
                report(Progress(stage, step, total_steps, "steps", facts))
            is_due = following is not None and following.is_full(step)
            if last or is_due or step % settings.checkpoint_every_steps == 0:
                _checkpoint(trainees, step, locks)
                saved = step
                if following:
                    following.passed(step)


def _checkpoint(trainees: Sequence[Trainee], step: int, locks: Sequence[Lock]) -> None:
    """Save all SAEs, then delete their older checkpoints. Raises FailedRun if weights are NaN or infinite."""
    _own_again(locks)
    for trainee in trainees:
        trainee.save(step)
    for trainee in trainees if trainees[0].ranks.first else []:
        drop_checkpoints(trainee.job.partial, but=step)


def _own_again(locks: Sequence[Lock]) -> None:
    """Take the locks again that were deleted, perhaps with their folder. Raises FailedRun if another has one now."""
    for lock in locks:
        if not lock.held():
            lock.release()
            lock.path.parent.mkdir(parents=True, exist_ok=True)
            if not lock.take():
                raise FailedRun(f"{lock.path} was deleted, and another process trains there now; nothing is saved")


def _finish(trainee: Trainee, sae: SAE, settings: TrainSettings, cache: Cache, report: Report) -> TrainResult:
    """Score the SAE, save it and give its folder its name. Raises FailedRun if it reconstructs no numbers."""
    job, dead, manifest = trainee.job, trainee.log.dead, cache.manifest
    if dead > MANY_DEAD:
        log.warning(
            "%s: %.0f %% of its latents are dead: active on none of the last %d tokens; train on more tokens, or "
            "with fewer --latents, a larger --k or another --lr",
            *(job.name, 100 * dead, trainee.pace.dead_after_tokens),
        )
    sae.fold()
    held_out = None
    if cache.kept(manifest.train_rows, manifest.rows).any():
        held_out = score_on_cache(sae, cache, manifest.train_rows, manifest.rows, report)
        if not math.isfinite(held_out.norm_mse):
            raise FailedRun(f"training ended with a NormMSE of {held_out.norm_mse}; lower --lr {job.lr}")
        trainee.log.write_held_out(trainee.pace.total_steps, held_out.to_dict())
    else:
        log.warning("%s has no held-out rows; nothing to score the SAE on", cache.path)
    trainee.log.keep()
    trainee.log.close()  # a tracker may write into the folder, which is about to be renamed
    source = {
        # An SAE does not depend on whether its run was stopped and continued, so its record does not say so.
        "settings": {
            **settings.to_dict(),
            "runs": None,
            "follow": False,
            "resume": False,
            "overwrite": False,
            "run": job.settings.to_dict(),
        },
        "identity": job.identity,
        "arithmetic": trainee.arithmetic.to_dict(),
        "cache": {**manifest.to_dict(), "path": settings.cache},  # as given: a pushed SAE shows no home folder
        "model": manifest.model,
        "corpus": manifest.corpus,
        "context": manifest.context,
        "held_out": None if held_out is None else held_out.to_dict(),
        "versions": {"routesae": __version__, "torch": torch.__version__},
    }
    save_sae(job.partial, sae, source)
    commit_folder(job.partial, job.folder)
    drop_checkpoints(job.folder)
    return TrainResult(job.folder, held_out)


def _require_learning(trainee: Trainee, result: TrainResult) -> None:
    """Raise FailedRun if an SAE, which is kept, is worse than no SAE and than it was at first."""
    start, scores = float(trainee.log.start), result.held_out
    if scores is not None and scores.fvu > 1 and scores.norm_mse > WORSE * start:
        raise FailedRun(
            f"{result.folder} ended worse than the mean of its input, and than it began: held-out FVU "
            f"{scores.fvu:.3g}, NormMSE {scores.norm_mse:.3g}, {start:.3g} at first; it is kept; lower --lr and "
            "train again"
        )


def planned(selection: Selection, settings: TrainSettings) -> tuple[int, Iterator[Plan]]:
    """The number of steps and their batches: whole epochs, or as many batches as `tokens` needs."""
    epoch_steps, size, window = len(step_tokens(selection, settings)), settings.batch_tokens, settings.window
    if settings.tokens is None:
        total_steps = (settings.epochs or 1) * epoch_steps
    else:
        total_steps = max(1, round(settings.tokens * epoch_steps / len(selection)))
    plans = (
        epoch_plans(selection, seed=settings.seed, epoch=epoch, batch_tokens=size, window=window)
        for epoch in range(-(-total_steps // epoch_steps))
    )
    return total_steps, islice(chain.from_iterable(plans), total_steps)


def step_tokens(selection: Selection, settings: TrainSettings) -> list[int]:
    """N of the batch of every step of an epoch."""
    windows = windows_of(selection, settings.batch_tokens, settings.window)
    return [tokens for window in windows for tokens in window.batch_tokens]
