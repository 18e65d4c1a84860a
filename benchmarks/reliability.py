"""Faults done to harvesters on purpose, and what they cost: the rows of RELIABILITY.md.

    python benchmarks/reliability.py harvest --kills 60

A tiny random LM; every harvester is a process of its own, forked from this one so that a trial takes a second. After
each trial one more harvester brings the cache to its end, and all its bytes are compared with those of a run that
nobody disturbed. Exit code 1 where a byte differs or a harvester ends otherwise than it should.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a fork must not find threads of its parent's

import torch
import zarr  # noqa: F401 what every harvester would else import for itself, for ten seconds
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers import logging as transformers_logging

from routesae.harvest.cache.arrays import array_hash
from routesae.harvest.cache.manifest import shard_arrays
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.verify import verify
from routesae.harvest.filling import shards
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.machine import lock
from routesae.reporting import FailedRun, Stopped, WrongInput

WIDTH, CONTEXT, SHARD_TOKENS, TOKENS = 32, 16, 2048, 20_000
FULL, STOPPED, WRONG = 10, 11, 12  # exit codes of harvesters here
TMPFS = 4_500_000  # bytes of the disk that is filled; the cache takes 2.9 MB in many small files
WAIT_SECONDS = 60.0


@dataclass
class Row:
    """One line of the table. problems: what was lost or went wrong, in words; none, one hopes."""

    fault: str
    checked: str
    trials: int = 0
    faults: int = 0
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        return f"| {self.fault} | {self.trials} | {self.faults} | {len(self.problems)} | {self.checked} |"


class Bench:
    """A model, a corpus, and the cache that an undisturbed run makes of them."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        preload()
        self.random = random.Random(seed)
        self.count = 0
        model(folder / "model")
        rng = random.Random(0)
        texts = (" ".join(rng.choices(["router", "layer", "latent", "a"], k=rng.randint(30, 90))) for _ in range(300))
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        began = time.monotonic()
        self.finish(folder / "whole")
        self.seconds = time.monotonic() - began
        self.expected = contents(folder / "whole")
        self.whole = Cache(folder / "whole")

    def settings(self, out: Path, **changes: Any) -> HarvestSettings:
        given: dict[str, Any] = {
            "model": str(self.folder / "model"),
            "data": str(self.folder / "texts.jsonl"),
            "tokens": TOKENS,
            "context": CONTEXT,
            "shard_tokens": SHARD_TOKENS,
            "layers": "1-2",
            "device": "cpu",
            "out": str(out),
        }
        return HarvestSettings(**{**given, **changes})

    def out(self) -> Path:
        self.count += 1
        return self.folder / f"trial-{self.count}"

    def start(self, out: Path, prepare: Callable[[], None] = lambda: None, **changes: Any) -> int:
        """The process id of a harvester. prepare: what it does first, in its own process."""
        if pid := os.fork():
            return pid
        code = 1
        try:
            log = os.open(self.folder / "log.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            prepare()
            harvest(self.settings(out, **changes))
            code = 0
        except FailedRun as failed:
            code = FULL if "no room left" in str(failed) else 1
            os.write(2, f"{failed}\n".encode())
        except WrongInput as wrong:
            code = WRONG
            os.write(2, f"{wrong}\n".encode())
        except Stopped as stopped:
            code = STOPPED if stopped.code == 0 else 1
        except BaseException:  # a forked child must end here, whatever it was
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)

    def finish(self, out: Path) -> None:
        """One more harvester, undisturbed."""
        if (code := ended(self.start(out))) != 0:
            log = (self.folder / "log.txt").read_text()[-3000:]
            raise RuntimeError(f"a harvester that nobody disturbed ended with {code}:\n{log}")

    def moment(self) -> float:
        return self.random.uniform(0.0, self.seconds)

    def compare(self, out: Path, row: Row, trial: str) -> None:
        """Finish the cache and note what of it is not as it should be."""
        self.finish(out)
        found = contents(out)
        if found != self.expected:
            differing = [
                name for name in found.keys() | self.expected.keys() if found.get(name) != self.expected.get(name)
            ]
            row.problems.append(f"{trial}: {len(differing)} files differ, such as {min(differing)}")
        shutil.rmtree(out)

    def look(self, out: Path, row: Row, until: float) -> int:
        """Read what a reader sees, over and over, until then; every array of every shard is to be whole and right."""
        looks = 0
        while time.monotonic() < until:
            if (out / "zarr.json").exists():
                cache = Cache(out)
                if array_hash(cache.tokens()) != cache.manifest.tokens_hash:
                    row.problems.append(f"{out.name}: tokens that a reader saw were not whole")
                for shard in cache.shards():
                    looks += 1
                    expected = self.whole.shard(shard.record.index).record.hashes
                    for name in shard_arrays(cache.manifest):
                        if array_hash(shard.read(name)) != expected[name]:
                            row.problems.append(f"{out.name}: a reader saw {name} of {shard.path.name} half written")
            time.sleep(0.002)
        return looks


