"""Faults done on purpose to everything that routesae writes and reads: the rows of RELIABILITY.md.

    python benchmarks/faults.py                            # all rows, about half an hour on 2 cores
    python benchmarks/faults.py --only flips --trials 448  # one of them
    python benchmarks/faults.py --kills 1000               # of harvest, train, contexts, interpret and run

A tiny random LM, a corpus of made-up words, three SAEs, a chat server on loopback. Every command is a process of its
own, forked from this one so that it starts at once. What it leaves is compared with what undisturbed commands leave,
but for figures that differ between two of those, which are times. A trial is bad in one of five ways: data was lost,
a result is wrong, a command hung, it ended in a traceback, or a fault on which a number depends went unnoticed.
Exit code 1 where any trial is bad.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}

import openai.resources.chat  # noqa: F401
import pyarrow.parquet  # noqa: F401 what every child would else import for itself
import torch
from reliability import model, preload, send
from transformers import logging as transformers_logging

import routesae.analyze.clamp.run
import routesae.analyze.contexts.run
import routesae.analyze.interpret.run
import routesae.analyze.pipeline.run
import routesae.analyze.report.run
import routesae.analyze.scores.run
import routesae.harvest.run
import routesae.train.run  # noqa: F401
from routesae.cli import main as command_line

KEY = "sk-loopback-0123456789/secret"
HANGS_AFTER = 60.0  # seconds; an undisturbed command takes about one
MOST_MEMORY = 2_000_000  # kB of resident memory; an undisturbed command takes 0.6 GB
TMPFS = 6_000_000
HARVEST = "--model model --data texts.jsonl --tokens 20k --context 16 --shard-tokens 2048 --layers 1-2 --device cpu"
TRAIN = (
    "--cache shards --latents 96 --k 4 --epochs 2 --batch-tokens 512 --lr 3e-3 --checkpoint-every 7 "
    "--log-every-steps 4 --device cpu --sae topk --sae routesae --sae crosscoder"
)
CONTEXTS = "--cache shards --threshold 0.2 --min-contexts 1 --max-classes 500 --samples 2 --window 16 --device cpu"
METRICS = "--metric NormMSE --metric L0 --metric Dead --metric Routing --metric KLDiv --metric Recovered"
ANALYZE = f"--cache shards --device cpu --tokens 800 {METRICS}"
PIPELINE = """out = "pipe"
[harvest]
model = "model"
data = "texts.jsonl"
tokens = 20_000
context = 16
layers = "1-2"
shard-tokens = 8192
device = "cpu"
[train]
latents = 64
k = 4
lr = 3e-3
epochs = 1
batch-tokens = 512
checkpoint-every = 8
device = "cpu"
[[train.run]]
sae = "topk"
layer = 1
[analyze]
metric = ["NormMSE", "L0"]
device = "cpu"
[contexts]
threshold = 0.2
min-contexts = 1
max-classes = 500
device = "cpu"
[interpret]
base-url = "{url}"
model = "m"
latents = 6
concurrency = 1
[report]
device = "cpu"
"""


@dataclass
class Row:
    """A line of the table, and what went wrong in words."""

    line: str
    fault: str
    trials: int = 0
    faults: int = 0
    bad: dict[str, list[str]] = field(
        default_factory=lambda: {kind: [] for kind in ("lost", "wrong", "hung", "traceback", "unnoticed")}
    )

    def __str__(self) -> str:
        counts = " | ".join(str(len(found)) for found in self.bad.values())
        return f"| {self.line} | {self.fault} | {self.trials} | {self.faults} | {counts} |"

    def ended(self, done: Ended, trial: str) -> bool:
        """Note a command that hung, took all memory, or ended otherwise than in one line. Returns if it was fine."""
        if done.hung or done.memory > MOST_MEMORY:
            self.bad["hung"].append(f"{trial}: {'hung' if done.hung else f'{done.memory // 1000} MB'}")
        elif "Traceback" in done.err or done.code not in (0, 1, 2, 130):
            self.bad["traceback"].append(f"{trial}: exit {done.code}: {done.err.strip()[-300:]}")
        else:
            return True
        return False


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    hung: bool
    memory: int
    """Largest resident set in kB."""

    def reason(self) -> str:
        return (self.err.strip().splitlines() or [""])[-1][:200]


class World:
    """A folder with a model, a corpus, a cache, SAEs and everything that is made of them, and a chat server."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random, self.count = folder, random.Random(seed), 0
        self.only: list[str] | None = None  # stages that are killed
        self.asked = folder / "asked.txt"
        self.asked.touch()
        self.url, self.server = serve(self.asked)
        os.environ["OPENAI_API_KEY"] = KEY
        preload()
        self.base = folder / "base"
        self.base.mkdir()
        model(self.base / "model")
        rng = random.Random(0)
        words = ["router", "layer", "latent", "a", "sparse", "code"]
        texts = (" ".join(rng.choices(words, k=rng.randint(30, 90))) for _ in range(300))
        (self.base / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (self.base / "pipe.toml").write_text(PIPELINE.replace("{url}", self.url))
        self.interpret = f"--base-url {self.url} --model m --latents 8 --concurrency 1 --score detection"
        for line in self.lines():
            self.must(line, self.base)
        self.varying = self._what_varies()

    def lines(self) -> list[str]:
        """The commands that make everything in the base folder."""
        return [
            f"harvest {HARVEST} --out shards",
            f"harvest {HARVEST} --dtype int8 --out int8",
            f"train {TRAIN} --out saes",
            f"analyze {ANALYZE} --out saes --json scores.json",
            f"contexts {CONTEXTS} --out saes",
            f"interpret --out saes {self.interpret}",
            "report --out saes --scores scores.json --html report.html --device cpu",
            "run --config pipe.toml",
        ]

    def _what_varies(self) -> set[str]:
        """JSON keys whose values differ between two undisturbed runs: times, rates and process ids."""
        other = self.copy("again", without=("shards", "int8", "saes", "scores.json", "report.html", "pipe"))
        for line in self.lines():
            self.must(line, other)
        varying: set[str] = set()
        for path in other.rglob("*.json*"):
            first, second = (records(folder / path.relative_to(other)) for folder in (self.base, other))
            for one, two in zip(first, second, strict=True):
                differing(one, two, "", varying)
        shutil.rmtree(other)
        return {name for name in varying if name}

    def copy(self, name: str = "trial", without: Sequence[str] = ()) -> Path:
        self.count += 1
        target = self.folder / f"{name}-{self.count}"
        shutil.copytree(self.base, target, symlinks=True, ignore=lambda at, names: set(without) & set(names))
        return target

    def start(self, line: str | Sequence[str], where: Path, prepare: Callable[[], None] | None = None) -> int:
        """The process id of a command in a process of its own. prepare: what it does first."""
        arguments = line.split() if isinstance(line, str) else list(line)
        if pid := os.fork():
            return pid
        code = 70
        try:
            os.chdir(where)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(self.folder / f"{os.getpid()}.{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: SIM115
            if prepare is not None:
                prepare()
            command_line(arguments)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # a forked child must end here, whatever it was
            sys.excepthook(*sys.exc_info())
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def wait(self, pid: int, within: float = HANGS_AFTER) -> Ended:
        deadline, hung = time.monotonic() + within, False
        while (found := os.wait4(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline and not hung:
                hung = True
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.003)
        texts = []
        for name in ("out", "err"):
            path = self.folder / f"{pid}.{name}"
            texts.append(path.read_text(errors="surrogateescape") if path.exists() else "")
            path.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(found[1]), *texts, hung, found[2].ru_maxrss)

    def run(self, line: str | Sequence[str], where: Path, prepare: Callable[[], None] | None = None) -> Ended:
        return self.wait(self.start(line, where, prepare))

    def must(self, line: str, where: Path) -> float:
        """Seconds of a command that nobody disturbs. Raises RuntimeError if it fails."""
        began = time.monotonic()
        if (done := self.run(line, where)).code != 0:
            raise RuntimeError(f"{line}: ended with {done.code} undisturbed:\n{done.out}\n{done.err}")
        return time.monotonic() - began

    def contents(self, folder: Path, but: Sequence[str] = ()) -> dict[str, Any]:
        """Every file below a folder by name: its bytes, and of JSON what does not vary."""
        found: dict[str, Any] = {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_file() and not any(re.search(pattern, name) for pattern in but):
                masked = [self.masked(record, "") for record in records(path)] if ".json" in path.name else []
                found[name] = masked or hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def masked(self, value: Any, path: str) -> Any:
        if path in self.varying:
            return None
        if isinstance(value, dict):
            return {name: self.masked(item, f"{path}/{name}") for name, item in value.items()}
        return [self.masked(item, f"{path}/*") for item in value] if isinstance(value, list) else value


def records(path: Path) -> list[Any]:
    """A JSON file's value, or those of its lines; empty if it is no JSON."""
    try:
        text = path.read_text()
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
    except (OSError, ValueError):
        return []


def differing(one: Any, two: Any, path: str, found: set[str]) -> None:
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for name in one:
            differing(one[name], two[name], f"{path}/{name}", found)
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for first, second in zip(one, two, strict=True):
            differing(first, second, f"{path}/*", found)
    elif one != two:
        found.add(path)


def serve(asked: Path, echo: str = "", fails: bool = False, inside: bool = True) -> tuple[str, int]:
    """A chat server in a process of its own: its address and process id. It writes down a hash of every question.

    echo: repeated in every answer as it stands, in the JSON of the answer or, if not `inside`, in that around it.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    if pid := os.fork():
        listening.close()
        return url, pid

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            prompt = json.dumps(json.loads(body)["messages"])
            name = hashlib.sha256(prompt.encode()).hexdigest()[:16]
            time.sleep(0.01)
            with asked.open("a") as file:
                file.write(f"{name}\n")
            said: dict[str, Any] = {"category": "low-level", "score": 4, "explanation": f"about {name} ECHO"}
            if count := re.search(r"with (\d+) predictions", prompt):
                said = {"predictions": [at % 2 == 0 for at in range(int(count[1]))]}
            content = json.dumps(said)
            if inside:
                content = content.replace("ECHO", echo)
            reply: dict[str, Any] = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [
                    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                ],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
            if fails:
                reply = {"error": {"message": f"the key {'' if inside else 'ECHO'} is wrong", "code": "ECHO"}}
            data = json.dumps(reply).replace("ECHO", echo).encode()
            with suppress(OSError):
                self.send_response(400 if fails else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that are killed reset their connections."""

    server = Quiet(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket = listening
    server.serve_forever()
    os._exit(0)


# ----------------------------------------------------------------------------------------------------------- kills


def die_at(call: int) -> Callable[[], None]:
    """Have this process killed at its n-th call of the file system: open, rename, link, delete, write, fsync …"""

    def prepare() -> None:
        count = 0

        def one(*_: object) -> None:
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)

        watch_file_system(one)

    return prepare


CALLS = ("os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree")


def watch_file_system(call: Callable[[], None]) -> None:
    """Call `call` at each call of the file system that changes something; reads of modules do not count."""
    pid = os.getpid()

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if os.getpid() == pid and (event in CALLS or (event == "open" and is_writing(arguments))):
            call()

    def is_writing(arguments: tuple[Any, ...]) -> bool:
        path, _, flags = arguments
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and "/dev/" not in str(path)

    sys.addaudithook(heard)
    for name in ("fsync", "write", "pwrite", "writev"):
        setattr(os, name, counted(getattr(os, name), call))


def counted(real: Callable[..., Any], call: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        call()
        return real(*arguments, **named)

    return wrapped


def calls_of(world: World, line: str, where: Path) -> int:
    """How many calls of the file system a command makes."""
    counter = world.folder / "calls"

    def prepare() -> None:
        count = 0

        def one() -> None:
            nonlocal count
            count += 1

        watch_file_system(one)
        end = os._exit

        def exit_counted(code: int) -> None:
            counter.write_text(str(count))
            end(code)

        os._exit = exit_counted  # type: ignore[assignment]

    done = world.run(line, where, prepare)
    if done.code != 0:
        raise RuntimeError(f"{line}: {done.err}")
    return int(counter.read_text())


def stages(world: World) -> dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Command, what of the base folder it needs not, and what of the result is compared, by stage."""
    never = ("int8", "pipe", "report.html")
    return {
        "harvest": (f"harvest {HARVEST} --out shards", ("shards", "saes", *never), ("shards",)),
        "train": (f"train {TRAIN} --out saes --resume", ("saes", *never), ("saes",)),
        "contexts": (f"contexts {CONTEXTS} --out saes", never, ("saes",)),
        "interpret": (f"interpret --out saes {world.interpret}", never, ("saes",)),
        "run": ("run --config pipe.toml", ("saes", "shards", *never), ("pipe",)),
    }


def cleared(stage: str, where: Path) -> None:
    """Take from a copy of the base folder what the stage is to make."""
    if stage in ("contexts", "interpret"):
        gone = ["interpretations.*", "detection.*"] + (["*.parquet", "contexts*"] if stage == "contexts" else [])
        for pattern in gone:
            for path in list((where / "saes").rglob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def kills(world: World, trials: int, total: int) -> Iterator[Row]:
    """SIGKILL at random moments and at n-th calls; the same command is given again until it ends."""
    table = stages(world)
    share = {"harvest": 0.25, "train": 0.25, "contexts": 0.15, "interpret": 0.2, "run": 0.15}
    for stage, (line, without, kept) in table.items():
        if stage not in (world.only or table):
            continue
        row = Row("kills", f"`kill -9` of {stage}, at random moments and at every n-th call of the file system")
        where = world.copy(stage, without)
        cleared(stage, where)
        count = calls_of(world, line, where)
        shutil.rmtree(where)
        where = world.copy(stage, without)
        cleared(stage, where)
        seconds = world.must(line, where)
        names = {part: world.contents(where / part, PASSING) for part in kept}
        shutil.rmtree(where)
        questions = Questions(world)
        while row.faults < share[stage] * total:
            where, trial = world.copy(stage, without), f"{stage} {row.trials}"
            cleared(stage, where)
            row.trials += 1
            asked = questions.now()
            killed = 0
            for _ in range(world.random.choice((1, 2, 3))):
                if world.random.random() < 0.6:
                    pid = world.start(line, where, die_at(world.random.randint(1, count)))
                else:
                    pid = world.start(line, where)
                    time.sleep(world.random.uniform(0, seconds))
                    with suppress(ProcessLookupError):
                        send(pid, signal.SIGKILL)
                done = world.wait(pid)
                killed += done.code == -signal.SIGKILL
                if done.code not in (0, -signal.SIGKILL):
                    row.bad["traceback"].append(f"{trial}: exit {done.code}: {done.err[-300:]}")
            row.faults += killed
            done = world.run(line, where)
            if row.ended(done, trial) and done.code != 0:
                row.bad["lost"].append(f"{trial}: {done.reason()}")
            elif done.code == 0:
                for part in kept:
                    found = world.contents(where / part, PASSING)
                    if found != names[part]:
                        both = found.keys() | names[part].keys()
                        odd = sorted(name for name in both if found.get(name) != names[part].get(name))
                        row.bad["wrong"].append(f"{trial}: {len(odd)} files differ, such as {odd[:3]}")
            # a kill loses at most the answers that were under way
            if (again := questions.repeated_since(asked)) > killed:
                row.bad["lost"].append(f"{trial}: {again} questions paid twice in {killed} kills")
            shutil.rmtree(where)
        yield row


# What may differ after a kill: a status file that nothing was left to say in, and the lock of an owner that is dead.
PASSING = (r"\.log$", r"(^|/)status\.json$", r"\.lock(\.[0-9a-f]{8})?$")


class Questions:
    """What the chat server was asked."""

    def __init__(self, world: World):
        self.file = world.asked

    def now(self) -> int:
        return len(self.file.read_text().split())

    def repeated_since(self, then: int) -> int:
        asked = self.file.read_text().split()[then:]
        return len(asked) - len(set(asked))


# ---------------------------------------------------------------------------------------------------- damaged files


def reading(world: World) -> dict[str, tuple[str, list[str], tuple[str, ...]]]:
    """Each kind of file: its pattern, the commands whose numbers depend on it, what of their results is compared."""
    score = f"analyze {ANALYZE} --out saes --json new.json"
    new = f"train {TRAIN} --out new"
    read = "contexts --overwrite " + CONTEXTS + " --out saes"
    page = "report --out saes --scores scores.json --html new.html --device cpu"
    asking = f"interpret --out saes {world.interpret}"
    train8 = f"train {TRAIN} --out new".replace("--cache shards", "--cache int8")
    return {
        "manifest": ("shards/zarr.json", [new, read], ("new", "saes")),
        "record of a shard": ("shards/shard-*/zarr.json", [new], ("new",)),
        "layer": ("shards/shard-*/layer_*/c/0/0", [new], ("new",)),
        "layer's metadata": ("shards/shard-*/layer_*/zarr.json", [new], ("new",)),
        "layer on held-out rows": ("shards/shard-00009/layer_*/c/0/0", [score], ("new.json",)),
        "tokens": ("shards/tokens/c/0/0", [score, read], ("new.json", "saes")),
        "tokens' metadata": ("shards/tokens/zarr.json", [score, read], ("new.json", "saes")),
        "document starts": ("shards/document_starts/c/0*", [read], ("saes",)),
        "document starts' metadata": ("shards/document_starts/zarr.json", [read], ("saes",)),
        "order": ("shards/shard-*/order/c/0*", [score, read], ("new.json", "saes")),
        "token ids of a shard": ("shards/shard-*/token_ids/c/0/0", [score, read], ("new.json", "saes")),
        "chunk hashes": ("shards/shard-*/chunk_hashes/c/0/0", [new], ("new",)),
        "int8 numbers": ("int8/shard-*/layer_*/c/0/0", [train8], ("new",)),
        "int8 scales and channels": ("int8/shard-*/*[nl]_[sm]*/c/0/0", [train8], ("new",)),
        "weights": ("saes/*/sae_weights.safetensors", [score], ("new.json",)),
        "router, crosscoder": ("saes/*/[rc]*er.safetensors", [score], ("new.json",)),
        "cfg.json": ("saes/*/cfg.json", [score], ("new.json",)),
        "checkpoint": ("part/.*/*.safetensors", [f"train {TRAIN} --out part --resume"], ("part",)),
        "metrics.jsonl": ("saes/*/metrics.jsonl", [page], ("new.html",)),
        "contexts.parquet": ("saes/**/contexts.parquet", [page, asking], ("new.html",)),
        "latents.parquet": ("saes/**/latents.parquet", [page, asking], ("new.html",)),
        "ledger of explanations": ("saes/**/interpretations.jsonl", [asking, page], ("new.html", "saes")),
        "ledger of predictions": ("saes/**/detection.jsonl", [asking, page], ("new.html", "saes")),
        "interpretations.json": ("saes/**/interpretations.json", [page], ("new.html",)),
        "scores.json": ("scores.json", [page], ("new.html",)),
    }


def flips(world: World, trials: int, total: int) -> Iterator[Row]:
    """One bit of one file; every command whose numbers depend on it then runs."""
    part_way = world.copy("part", ("pipe", "report.html"))
    step = calls_of(world, f"train {TRAIN} --out new", part_way)
    shutil.rmtree(part_way / "new")
    for at in range(step // 2, step):  # a run that was killed with a checkpoint on the disk
        world.wait(world.start(f"train {TRAIN} --out part --resume", part_way, die_at(at)))
        if list((part_way / "part").glob(".*/*.safetensors")):
            break
    base, world.base = world.base, part_way
    try:
        for kind, (pattern, commands, results) in reading(world).items():
            row = Row("4", f"a bit flipped: {kind}")
            undisturbed = outcome(world, world.copy(), commands, results)[1]
            for _ in range(max(1, total // len(reading(world)))):
                where = world.copy()
                file = world.random.choice(sorted(where.glob(pattern)))
                data = bytearray(file.read_bytes())
                bit = world.random.randrange(8 * len(data))
                data[bit // 8] ^= 1 << bit % 8
                file.write_bytes(data)
                row.trials += 1
                row.faults += 1
                trial = f"{kind}: bit {bit % 8} of byte {bit // 8} of {file.relative_to(where)}"
                done, found = outcome(world, where, commands, results)
                if all(row.ended(one, trial) for one in done) and all(one.code == 0 for one in done):
                    for name in undisturbed:
                        if found.get(name) != undisturbed[name] and name != str(file.relative_to(where)):
                            row.bad["unnoticed"].append(f"{trial}: {name} differs")
                            break
            yield row
    finally:
        world.base = base


def outcome(world: World, where: Path, commands: list[str], results: tuple[str, ...]) -> tuple[list[Ended], Any]:
    """How the commands ended, and what they left."""
    done = [world.run(line, where) for line in commands]
    left: dict[str, Any] = {}
    for name in results:
        path = where / name
        if path.is_dir():
            left |= {f"{name}/{file}": value for file, value in world.contents(path, PASSING).items()}
        elif path.suffix == ".json" and path.exists():
            left[name] = [world.masked(record, "") for record in records(path)]
        elif path.exists():
            left[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    shutil.rmtree(where)
    return done, left


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e308, "", "x", "\x1b[31m", "\ud800", [], {}, [[]], {"a": {}}, "9" * 5000, [0] * 3000,
)  # fmt: skip


def odd_values(world: World, trials: int, total: int) -> Iterator[Row]:
    """A value of a JSON or TOML file replaced by another: one line, or a result, but no traceback and no hang."""
    for kind, (pattern, commands, _) in reading(world).items():
        if not pattern.endswith((".json", ".jsonl")) or not list(world.base.glob(pattern)):
            continue
        row = Row("8", f"an odd value in {kind}")
        for _ in range(trials):
            where = world.copy()
            file = world.random.choice(sorted(where.glob(pattern)))
            lines = records(file)
            at = world.random.randrange(len(lines))
            lines[at] = mutated(lines[at], world.random)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            row.trials += 1
            row.faults += 1
            for done in outcome(world, where, commands, ())[0]:
                row.ended(done, f"{kind}: {json.dumps(lines[at])[:200]}")
        yield row


def mutated(value: Any, draw: random.Random) -> Any:
    """The value with one of its parts, somewhere inside, replaced, renamed or gone."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: mutated(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], mutated(value[at], draw), *value[at + 1 :]]
    return draw.choice(ODD)


def special_files(world: World, trials: int, total: int) -> Iterator[Row]:
    """A FIFO, a socket, a device, a file of 1 TB or an absurd one where a file is to be read."""
    row = Row("8", "a FIFO, socket, device, file of 1 TB or absurd JSON or TOML in the place of a file")
    places = [
        (pattern, commands) for pattern, commands, _ in reading(world).values() if not pattern.startswith("part")
    ]
    places += [
        ("texts.jsonl", [f"harvest {HARVEST} --out other"]),
        ("pipe.toml", ["run --config pipe.toml", "train --cache shards --config pipe.toml"]),
        ("model/config.json", [f"harvest {HARVEST} --out other"]),
        ("prompts.txt", ["clamp --sae saes/NAME --prompts prompts.txt --set 3=1 --device cpu"]),
        ("prices.toml", [f"interpret --out saes {world.interpret} --prices prices.toml --dry-run"]),
    ]
    name = next(path.name for path in sorted((world.base / "saes").iterdir()) if path.name.startswith("topk"))
    for nth in range(trials):
        pattern, commands = places[nth % len(places)]
        where = world.copy()
        file = (sorted(where.glob(pattern)) or [where / pattern])[0]
        kind = world.random.choice(sorted(SPECIAL))
        file.unlink(missing_ok=True)
        SPECIAL[kind](file)
        row.trials += 1
        row.faults += 1
        for line in commands:
            row.ended(world.run(line.replace("NAME", name), where), f"{kind} for {file.relative_to(where)}: {line}")
        shutil.rmtree(where)
    yield row


def bind(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "socket": bind,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "huge": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**12),
    "deep": lambda path: path.write_text("[" * 500_000),
    "dotted": lambda path: path.write_text(".".join("a" * 50_000) + " = 1\n"),
    "keys": lambda path: path.write_text("".join(f"a.b{n} = {{}}\n" for n in range(60_000))),
    "numbers": lambda path: path.write_text('{"a": ' + "9" * 1_000_000 + "}"),
}


# ------------------------------------------------------------------------------------------- owners, links, answers


def two_at_once(world: World, trials: int, total: int) -> Iterator[Row]:
    """A second start on the same folder: refused, naming the owner; the first goes on to what it would have been."""
    for stage in ("train", "run"):
        row = Row("1", f"{stage} started twice on one folder")
        line, without, kept = stages(world)[stage]
        line = line.replace(" --resume", "")
        where = world.copy(stage, without)
        seconds = world.must(line, where)
        expected = world.contents(where / kept[0], PASSING)
        shutil.rmtree(where)
        for _ in range(trials):
            where = world.copy(stage, without)
            pids = [world.start(line, where)]
            time.sleep(world.random.uniform(0, seconds))
            pids.append(world.start(line, where))
            done = [world.wait(pid) for pid in pids]
            row.trials += 1
            row.faults += 1
            codes = sorted(one.code for one in done)
            if all(row.ended(one, str(row.trials)) for one in done):
                if world.contents(where / kept[0], PASSING) != expected:
                    row.bad["wrong"].append(f"ended with {codes}: {[one.reason() for one in done]}")
                elif codes not in (
                    [0, 2],
                    [0, 0],
                ):  # [0, 0]: one after the other, for run; train asks for --overwrite
                    row.bad["lost"].append(f"ended with {codes}: {[one.reason() for one in done]}")
            shutil.rmtree(where)
        yield row


def vanishing(world: World, trials: int, total: int) -> Iterator[Row]:
    """The folder of a run, or a shard, deleted while it runs: made again, or exit 1."""
    for stage, line_number in (("train", "1"), ("harvest", "6")):
        row = Row(line_number, f"what {stage} has written so far, or a part of it, deleted under it")
        line, without, kept = stages(world)[stage]
        where = world.copy(stage, without)
        seconds = world.must(line, where)
        expected = world.contents(where / kept[0], PASSING)
        shutil.rmtree(where)
        for _ in range(trials):
            where = world.copy(stage, without)
            pid = world.start(line, where)
            time.sleep(world.random.uniform(0.2, 0.95) * seconds)
            there = [path for path in (where / kept[0]).glob("*" if stage == "harvest" else ".*") if path.is_dir()]
            shards = [path for path in there if path.name.startswith("shard-") or stage == "train"]
            for gone in world.random.sample(sorted(shards), min(1, len(shards))):
                shutil.rmtree(gone, ignore_errors=True)
            # What is deleted once the last look has been taken is nobody's to mend.
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            row.faults += bool(shards) and not ended
            done = world.wait(pid)
            row.trials += 1
            if row.ended(done, str(row.trials)) and done.code == 0 and not ended:
                found = world.contents(where / kept[0], PASSING)
                if found != expected:
                    row.bad["wrong"].append(
                        f"exit 0, and {sorted(expected.keys() ^ found.keys())[:3] or 'bytes'} differ"
                    )
            shutil.rmtree(where)
        yield row


def links(world: World, trials: int, total: int) -> Iterator[Row]:
    """Links of a stranger at every name that a command is known to have written or renamed: what they name stays."""
    row = Row("3", "links planted at names that are written, `.NAME.partial` and the like among them")
    seen = names_written(world)
    for stage, (line, without, _) in (
        stages(world) | {"report": ("report --out saes --html r.html --device cpu", (), ())}
    ).items():
        for _ in range(max(1, trials // 6)):
            where = world.copy(stage, without)
            cleared(stage, where)
            victim = world.folder / "victim"
            victim.write_text("precious")
            planted = 0
            for name in seen[stage]:
                path = where / name
                with suppress(OSError):
                    if path.parent.is_dir() and not path.exists():
                        path.symlink_to(victim)
                        planted += 1
            done = world.run(line, where)
            row.trials += 1
            row.faults += planted
            row.ended(done, f"{stage}")
            if victim.read_bytes() != b"precious":
                row.bad["wrong"].append(f"{stage}: a file elsewhere was overwritten")
            shutil.rmtree(where)
    yield row


def names_written(world: World) -> dict[str, set[str]]:
    """By stage, the names that it opened for writing in a run like the one to come, and guesses at partial names."""
    found: dict[str, set[str]] = {}
    for stage, (line, without, _) in (
        stages(world) | {"report": ("report --out saes --html r.html --device cpu", (), ())}
    ).items():
        where = world.copy(stage, without)
        cleared(stage, where)
        listed = world.folder / "listed"
        listed.write_text("")

        def prepare(where: Path = where, listed: Path = listed) -> None:
            pid = os.getpid()

            def heard(event: str, arguments: tuple[Any, ...]) -> None:
                if os.getpid() == pid and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
                    path = os.path.relpath(Path.cwd() / os.fsdecode(arguments[0]), where)
                    if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith(".."):
                        descriptor = os.open(listed, os.O_APPEND | os.O_WRONLY)
                        os.write(descriptor, f"{path}\n".encode())
                        os.close(descriptor)

            sys.addaudithook(heard)

        world.run(line, where, prepare)
        names = set(listed.read_text().splitlines())
        made = {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()}
        guesses = {str(Path(name).with_name(f".{Path(name).name}.partial")) for name in made if "shards" not in name}
        found[stage] = names | guesses
        shutil.rmtree(where)
    return found


def answers_kept(world: World, trials: int, total: int) -> Iterator[Row]:
    """Answers that were paid for are below the folder after whatever was done to the SAE they are about."""
    row = Row("2", "`train --overwrite`, `run` with another lr, a renamed SAE, contexts of another rule")
    name = next(path.name for path in sorted((world.base / "saes").iterdir()) if path.name.startswith("topk"))
    for nth in range(trials):
        where = world.copy()
        if nth % 4 == 1:
            world.must("run --config pipe.toml", where)
            text = (where / "pipe.toml").read_text()
            (where / "pipe.toml").write_text(
                text.replace("lr = 3e-3", f"lr = {world.random.uniform(1e-3, 2e-3):.2g}")
            )
        before, asking = answers(where), f"interpret --out saes {world.interpret}"
        if nth % 4 == 2:
            (where / "saes" / name).rename(where / "saes" / "renamed")
        done = [world.run(line, where) for line in (
            [f"train {TRAIN.replace('3e-3', '1e-3')} --out saes --overwrite"],
            ["run --config pipe.toml"] * 2,
            [f"contexts {CONTEXTS} --out saes", asking],
            [f"contexts {CONTEXTS.replace('0.2', '0.4')} --out saes --overwrite", asking],
        )[nth % 4]]  # fmt: skip
        row.trials += 1
        row.faults += 1
        for one in done:
            row.ended(one, str(nth))
        if gone := before - answers(where):
            row.bad["lost"].append(
                f"kind {nth % 4}: {len(gone)} of {len(before)} answers are gone: {done[-1].reason()}"
            )
        shutil.rmtree(where)
    yield row


def answers(folder: Path) -> set[str]:
    """The explanations that lie anywhere below a folder."""
    lines = (record for path in folder.rglob("interpretations.jsonl*") for record in jsonl(path))
    return {line["explanation"] for line in lines if line.get("explanation")}


def jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                yield record


def key_stays_out(world: World, trials: int, total: int) -> Iterator[Row]:
    """A server that repeats the key in answers and errors, in whatever escapes: it is in no file, however decoded."""
    row = Row("10", "a server that repeats the key, in answers and errors, plainly and in JSON escapes")
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
    forms = (KEY, KEY.replace("/", "\\/"), escaped, KEY[:9] + escaped[54:])
    for nth in range(trials):
        form = forms[nth % 4]
        url, pid = serve(world.folder / "asked-key.txt", echo=form, fails=nth % 3 == 2, inside=nth % 2 == 0)
        where = world.copy()
        cleared("interpret", where)
        line = f"interpret --out saes --base-url {url} --model m --latents 4 --device cpu --retries 0"
        done = [world.run(line, where), world.run("report --out saes --html n.html --device cpu", where)]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        row.trials += 1
        row.faults += 1
        for one in done:
            row.ended(one, str(nth))
            if KEY in one.out + one.err:
                row.bad["wrong"].append("the terminal shows the key")
        for path in (path for path in where.rglob("*") if path.is_file()):
            if any(KEY in text for text in (path.read_text(errors="replace"), *texts_of(records(path)))):
                row.bad["wrong"].append(f"{path.relative_to(where)} holds the key, which was sent as {form}")
        shutil.rmtree(where)
    yield row


def texts_of(value: Any) -> Iterator[str]:
    """Every string in a JSON value, and those in strings that are JSON themselves."""
    if isinstance(value, dict | list):
        for item in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            yield from texts_of(item)
    elif isinstance(value, str):
        yield value
        if "\\" in value:
            with suppress(ValueError):
                yield json.loads(f'"{value}"')


# ------------------------------------------------------------------------------------------------- what signs results


def replaced(world: World, trials: int, total: int) -> Iterator[Row]:
    """An SAE replaced by another while it is scored or read: the result is wholly of one, and says of which."""
    name = next(path.name for path in sorted((world.base / "saes").iterdir()) if path.name.startswith("topk"))
    other = world.copy("other")
    line = f"train {TRAIN.split(' --sae')[0]} --sae topk --out else --seed 7"
    world.must(line, other)
    (second,) = (other / "else").glob("[!.]*/")
    commands = {
        "analyze": (f"analyze {ANALYZE} --sae saes/{name} --json new.json", "new.json"),
        "contexts": (f"contexts {CONTEXTS} --sae saes/{name} --overwrite", "saes"),
    }
    for command, (line, result) in commands.items():
        row = Row("5", f"an SAE replaced while `{command}` works on it")
        whole = []
        for source in (world.base / "saes" / name, second):
            where = world.copy()
            swap(where, name, source)
            seconds = world.must(line, where)
            whole.append(of_run(world, where, result, name))
            shutil.rmtree(where)
        for _ in range(trials):
            where = world.copy()
            pid = world.start(line, where)
            time.sleep(world.random.uniform(0, seconds))
            swap(where, name, second)
            done = world.wait(pid)
            row.trials += 1
            row.faults += 1
            if row.ended(done, str(row.trials)) and done.code == 0:
                for folder in (where / "saes").parent.rglob(f"{name}.old"):
                    if result == "saes" and of_run(world, where, result, f"{name}.old") in whole:
                        break
                    assert folder
                else:
                    if of_run(world, where, result, name) not in whole:
                        row.bad["wrong"].append(
                            f"trial {row.trials}: the result is neither of the one nor of the other"
                        )
            shutil.rmtree(where)
        yield row
    shutil.rmtree(other)


def swap(where: Path, name: str, source: Path) -> None:
    """Replace the weights and configuration of an SAE in place, each file by a rename, as a user's copy would."""
    for file in ("sae_weights.safetensors", "cfg.json"):
        shutil.copyfile(source / file, where / f"new-{file}")
        (where / f"new-{file}").replace(where / "saes" / name / file)


def of_run(world: World, where: Path, result: str, name: str) -> Any:
    """What a command left that must be of one SAE: scores and identity, or contexts and their facts."""
    if result.endswith(".json"):
        return [world.masked(record, "") for record in records(where / result)]
    return {
        file: value
        for file, value in world.contents(where / "saes" / name).items()
        if "contexts" in file or "latents" in file
    }


def mixed(world: World, trials: int, total: int) -> Iterator[Row]:
    """Two harvesters of one folder whose LMs have other weights: never one cache of both that is accepted."""
    row = Row("5", "two harvesters whose LMs have other weights, in one folder")
    other = world.folder / "other-model"
    model_of_seed(world.base / "model", other)
    whole = [world.contents(world.base / "shards" / f"shard-{n:05d}") for n in range(10)]
    for _ in range(trials):
        where = world.copy("mixed", ("shards", "int8", "saes", "report.html"))
        shutil.copytree(other, where / "twin")
        second = f"harvest {HARVEST.replace('--model model', '--model twin')} --out shards"
        pids = [world.start(f"harvest {HARVEST} --out shards", where)]
        time.sleep(world.random.uniform(0, 0.5))
        pids.append(world.start(second, where, partial(as_model, where)))
        done = [world.wait(pid) for pid in pids]
        row.trials += 1
        row.faults += 1
        if all(row.ended(one, str(row.trials)) for one in done) and (where / "shards" / "zarr.json").exists():
            same = [
                world.contents(where / "shards" / f"shard-{n:05d}") == whole[n]
                for n in range(10)
                if (where / "shards" / f"shard-{n:05d}").exists()
            ]
            if any(same) and not all(same):
                checks = [world.run(line, where) for line in ("cache verify shards", f"train {TRAIN} --out saes")]
                if any(check.code == 0 for check in checks):
                    row.bad["unnoticed"].append(
                        f"{sum(same)} of {len(same)} shards are the first LM's, and it is read"
                    )
        shutil.rmtree(where)
    yield row


def as_model(where: Path) -> None:
    """Have this process find the other LM under the first one's name, as on a node with another copy of the model."""
    import transformers

    real = transformers.AutoModelForCausalLM.from_pretrained

    def load(name: Any, *arguments: Any, **named: Any) -> Any:
        return real(where / "twin" if Path(name).name == "model" else name, *arguments, **named)

    transformers.AutoModelForCausalLM.from_pretrained = load


def model_of_seed(source: Path, target: Path) -> None:
    """The same model with one weight of one block changed."""
    from safetensors.torch import load_file, save_file

    if pid := os.fork():
        os.waitpid(pid, 0)
        return
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in sorted(tensors) if "mlp" in name)
    tensors[name] = tensors[name] + 0.05
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    os._exit(0)


# ------------------------------------------------------------------------------------------- full disks, the terminal


def full_disks(world: World, trials: int, total: int) -> Iterator[Row]:
    """A tmpfs that something else fills: one line; the same command then goes on, and nothing is paid twice."""
    disk, but = world.folder / "disk", (*PASSING, r"(cfg|facts|contexts)\.json$")  # which say where --out was
    disk.mkdir()
    for stage in ("train", "interpret", "contexts"):
        line, without, kept = stages(world)[stage]
        row = Row("7", f"disk (tmpfs) filled while {stage} writes, or read-only in mid-run")
        where = world.copy(stage, without)
        cleared(stage, where)
        seconds = world.must(line, where)
        expected = world.contents(where / kept[0], but)
        shutil.rmtree(where)
        for nth in range(trials):
            size = TMPFS if stage == "train" else TMPFS // 2
            if subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], capture_output=True
            ).returncode:
                return
            try:
                where = world.copy(stage, ("saes", *without))
                if stage != "train":
                    shutil.copytree(world.base / "saes", disk / "saes")
                    (where / "saes").symlink_to(disk / "saes")
                    cleared(stage, where)
                at = line.replace("--out saes", f"--out {disk / 'saes'}")
                questions = Questions(world)
                asked = questions.now()
                pid = world.start(at, where)
                time.sleep(world.random.uniform(0, seconds))
                if read_only := nth % 4 == 3:
                    subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True)
                else:
                    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
                        while True:
                            filler.write(bytes(4096))
                done = world.wait(pid)
                row.trials += 1
                row.faults += done.code != 0
                if row.ended(done, str(nth)) and done.code == 2:
                    row.bad["wrong"].append(f"exit 2 for a disk that failed in mid-run: {done.reason()}")
                subprocess.run(["mount", "-o", "remount,rw", str(disk)], capture_output=True)
                (disk / "filler").unlink(missing_ok=True)
                if not read_only and (left := [path.name for path in disk.rglob("*.partial") if path.is_file()]):
                    row.bad["lost"].append(f"partial files stay on the full disk: {left[:3]}")
                again = world.run(at, where)
                if row.ended(again, f"{nth} again") and again.code != 0:
                    row.bad["lost"].append(f"it does not go on: {again.reason()}")
                elif world.contents(disk / "saes", but) != expected:
                    found = world.contents(disk / "saes", but)
                    odd = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
                    row.bad["wrong"].append(f"{odd[:3]} differ after going on")
                if (paid := questions.repeated_since(asked)) > 0:
                    row.bad["lost"].append(f"{paid} questions paid twice")
                shutil.rmtree(where)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
        yield row


MARKS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
NASTY = "a\x1b]0;owned\x07\x1b[2Jb\u202etxt\u2066\x9b31m"


def terminal(world: World, trials: int, total: int) -> Iterator[Row]:
    """Control and direction marks in manifests, cfg keys, corpora, prompts and answers: none reaches the terminal."""
    row = Row("9", "ESC, OSC, C1 and direction marks in manifests, configurations, corpora, prompts and answers")
    name = next(path.name for path in sorted((world.base / "saes").iterdir()) if path.name.startswith("topk"))
    page = ["report", "--out", "saes", "--html", "n.html", "--device", "cpu"]
    clamp = ["clamp", "--sae", f"saes/{name}", "--set", "3=9", "--device", "cpu", "--prompt", NASTY]
    cases: list[tuple[str, list[Sequence[str]]]] = [
        ("shards/zarr.json", [["cache", "info", "shards"], ["train", "--cache", "shards", "--out", "n"]]),
        ("saes/*/cfg.json", [f"analyze {ANALYZE} --out saes".split(), page]),
        ("texts.jsonl", [f"harvest {HARVEST} --out n".split(), clamp]),
        ("saes/*/interpretations.json", [page]),
        ("saes/**/metrics.jsonl", [page]),
        ("scores.json", [[*page, "--scores", "scores.json"]]),
        ("texts.jsonl", [["train", "--cache", "shards", "--name", NASTY], ["train", "--cache", NASTY]]),
        ("texts.jsonl", [[NASTY], ["analyze", f"--{NASTY}"], ["analyze", "--metric", NASTY]]),
        ("pipe.toml", [["run", "--config", "pipe.toml"]]),
    ]  # fmt: skip
    for nth in range(trials):
        pattern, commands = cases[nth % len(cases)]
        where = world.copy()
        file = world.random.choice(sorted(where.glob(pattern)))
        if file.suffix == ".toml":
            file.write_text(f"{json.dumps(NASTY)} = 1\n{file.read_text()}")
        else:
            lines = [nasty(record, world.random, 0.3) for record in records(file)]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        row.trials += 1
        row.faults += 1
        for line in commands:
            done = world.run(line, where)
            row.ended(done, f"{line} with {file.name}")
            shown = where / "n.html"
            text = done.out + done.err + (shown.read_text() if shown.exists() else "")
            if found := MARKS.search(text):
                around = text[max(0, found.start() - 40) : found.start() + 20]
                row.bad["wrong"].append(f"{' '.join(line)[:60]} with {file.name}: {around!r}")
        shutil.rmtree(where)
    yield row


def nasty(value: Any, draw: random.Random, share: float) -> Any:
    """The value with marks in a share of its strings and keys."""
    if isinstance(value, dict):
        return {nasty(k, draw, share / 20): nasty(v, draw, share) for k, v in value.items()}
    if isinstance(value, list):
        return [nasty(item, draw, share) for item in value]
    return value + NASTY if isinstance(value, str) and draw.random() < share else value


ROWS: dict[str, Callable[[World, int, int], Iterator[Row]]] = {
    "two": two_at_once,
    "vanish": vanishing,
    "answers": answers_kept,
    "links": links,
    "flips": flips,
    "odd": odd_values,
    "special": special_files,
    "replaced": replaced,
    "mixed": mixed,
    "full": full_disks,
    "terminal": terminal,
    "key": key_stays_out,
    "kills": kills,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(ROWS))
    parser.add_argument("--trials", type=int, default=20, help="Of each row but flips and kills.")
    parser.add_argument("--flips", type=int, default=500, help="Bits in all.")
    parser.add_argument("--kills", type=int, default=1000, help="Kills in all.")
    parser.add_argument("--stage", action="append", help="Of kills; all of them if absent.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="Bad trials told of each row.")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    failed, began = False, time.monotonic()
    with tempfile.TemporaryDirectory() as path:
        world = World(Path(path), args.seed)
        world.only = args.stage
        print("| line | fault | trials | faults | lost | wrong | hung | traceback | unnoticed |", flush=True)
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        try:
            for name, rows in ROWS.items():
                if name in (args.only or ROWS):
                    total = args.flips if name == "flips" else args.kills
                    for row in rows(world, args.trials, total):
                        print(row, flush=True)
                        for kind, found in row.bad.items():
                            failed |= bool(found)
                            for what in found[: args.show]:
                                print(f"    {kind}: {what}", file=sys.stderr, flush=True)
        finally:
            os.kill(world.server, signal.SIGKILL)
    print(f"\n{time.monotonic() - began:.0f} s, seed {args.seed}, torch {torch.__version__}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
