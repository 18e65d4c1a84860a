"""SAEs to the hub and back, against a server that answers as the hub does; and what each refusal says."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner, Result

from routesae.cli import main
from routesae.harvest.cache.reader import Cache
from routesae.reporting import FailedRun, WrongInput
from routesae.train.folder.checkpoint import Source, load_sae, read_source, save_sae
from routesae.train.folder.hub import Reference, fetch_sae, model_card, parse_reference, push_sae
from routesae.train.saes import Recipe, build

TOKEN = "hf_test"
SOURCE = {
    "model": "some/model",
    "corpus": "Skylion007/openwebtext",
    "context": 16,
    "held_out": {
        "tokens": 12345,
        "norm_mse": 0.0987,
        "fvu": 0.1234,
        "l0": 7.5,
        "dead": 0.25,
        "routing_entropy": None,
    },
}


class Hub:
    """What the hub holds: {repo: {path: bytes}}, one commit a repo. status: answered to everything, if not None."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.status: int | None = None

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


class Answers(BaseHTTPRequestHandler):
    """The endpoints of the hub that huggingface_hub uses here; safetensors go through LFS, the rest in the commit."""

    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, data: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        sent = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        for name, value in {**sent, **{key.replace("_", "-"): value for key, value in headers.items()}}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.asked.append(self.path)
        path = self.path.partition("?")[0]
        if self.hub.status is not None:
            return self.answer(self.hub.status, {"error": "no"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            repo, revision = found.groups()
            if repo not in self.hub.repos:
                return self.missing("RepoNotFound")
            if revision not in ("main", self.hub.sha(repo)):
                return self.missing("RevisionNotFound")
            return self.answer(200, {"id": repo, "sha": self.hub.sha(repo), "siblings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            files = self.hub.repos[found[1]]
            return self.answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ],
            )
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            data = self.hub.repos[found[1]][found[3]]
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.answer(200, data, ETag=etag, X_Repo_Commit=found[2])
        return self.missing("EntryNotFound")

    def do_PUT(self) -> None:
        data = self.body()
        assert hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
        self.hub.large[self.path.rpartition("/")[2]] = data
        self.answer(200)

    def do_POST(self) -> None:
        self.hub.asked.append(self.path)
        data, here = self.body(), f"http://{self.headers['Host']}"
        if self.hub.status is not None:
            return self.answer(self.hub.status, {"error": "no"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            repo = f"{asked['organization']}/{asked['name']}"
            known = repo in self.hub.repos
            self.hub.repos.setdefault(repo, {})
            self.hub.private.setdefault(repo, "private" in (asked.get("visibility"), asked.get("private")))
            return self.answer(409 if known else 200, {"url": f"{here}/{repo}"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular"}
                for f in json.loads(data)["files"]
            ]
            return self.answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{here}/large/{wanted['oid']}"}}}
                for wanted in json.loads(data)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    self.hub.repos[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.hub.repos[found[1]][value["path"]] = self.hub.large[value["oid"]]
            commit = {"commitUrl": f"{here}/{found[1]}/commit/x", "commitOid": self.hub.sha(found[1])}
            return self.answer(200, commit)
        return self.missing("EntryNotFound")


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    """The hub and its address."""
    held = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnAnswers", (Answers,), {"hub": held}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield held, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def endpoint(hub: tuple[Hub, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub's address, which huggingface_hub uses in this process, with nothing of this machine's login."""
    address = hub[1]
    point_at(address, tmp_path, monkeypatch)
    return address


def point_at(address: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What huggingface_hub reads from the environment when it is imported, which is done already."""
    from huggingface_hub import constants

    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    changed = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_DISABLE_XET": True}
    changed |= {"HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
    for name, value in changed.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def routesae(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def refusal(done: Result, code: int) -> str:
    """Its one line."""
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("routesae: ")
    return line


def outcomes(capfd: pytest.CaptureFixture[str], *calls: tuple[str, Path | None]) -> list[tuple[str, str]]:
    """Of fetching each reference, or of pushing a folder to it: (type, message) of an error, or ("", result).

    Nothing else may be said.
    """
    capfd.readouterr()
    results = []
    for reference, folder in calls:
        try:
            results.append(("", str(push_sae(folder, reference) if folder else fetch_sae(reference))))
        except (FailedRun, WrongInput) as error:
            results.append((type(error).__name__, str(error)))
    assert capfd.readouterr() == ("", "")
    assert all("\n" not in text for _, text in results)
    return results


def sae_folder(folder: Path, name: str = "routesae", **changes: Any) -> Path:
    layers = (3,) if name == "topk" else (2, 3, 4, 5)
    folder.mkdir(parents=True)
    recipe = Recipe(sae=name, layers=layers, width=32, latents=64, k=8, **changes)
    save_sae(folder, build(recipe, torch.Generator().manual_seed(0)), SOURCE)
    (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n')
    return folder


# ------------------------------------------------------------------------------------------------- there and back


def test_what_was_pushed_is_fetched_byte_for_byte_and_analysed(
    hub: tuple[Hub, str], endpoint: str, tiny_cache: Cache, tmp_path: Path
) -> None:
    folder = sae_folder(tmp_path / "saes" / "mine")
    (folder / "secret.txt").write_text("not for the hub")
    done = routesae("push", folder, "me/mine", "--private", "--message", "first")
    assert (done.exit_code, done.stdout) == (0, f"{endpoint}/me/mine\n"), done.stderr
    files = {"cfg.json", "sae_weights.safetensors", "router.safetensors", "metrics.jsonl"}
    pushed = hub[0].repos["me/mine"]
    assert set(pushed) == files | {"README.md"}
    assert {name: pushed[name] for name in files} == {name: (folder / name).read_bytes() for name in files}
    assert hub[0].private == {"me/mine": True}
    assert hub[0].messages == ["first"]

    scored = routesae("analyze", "--cache", tiny_cache.path, "--sae", "me/mine", "--metric", "L0")
    assert scored.exit_code == 0, scored.stderr
    assert [line for line in scored.stderr.splitlines() if "it/s" in line] == []  # no bars without a terminal
    assert scored.stdout.splitlines()[2].split()[:2] == ["me/mine", "routesae"]  # by its name, not its commit
    (there,) = (tmp_path / "hub" / "models--me--mine" / "snapshots").iterdir()
    wanted = files - {"metrics.jsonl"}
    fetched = {path.name: path.read_bytes() for path in there.iterdir()}
    assert fetched == {name: (folder / name).read_bytes() for name in wanted}


def test_the_command_finds_the_hub_by_its_environment(hub: tuple[Hub, str], tmp_path: Path) -> None:
    """In a process of its own, as huggingface_hub reads the environment when it is imported."""
    inherited = {k: v for k, v in os.environ.items() if not k.lower().endswith("proxy") and not k.startswith("HF_")}
    environment = {"HF_ENDPOINT": hub[1], "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "routesae", "push", str(sae_folder(tmp_path / "a", "topk")), "me/mine"]
    done = subprocess.run(
        command, env={**inherited, **environment}, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{hub[1]}/me/mine\n", "")


def test_folders_of_one_repository_are_pushed_and_fetched_alone(
    hub: tuple[Hub, str], endpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    held = hub[0]
    first, second = sae_folder(tmp_path / "a", "topk"), sae_folder(tmp_path / "b", "crosscoder", sparsity=0.1)
    pushed = outcomes(capfd, ("me/all/of/a", first), ("me/all/of/b", second))
    assert pushed == [("", f"{endpoint}/me/all/tree/main/of/{name}") for name in "ab"]
    assert {"of/a/README.md", "of/b/crosscoder.safetensors", "of/b/cfg.json"} <= set(held.repos["me/all"])
    ((kind, fetched),) = outcomes(capfd, (f"me/all/of/b@{held.sha('me/all')}", None))
    assert kind == ""
    there = Path(fetched)
    assert load_sae(there, torch.device("cpu")).recipe.sae == "crosscoder"
    assert {path.name for path in there.iterdir()} == {"cfg.json", "crosscoder.safetensors"}
    assert not (there.parent / "a").exists()


# ------------------------------------------------------------------------------------------------------ refusals


def test_what_the_hub_does_not_have_is_one_line(
    hub: tuple[Hub, str], endpoint: str, tiny_cache: Cache, capfd: pytest.CaptureFixture[str]
) -> None:
    hub[0].repos["me/empty"] = {"README.md": b"nothing else"}
    expected = {
        "nobody/none": "there is no such repository, or it wants a login (404)",
        "me/empty@v9": "there is no such revision (404)",
        "me/empty/sub": "on the hub me/empty has no sub/cfg.json",
    }
    results = outcomes(capfd, *((reference, None) for reference in expected))
    for (kind, message), (reference, reason) in zip(results, expected.items(), strict=True):
        assert kind == "WrongInput"
        assert message.startswith(f"{reference} is not a folder here")
        assert reason in message
    line = refusal(routesae("--quiet", "analyze", "--cache", tiny_cache.path, "--sae", "nobody/none"), 2)
    assert line == f"routesae: {results[0][1]}"


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        (401, "WrongInput", "wants a login (401); log in with `hf auth login`"),
        (403, "WrongInput", "this login may not (403)"),
        (503, "FailedRun", "(503)"),
    ],
)
def test_a_hub_that_refuses_is_one_line(
    status: int,
    kind: str,
    expected: str,
    hub: tuple[Hub, str],
    endpoint: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hub[0].status = status
    results = outcomes(capfd, ("me/mine", None), ("me/mine", sae_folder(tmp_path / "mine")))
    assert len(results) == 2
    for result_kind, message in results:
        assert result_kind == kind
        assert expected in message


def test_a_hub_that_cannot_be_reached_is_one_line_and_a_failed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_at(f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path, monkeypatch)
    folder = sae_folder(tmp_path / "mine")
    ((kind, message),) = outcomes(capfd, ("me/mine", None))
    assert kind == "FailedRun"
    assert "refused" in message
    assert "refused" in refusal(routesae("push", folder, "me/mine"), 1)


def test_pushing_without_a_token_says_how_to_log_in(
    hub: tuple[Hub, str], endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    line = refusal(routesae("push", sae_folder(tmp_path / "a"), "me/mine"), 2)
    assert "wants a login" in line
    assert "hf auth login" in line
    assert hub[0].repos == {}


@pytest.mark.parametrize("repo", ["mine", "/abs/path", "me/mine@main", "me/../mine", "me/mine/", "-me/mine"])
def test_names_that_are_no_repository_are_refused(repo: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["push", "--", str(sae_folder(tmp_path / "a")), repo])
    assert done.exit_code == 2
    assert "is not a repository such as user/name" in done.stderr


@pytest.mark.parametrize("damage", ["no folder", "no weights", "cut weights", "no router"])
def test_a_folder_that_could_not_be_loaded_is_not_pushed(damage: str, tmp_path: Path) -> None:
    folder = sae_folder(tmp_path / "a") if damage != "no folder" else tmp_path / "none"
    if damage == "cut weights":
        os.truncate(folder / "sae_weights.safetensors", 100)
    elif damage != "no folder":
        (folder / ("sae_weights.safetensors" if damage == "no weights" else "router.safetensors")).unlink()
    done = CliRunner().invoke(main, ["push", str(folder), "me/mine"])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert str(folder) in line


# ------------------------------------------------------------------------------------------- names, and the card


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/mine", Reference("me/mine", "", None)),
        ("me/mine@v1.0", Reference("me/mine", "", "v1.0")),
        (
            "google/gemma-scope_2b/layer.12/w16k@refs/pr/3",
            Reference("google/gemma-scope_2b", "layer.12/w16k", "refs/pr/3"),
        ),
        ("mine", None),
        ("/me/mine", None),
        ("./me/mine", None),
        ("../me/mine", None),
        ("me/mine/../..", None),
        ("me/mine/*", None),
        ("saes/", None),
        ("", None),
    ],
)
def test_references_parse(text: str, expected: Reference | None) -> None:
    assert parse_reference(text) == expected


def test_a_local_folder_wins_and_nothing_is_imported_for_it(tmp_path: Path) -> None:
    sae_folder(tmp_path / "me" / "mine")
    code = (
        "import sys; from routesae.train.folder.hub import fetch_sae; print(fetch_sae('me/mine'), fetch_sae('none'));"
        "assert 'huggingface_hub' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "me/mine none\n"), done.stderr


def test_what_is_no_reference_is_left_for_its_reader_to_refuse(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="not an SAE folder"):
        load_sae(fetch_sae(str(tmp_path / "none")), torch.device("cpu"))


def test_the_card_says_what_the_sae_is_how_it_scored_and_how_to_load_it(tmp_path: Path) -> None:
    folder = sae_folder(tmp_path / "a")
    card = model_card(load_sae(folder, torch.device("cpu")).recipe, read_source(folder), "me/mine/sub")
    _, header, text = card.split("---\n", 2)
    assert header.splitlines()[:2] == ["library_name: routesae", "tags:"]
    assert 'base_model: "some/model"' in header
    for expected in ("some/model", "Skylion007/openwebtext", "| Layers | 2-5", "| Variant | routesae |", "| k | 8 |"):
        assert expected in text
    assert "| Latents | 64 over a width of 32 |" in text
    for expected in (
        "12,345 held-out tokens",
        "| NormMSE | 0.0987 |",
        "| L0 | 7.5000 |",
        "| Dead latents | 0.2500 |",
    ):
        assert expected in text
    assert "Entropy" not in text
    assert "routesae analyze --cache shards/ --sae me/mine/sub" in text
    assert 'SAE.load_from_disk(fetch_sae("me/mine/sub"))' in text


def test_the_card_of_what_saelens_cannot_open_says_so_and_names_no_local_path_as_base_model(tmp_path: Path) -> None:
    folder = sae_folder(tmp_path / "a", "crosscoder", sparsity=0.0)
    source = Source(model="/models/llama", held_out=None)
    card = model_card(load_sae(folder, torch.device("cpu")).recipe, source, "me/mine")
    assert "load_from_disk" not in card
    assert "SAELens cannot hold a crosscoder" in card
    assert "base_model" not in card
    assert "held-out" not in card