def preload() -> None:
    """Have transformers, which imports what it needs when it needs it, do so before the forks and not in each."""
    for lazy in (AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast):
        assert lazy.from_pretrained


def model(folder: Path) -> None:
    """A random Llama of three blocks and a byte-level tokenizer."""
    if pid := os.fork():  # so that this process starts no thread of torch's
        assert ended(pid) == 0
        return
    letters = {letter: i + 2 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, **letters}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(fast), max_position_embeddings=64, initializer_range=0.3, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    os._exit(0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ended(pid: int, within: float = WAIT_SECONDS) -> int:
    """Its exit code, minus the signal that ended it; it is killed where it takes longer."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGALRM


def send(pid: int, number: signal.Signals) -> bool:
    """Whether the process was still running."""
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
        return False
    os.kill(pid, number)
    return True


# ------------------------------------------------------------------------------------------------------- the faults


def killed(bench: Bench, kills: int) -> Row:
    row = Row("harvester killed (SIGKILL) at random moments", "bytes of all files; a reader beside it all the while")
    looks = 0
    while row.faults < kills:
        out = bench.out()
        row.trials += 1
        for _ in range(3):
            pid = bench.start(out)
            looks += bench.look(out, row, time.monotonic() + bench.moment())
            row.faults += send(pid, signal.SIGKILL)
            ended(pid)
        bench.compare(out, row, f"kills {row.trials}")
    row.checked += f" ({looks:,} shards read whole)"
    return row


def one_of_several_killed(bench: Bench, trials: int) -> Row:
    row = Row("one of three harvesters killed", "the others finish without a restart; bytes of all files")
    for _ in range(trials):
        out = bench.out()
        row.trials += 1
        pids = [bench.start(out, worker=worker, workers=3) for worker in range(3)]
        bench.look(out, row, time.monotonic() + bench.moment())
        victim = bench.random.randrange(3)
        row.faults += send(pids[victim], signal.SIGKILL)
        codes = [ended(pid) for pid in pids]
        if any(code != 0 for at, code in enumerate(codes) if at != victim):
            row.problems.append(f"the others ended with {codes}")
        if Cache(out).missing():
            row.problems.append(f"the others left {len(Cache(out).missing())} shards")
        bench.compare(out, row, f"one of three {row.trials}")
    return row


def several(bench: Bench, trials: int, count: int) -> Row:
    row = Row(f"{count} harvesters started at once, by mistake, in one new folder", "bytes of all files; exit codes")
    for _ in range(trials):
        out = bench.out()
        row.trials += 1
        row.faults += count - 1
        codes = [ended(pid) for pid in [bench.start(out) for _ in range(count)]]
        if codes != [0] * count:
            row.problems.append(f"they ended with {codes}")
        bench.compare(out, row, f"{count} at once {row.trials}")
    return row


def suspended(bench: Bench, trials: int) -> Row:
    """A machine that hangs: its claims go stale, and it wakes up beside its successor.

    On one machine a suspended process keeps its locks, so these two see no flock, as machines may not.
    """

    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    row = Row("one of two harvesters suspended, taken over, woken up again", "both exit 0; bytes of all files")

    def soon() -> None:
        lock.HEARTBEAT_SECONDS, lock.DEAD_AFTER_SECONDS, shards.POLL_SECONDS = 0.1, 0.7, 0.05
        fcntl.flock = refuse  # type: ignore[assignment]

    for _ in range(trials):
        out = bench.out()
        row.trials += 1
        pids = [bench.start(out, soon) for _ in range(2)]
        bench.look(out, row, time.monotonic() + bench.moment())
        row.faults += send(pids[0], signal.SIGSTOP)
        codes = [ended(pids[1])]
        send(pids[0], signal.SIGCONT)
        codes.append(ended(pids[0]))
        if codes != [0, 0]:
            row.problems.append(f"they ended with {codes}")
        bench.compare(out, row, f"suspended {row.trials}")
    return row


def terminated(bench: Bench, trials: int) -> Row:
    row = Row("SIGTERM at random moments", "exit 0, or done; no claim or half shard left; bytes of all files")
    slowest = 0.0
    for _ in range(trials):
        out = bench.out()
        row.trials += 1
        pid = bench.start(out)
        time.sleep(bench.moment())
        sent, began = send(pid, signal.SIGTERM), time.monotonic()
        code = ended(pid)
        if code == -signal.SIGTERM:  # before harvest() was reached
            sent, code = False, 0
        row.faults += sent
        slowest = max(slowest, time.monotonic() - began)
        if code not in (0, STOPPED):
            row.problems.append(f"it ended with {code}")
        if out.exists() and list(out.glob(".*")):
            row.problems.append(f"it left {min(path.name for path in out.glob('.*'))}")
        bench.compare(out, row, f"SIGTERM {row.trials}")
    row.checked += f"; slowest end {slowest:.1f} s"
    return row


def cut_off(bench: Bench, trials: int) -> Row:
    row = Row(
        "files cut off at a random size (RLIMIT_FSIZE)", "one line, exit code; what is committed verifies; bytes"
    )
    for _ in range(trials):
        out = bench.out()
        row.trials += 1
        size = bench.random.randrange(1000, 140_000)
        limit = (size, resource.RLIM_INFINITY)
        code = ended(bench.start(out, lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, limit)))
        row.faults += code == FULL
        committed(out, code, row)
        bench.compare(out, row, f"cut off at {size}")
    return row


def filled(bench: Bench, trials: int) -> Row | None:
    """A real disk, small, that something else fills while the harvester writes; None where none can be mounted."""
    row = Row("disk (tmpfs) filled up at a random moment", "one line, exit code; what is committed verifies; bytes")
    disk = bench.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        for _ in range(trials):
            out = disk / bench.out().name
            row.trials += 1
            pid = bench.start(out)
            bench.look(out, row, time.monotonic() + bench.moment())
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(65536))
            code = ended(pid)
            row.faults += code == FULL
            (disk / "filler").unlink()
            committed(out, code, row)
            bench.compare(out, row, f"full disk {row.trials}")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return row


def committed(out: Path, code: int, row: Row) -> None:
    if code not in (0, FULL):
        row.problems.append(f"{out.name} ended with {code}")
    if (out / "zarr.json").exists():
        bad = [problem for problem in verify(str(out)).problems if not problem.endswith(": missing")]
        row.problems += [f"{out.name}: {problem}" for problem in bad]


def corpora(bench: Bench) -> Row:
    row = Row("corpora: invalid UTF-8, NUL bytes, empty documents, a line of 50 MB", "exit code; every row of tokens")
    folder = bench.folder / "corpora"
    folder.mkdir()
    good = (bench.folder / "texts.jsonl").read_bytes()
    line = b'{"text": "%s"}\n'
    broken = {
        "utf8": good + line % b"caf\xff\xfe latin",
        "nul": good + bytes(4096) + b"\n" + line % (rb"nul \u0000 within " * 20),
        "empty": line % b"" * 50 + good,
        "long": line % (b"a very long line " * 3_000_000) + good,
        "surrogate": line % rb"half \ud800 of a pair" + good,
    }
    for name, data in broken.items():
        file = folder / f"{name}.jsonl"
        file.write_bytes(data)
        out = bench.out()
        row.trials += 1
        row.faults += 1
        code = ended(bench.start(out, data=str(file)), 10 * WAIT_SECONDS)
        if code or verify(str(out)).problems or Cache(out).manifest.rows != TOKENS // CONTEXT:
            row.problems.append(f"{name}: ended with {code}")
        shutil.rmtree(out, ignore_errors=True)
        file.unlink()
    return row


@contextlib.contextmanager
def workplace(folder: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder) as path:
        yield Path(path)


def harvest_trials(bench: Bench, kills: int, trials: int) -> dict[str, Callable[[], Row | None]]:
    return {
        "kill": lambda: killed(bench, kills),
        "kill-one": lambda: one_of_several_killed(bench, trials),
        "two": lambda: several(bench, trials, 2),
        "three": lambda: several(bench, trials, 3),
        "suspend": lambda: suspended(bench, trials),
        "sigterm": lambda: terminated(bench, trials),
        "cut-off": lambda: cut_off(bench, trials),
        "full-disk": lambda: filled(bench, trials),
        "corpora": lambda: corpora(bench),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["harvest"])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--trials", type=int, default=15, help="Of each other fault.")
    parser.add_argument("--only", action="append", help="kill, kill-one, two, three, suspend, sigterm, cut-off …")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default=None, help="On the disk to use; the system's temporary one if absent.")
    args = parser.parse_args()
    faulthandler.enable()
    transformers_logging.disable_progress_bar()
    problems: list[str] = []
    began = time.monotonic()
    with workplace(args.folder) as folder:
        bench = Bench(folder, args.seed)
        print(f"an undisturbed run takes {bench.seconds:.2f} s\n", flush=True)
        print(
            "| fault | trials | faults injected | data lost | how it was checked |\n|---|---|---|---|---|", flush=True
        )
        for name, run in harvest_trials(bench, args.kills, args.trials).items():
            if name in (args.only or [name]) and (row := run()) is not None:
                print(row.line(), flush=True)
                problems += row.problems
    print(f"\n{time.monotonic() - began:.0f} s, seed {args.seed}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
