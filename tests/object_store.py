"""A real S3 server on loopback (moto's), and a proxy before it that is slow, short, silent or shut when told to."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from routesae.harvest.cache.store.bucket import BucketFolder

BUCKET = "bucket"


class Request(NamedTuple):
    """One that came to the proxy. range: as its header says, "bytes=0-9"; "" without one."""

    method: str
    path: str
    range: str


Fault = Callable[[Request], str | None]  # "hang", "short", "refuse", "break" or "flip"; None: all is well


class Proxy(ThreadingHTTPServer):
    """Hands requests to the server behind it, and remembers them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behind: tuple[str, int]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind
        self.requests: list[Request] = []
        self.fault: Fault = lambda request: None
        self.latency = 0.0  # seconds before each answer
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none of the test's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer waits 40 ms for the acknowledgement of its headers
    wbufsize = -1
    server: Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, self.path.partition("?")[0], self.headers.get("Range", ""))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        try:
            self._answer(request, body)
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def _answer(self, request: Request, body: bytes) -> None:
        time.sleep(self.server.latency)
        fault = self.server.fault(request)
        if fault == "hang":
            time.sleep(1.5)
            self.close_connection = True
            return
        if fault in ("refuse", "break"):
            self._send(403 if fault == "refuse" else 500, {}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        connection = http.client.HTTPConnection(*self.server.behind)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "flip":
            data = bytes([data[0] ^ 1]) + data[1:]
        length = len(data) if self.command != "HEAD" else int(answer.headers.get("Content-Length", 0))
        dropped = ("connection", "content-length", "transfer-encoding")
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in dropped}
        if fault == "short":  # says what it should be, and ends before that
            self._send(answer.status, kept, data[: len(data) // 2], length)
            self.close_connection = True
        elif fault == "short and says so":
            self._send(answer.status, kept, data[: len(data) // 2])
        else:
            self._send(answer.status, kept, data, length)

    def _send(self, status: int, headers: dict[str, str], data: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward


@contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """Host and port of an S3 with one empty bucket."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        connection = http.client.HTTPConnection(host, port)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        connection.close()
        yield host, port
    finally:
        server.stop()


def put_folder(folder: Path, url: str) -> None:
    """Every file below `folder` as an object below `url`, unverified: how a test's cache gets there fast."""
    there = BucketFolder.at(url)
    for path in folder.rglob("*"):
        if path.is_file():
            there.put(path.relative_to(folder).as_posix(), path.read_bytes())


@contextmanager
def proxy_before(behind: tuple[str, int]) -> Iterator[Proxy]:
    with Proxy(behind) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
