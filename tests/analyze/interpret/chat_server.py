"""A chat server on the loopback that does as a test says, and SAE folders whose contexts name their latent."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from routesae.analyze.interpret.ledger import open_ledger, read_ledger
from routesae.analyze.interpret.settings import InterpretSettings
from routesae.cli import main
from routesae.tests.made_up import write_made_up

KEY = "sk-loopback-0123456789-secret"
GOOD = {"category": "low-level", "score": 4, "explanation": "says so"}
Reply = tuple[int, dict[str, str], bytes]
Act = Callable[[int, int, dict[str, Any]], Reply | None]
SOON = {"retry-after-ms": "5"}  # so that tries follow one another at once


def completion(content: Any, finish: str = "stop", **message: Any) -> bytes:
    choices = [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}]
    usage = {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050}
    return json.dumps({"id": "x", "model": "gpt-4o-real", "choices": choices, "usage": usage}).encode()


def good(**changes: Any) -> Reply:
    return 200, {}, completion(json.dumps({**GOOD, **changes}))


def failing(status: int, code: str | None = None, message: str = "no", **headers: str) -> Reply:
    shown = {name.replace("_", "-"): value for name, value in headers.items()} or SOON
    return status, shown, json.dumps({"error": {"message": message, "code": code, "type": code}}).encode()


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed reset their connections."""


class Server:
    """A chat server on the loopback. act(latent, nth time it is asked, body) gives the reply, or None to hang up.

    asked: requests a latent, counted when they come in; replied: when a reply has been sent.
    """

    def __init__(self, act: Act):
        self.asked: Counter[int] = Counter()
        self.replied: Counter[int] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: set[str | None] = set()
        self.times: dict[int, list[float]] = {}
        self.under_way = self.most_under_way = 0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                named = re.search(r"latent-(\d+)-", body["messages"][0]["content"])
                latent = int(named[1]) if named else -1
                with lock:
                    server.asked[latent] += 1
                    nth = server.asked[latent]
                    server.bodies.append(body)
                    server.paths.append(self.path)
                    server.keys.add(self.headers.get("Authorization") or self.headers.get("api-key"))
                    server.times.setdefault(latent, []).append(time.monotonic())
                    server.under_way += 1
                    server.most_under_way = max(server.most_under_way, server.under_way)
                reply = act(latent, nth, body)
                with lock:
                    server.under_way -= 1
                if reply is None:
                    self.close_connection = True
                    return
                status, headers, content = reply
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    if "Content-Length" not in headers:
                        self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    return  # the client has given up
                with lock:
                    server.replied[latent] += 1

            def log_message(self, *_: object) -> None:
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


Serve = Callable[[Act], Server]


def subject(folder: Path, latents: int, *, text: str = "", samples: int = 0) -> Path:
    """A folder with contexts of so many latents, whose texts name the latent; no SAE in it."""
    folder.mkdir(parents=True)
    rows = []
    for latent in range(latents):
        for n in range(5 + samples):
            kind = "chosen" if n < 5 else "weak"
            tokens = [f"latent-{latent}-", f"example{n}", " router", f"{text}."]
            row = {"latent": latent, "kind": kind, "rank": n, "token_class": f"class{n}", "activation": 20.0 - n}
            row |= {"layer": 3, "row": 1000 * latent + n, "position": 6, "document": 0, "at": 2}
            row |= {"token_ids": [1, 2, 3, 4], "tokens": tokens, "activations": [0.0, 0.0, 20.0 - n, 0.0]}
            rows.append(row)
    columns = {"latent": range(latents), "active": [50] * latents, "max_activation": [20.0] * latents}
    columns |= {"mean_activation": [9.0] * latents, "token_classes": [5] * latents, "kept": [True] * latents}
    write_made_up(folder, [rows], columns)
    return folder


def asked(folder: Path, server: Server, **changes: Any) -> InterpretSettings:
    """Quick settings for that folder and server."""
    quick: dict[str, Any] = {"base_url": server.url, "timeout": 10.0, "retries": 2, "concurrency": 8}
    return InterpretSettings(**{**quick, "saes": (str(folder),), **changes})


def write_answer(folder: Path, latent: int, **says: Any) -> None:
    """A ledger as interpret leaves it, of one answer."""
    counted = {"input_tokens": 9, "output_tokens": 1, "max_output_tokens": 512}
    with open_ledger(folder / "interpretations.jsonl", {"model": "made-up"}) as ledger:
        ledger.add({"latent": latent, "outcome": "answered", "reason": None, **GOOD, **counted, **says})


def lines(folder: Path, name: str = "interpretations.jsonl") -> list[dict[str, Any]]:
    return read_ledger(folder / name)[1]


def arguments(folder: Path, server: Server, *more: object) -> list[str]:
    return ["interpret", "--sae", str(folder), "--base-url", server.url, *map(str, more)]


def invoke(folder: Path, server: Server, *more: object) -> Result:
    return CliRunner().invoke(main, arguments(folder, server, *more))


def assert_no_key_below(folder: Path) -> None:
    for file in folder.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
