"""Chat servers for the tests of interpret."""

from __future__ import annotations

from collections.abc import Iterator

import openai._base_client
import pytest

from routesae.tests.analyze.interpret.chat_server import KEY, Act, Serve, Server


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts servers, with a key in the environment and a client whose backoff does not slow the tests down."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.02)
    servers: list[Server] = []

    def start(act: Act) -> Server:
        servers.append(Server(act))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
