"""Serve the page on this machine alone, with a box for one's own text: which latents are active on each token.

    GET  /           the page
    POST /latents    a Question, as JSON; answered by its tokens, and each one's strongest latents

Only the loopback is listened on. A request must name it as its host, so that no other site's name can lead here, and
a question must be JSON, which a browser lets no page of another site send.
"""

import json
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from routesae.analyze.inputs.lm import LM
from routesae.analyze.latents.text import latents
from routesae.machine.files import parse_json
from routesae.reporting import WrongInput
from routesae.train.saes import SAE

HOST = "127.0.0.1"
LARGEST_QUESTION = 1 << 16  # bytes
SHOWN = 8  # latents of a token


class Question(BaseModel):
    """run: number of the SAE on the page. latent: one whose activations are wanted too."""

    model_config = ConfigDict(strict=True, extra="forbid")
    run: NonNegativeInt
    text: str = Field(min_length=1)
    latent: NonNegativeInt | None = None


Ask = Callable[[Question], dict[str, Any]]


def asking(lm: LM, saes: Mapping[int, SAE]) -> Ask:
    """What answers questions about these SAEs, one after the other. It raises WrongInput."""
    lock = threading.Lock()

    def ask(question: Question) -> dict[str, Any]:
        sae = saes.get(question.run)
        if sae is None or (question.latent or 0) >= sae.latents:
            raise WrongInput("there is no such SAE or latent on the page")
        with lock:
            found = latents(lm, sae, question.text, top=SHOWN, noted=False)
        top = [[[row["latent"], round(row["activation"], 3)] for row in of_token] for of_token in found.by_token()]
        values: list[float] | None = None
        if question.latent is not None:
            dense = found.latents.dense()[..., question.latent]
            of_kept = iter(dense.reshape(sum(found.kept), -1).amax(1).tolist())  # over the layers of an mlsae
            values = [round(next(of_kept), 3) if kept else 0.0 for kept in found.kept]
        return {"tokens": found.tokens, "top": top, "values": values}

    return ask


def page_server(page: Path, ask: Ask, port: int) -> ThreadingHTTPServer:
    """A server of the page, listening. Raises WrongInput if the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # of a client that says nothing more

        def do_GET(self) -> None:
            if self.is_for_us() and self.path == "/":
                self.reply(HTTPStatus.OK, page.read_bytes(), "text/html; charset=utf-8")
            else:
                self.reply(HTTPStatus.NOT_FOUND, b"there is only the page, at /", "text/plain")

        def do_POST(self) -> None:
            try:
                self.reply(HTTPStatus.OK, json.dumps(ask(self.question())).encode(), "application/json")
            except ValueError as error:  # WrongInput is one
                self.close_connection = True  # whatever else was sent is not read
                self.reply(HTTPStatus.BAD_REQUEST, json.dumps({"error": str(error)}).encode(), "application/json")

        def question(self) -> Question:
            size, kind = self.headers.get("Content-Length", ""), self.headers.get_content_type()
            if not self.is_for_us() or (self.path, kind) != ("/latents", "application/json"):
                raise WrongInput("only the page itself may ask")
            if not size.isdecimal() or int(size) > LARGEST_QUESTION:
                raise WrongInput(f"at most {LARGEST_QUESTION:,} bytes are read")
            return Question.model_validate(parse_json(self.rfile.read(int(size))))

        def is_for_us(self) -> bool:
            return self.headers.get("Host") in [f"{name}:{server.server_port}" for name in (HOST, "localhost")]

        def reply(self, status: HTTPStatus, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Texts that somebody types are nobody else's business."""

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise WrongInput(f"--port {port}: {error.strerror}; give another") from None
    return server
