"""Imports point upstream only, nobody but the command line prints, and importing a module does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("harvest", "train", "analyze")  # in the order the data flows
# What each room may import of the package besides itself; reporting is below them all.
UPSTREAM = {
    "__init__": (),
    "__main__": ("cli",),
    "reporting": (),
    "harvest": ("reporting",),
    "train": ("reporting", "harvest"),
    "analyze": ("reporting", "harvest", "train"),
    "watch": ("reporting",),
    "terminal": ("reporting", "watch"),
    "options": ("reporting", "watch", "terminal", "harvest"),
    "cache_commands": ("reporting", "terminal", "options", "harvest"),
    "cli": ("reporting", "watch", "terminal", "options", "cache_commands", "harvest", "train", "analyze"),
}
COMMAND_LINE = tuple(map(Path, ("cli.py", "cache_commands.py", "options.py", "terminal.py", "watch.py")))
LANGUAGE_MODEL_LIBRARIES = {"transformers", "datasets", "openai"}
NAMES_OF_NOTHING = ("utils", "util", "common", "helpers", "helper", "misc", "base")


def files() -> list[Path]:
    """Every module of the package, relative to its root."""
    found = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    return sorted(file.relative_to(ROOT) for file in found)


def module_name(file: Path) -> str:
    parts = ["routesae", *file.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module named by an import below `tree`, in functions too; "a.b" for `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write routesae.…"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parsed(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), str(file))


def import_time_tree(file: Path) -> ast.Module:
    """What runs when the file is imported: without the bodies of functions and of `if TYPE_CHECKING`."""

    class Runs(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else node

    tree = Runs().visit(parsed(file))
    assert isinstance(tree, ast.Module)
    return tree


def upstream_violations(file: Path, tree: ast.AST) -> list[str]:
    room = file.parts[0].removesuffix(".py")
    allowed = (room, *UPSTREAM[room])
    return [
        f"{file} imports {name}"
        for name in imports(tree)
        if name.split(".")[0] == "routesae"
        and name != "routesae.__version__"  # the package itself, which imports nothing
        and name.split(".")[1] not in allowed
    ]


def test_every_file_belongs_to_a_room() -> None:
    assert len(files()) > 25
    assert {file.parts[0].removesuffix(".py") for file in files()} == set(UPSTREAM)


def test_imports_point_upstream_only() -> None:
    assert [violation for file in files() for violation in upstream_violations(file, parsed(file))] == []


@pytest.mark.parametrize(
    ("file", "code", "named"),
    [
        ("harvest/cache.py", "from routesae.train import saes", "routesae.train.saes"),
        ("train/run.py", "def f():\n    import routesae.analyze.run", "routesae.analyze.run"),
        ("analyze/run.py", "from routesae import cli", "routesae.cli"),
        ("reporting.py", "from routesae.harvest.device import pick_device", "routesae.harvest.device.pick_device"),
    ],
)
def test_a_downstream_import_is_found_wherever_it_hides(file: str, code: str, named: str) -> None:
    assert upstream_violations(Path(file), ast.parse(code)) == [f"{file} imports {named}"]


def test_train_never_imports_a_language_model_library() -> None:
    found = [
        f"{file} imports {name}"
        for file in files()
        if file.parts[0] == "train"
        for name in imports(parsed(file))
        if name.split(".")[0] in LANGUAGE_MODEL_LIBRARIES or name.startswith("routesae.harvest.lm")
    ]
    assert found == []


def test_no_module_imports_a_language_model_library_when_it_is_imported() -> None:
    found = [
        f"{file} imports {name}"
        for file in files()
        for name in imports(import_time_tree(file))
        if name.split(".")[0] in LANGUAGE_MODEL_LIBRARIES
    ]
    assert found == []


def test_command_line_imports_no_room_when_it_is_imported() -> None:
    """`routesae --help` answers at once; a room brings torch."""
    assert {Path("cli.py"), Path("terminal.py")} < set(COMMAND_LINE)
    for file in COMMAND_LINE:
        imported = {name for name in imports(import_time_tree(file)) if name.startswith("routesae")}
        assert imported
        own = ("__version__", "reporting.", *(f"{module.stem}." for module in COMMAND_LINE))
        assert [name for name in imported if not name.removeprefix("routesae.").startswith(own)] == []


def test_nobody_but_the_command_line_prints() -> None:
    found = []
    for file in files():
        if file not in COMMAND_LINE:
            tree = parsed(file)
            written = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
            found += [f"{file} calls {name}" for name in written if name in ("print", "click.echo", "echo", "pprint")]
            found += [f"{file} writes to a standard stream" for name in written if name.startswith("sys.std")]
            found += [f"{file} imports {name}" for name in imports(tree) if name.split(".")[0] in ("click", "tqdm")]
    assert found == []


def test_every_module_is_named_for_what_it_holds() -> None:
    stems = {file.stem for file in files()} | {parent.name for file in files() for parent in file.parents}
    assert [stem for stem in stems if stem in NAMES_OF_NOTHING or stem.startswith("base_")] == []


def test_every_module_opens_with_a_docstring() -> None:
    assert [str(file) for file in files() if not ast.get_docstring(parsed(file))] == []


def in_a_fresh_process(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_importing_the_package_imports_nothing_else(tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import routesae; "
        "assert set(sys.modules) - before == {'routesae'}, set(sys.modules) - before"
    )
    run = in_a_fresh_process(code, tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_importing_every_module_does_nothing_observable(tmp_path: Path) -> None:
    """No output, no file, no thread, no logging set up, no default of torch or random state changed."""
    names = [module_name(file) for file in files()]
    code = f"""
import importlib, logging, os, signal, threading, warnings
import torch
def state():
    logs = [logging.getLogger(name) for name in ("", "routesae")]
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            [(list(log.handlers), log.level) for log in logs], threading.active_count(), dict(os.environ),
            signal.getsignal(signal.SIGINT), list(warnings.filters))
before = state()
for name in {names!r}:
    importlib.import_module(name)
assert state() == before, (before, state())
"""
    run = in_a_fresh_process(code, tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
