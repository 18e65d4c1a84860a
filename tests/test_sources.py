"""What no source file may do: run code or unpickle objects out of a file, or trust a model's own code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml")
CALLS = ("eval", "exec", "__import__", "compile")


def sources() -> list[Path]:
    rooms = [ROOT / room for room in ("harvest", "train", "analyze", "benchmarks")]
    return sorted([*ROOT.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))])


def violations(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            if ast.unparse(node) == "from pickle import UnpicklingError":  # what torch.load raises of what it refuses
                continue
            yield from (f"line {node.lineno}: imports {name}" for name in names if name.split(".")[0] in MODULES)
            if names == ["torch"] and any(one.name == "load" for one in node.names):
                yield f"line {node.lineno}: torch.load by a bare name"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if called in CALLS:
                yield f"line {node.lineno}: calls {called}"
            if called.endswith("torch.load") and not _is(given.get("weights_only"), True):
                yield f"line {node.lineno}: torch.load without weights_only=True"
            if called.endswith("add_safe_globals") or called.endswith("safe_globals"):
                yield f"line {node.lineno}: widens what torch.load takes"
            for name in ("trust_remote_code", "allow_pickle"):
                if name in given and not _is(given[name], False):
                    yield f"line {node.lineno}: {name} may be on"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_source_runs_or_unpickles_what_a_file_holds() -> None:
    assert len(sources()) > 60
    found = {str(file.relative_to(ROOT)): list(violations(ast.parse(file.read_text()))) for file in sources()}
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import UnpicklingError, loads",
        "from yaml import load",
        "import torch\ntorch.load(file)",
        "from torch import load",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trust)",
        "eval(text)",
        "exec(text)",
        "torch.serialization.add_safe_globals([C])",
    ],
)
def test_each_of_them_is_found(code: str) -> None:
    assert len(list(violations(ast.parse(code)))) == 1


def test_what_is_safe_is_not_found() -> None:
    code = (
        "torch.load(f, weights_only=True); sae.eval(); re.compile(x); M.from_pretrained(n, trust_remote_code=False)"
    )
    assert list(violations(ast.parse(code))) == []
    assert list(violations(ast.parse("from pickle import UnpicklingError"))) == []
