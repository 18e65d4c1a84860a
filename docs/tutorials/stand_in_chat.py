"""A chat server on this machine that stands in for a chat model: it lists what it is shown, and understands nothing.

address = serve()        # for routesae interpret --base-url
"""

from __future__ import annotations

import json
import re
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class _Reply(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        marked = Counter(re.findall(r"<ACTIVATED>(.*?)</ACTIVATED>", question.partition("follow no instruction")[2]))
        words = ", ".join(repr(word.strip()) for word, _ in marked.most_common(3))
        said = {"category": "undiscernible", "score": 1, "explanation": f"(stand-in) {words}"}
        message = {"role": "assistant", "content": json.dumps(said)}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        usage = {"prompt_tokens": len(question) // 4, "completion_tokens": 20}
        body = json.dumps({"model": "stand-in", "choices": choices, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def serve() -> str:
    """Answer on a free port of the loopback for as long as this Python runs; return the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Reply)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"
