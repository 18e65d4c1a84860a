"""Imports point upstream only, nobody but the command line prints, and importing a module does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("machine", "harvest", "train", "analyze", "console")  # in the order the data flows
# The package from upstream to downstream. A folder or module imports only from lines above it and from itself.
ORDER = (
    "__init__",
    "reporting",
    "machine",
    "harvest/cache",
    "harvest/settings",
    "harvest/corpus",
    "harvest/lm",
    "harvest/filling",
    "harvest",
    "train/ranks",
    "train/sparse",
    "train/losses",
    "train/saes",
    "train/settings",
    "train/loading",
    "train/folder",
    "train",
    "analyze/inputs",
    "analyze/contexts",
    "analyze/interpret",
    "analyze/scores",
    "analyze/clamp",
    "analyze/latents",
    "analyze/report",
    "analyze/pipeline",
    "analyze",
    "console",
    "cli",
    "api",
    "__main__",
)
# Arrows that still run back up; the list only gets shorter.
TO_MEND: set[str] = set()
MODULES_A_FOLDER = 12  # saes apart, where a variant is a file
COMMAND_LINE = (
    Path("cli.py"),
    *(Path("console", name) for name in ("commands.py", "options.py", "terminal.py", "watch.py")),
)
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
    """The module; of the package's own, which names the API for type checkers, only what runs on import."""
    tree = ast.parse((ROOT / file).read_text(), str(file))
    return import_time_tree(tree) if file == Path("__init__.py") else tree


def import_time_tree(tree: ast.Module) -> ast.Module:
    """What runs when a module is imported: without the bodies of functions and of `if TYPE_CHECKING`."""

    class Runs(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else node

    left = Runs().visit(tree)
    assert isinstance(left, ast.Module)
    return left


def place_of(module: str) -> str:
    """The line of ORDER that the dotted module or name belongs to: the longest that matches."""
    path = "/".join(module.split(".")[1:]) or "__init__"
    while path and path not in ORDER:
        path = path.rpartition("/")[0]
    return path or "__init__"


def upstream_violations(file: Path, tree: ast.AST) -> list[str]:
    here = ORDER.index(place_of(module_name(file)))
    return [
        f"{file} imports {name}"
        for name in imports(tree)
        if name.split(".")[0] == "routesae" and ORDER.index(place_of(name)) > here
    ]


def test_every_file_has_a_place_in_the_order() -> None:
    assert len(files()) > 25
    assert {file.parts[0].removesuffix(".py") for file in files()} == {place.partition("/")[0] for place in ORDER}


def test_no_import_runs_in_a_circle() -> None:
    modules = {module_name(file) for file in files()}

    def module_of(name: str) -> str:
        return name if name in modules else name.rpartition(".")[0]

    graph = {module_name(file): {module_of(n) for n in imports(parsed(file))} & modules for file in files()}
    graph = {module: {name for name in names if name != module} for module, names in graph.items()}
    TopologicalSorter(graph).prepare()


def test_no_folder_holds_more_modules_than_one_takes_in_at_a_glance() -> None:
    held = Counter(str(file.parent) for file in files() if file.name != "__init__.py")
    assert [(folder, n) for folder, n in held.items() if n > MODULES_A_FOLDER and folder != "train/saes"] == []


def test_imports_point_upstream_only() -> None:
    found = [violation for file in files() for violation in upstream_violations(file, parsed(file))]
    assert set(found) == TO_MEND


@pytest.mark.parametrize(
    ("file", "code", "named"),
    [
        ("harvest/cache/reader.py", "from routesae.train import saes", "routesae.train.saes"),
        ("train/run.py", "def f():\n    import routesae.analyze.scores.run", "routesae.analyze.scores.run"),
        ("analyze/scores/run.py", "from routesae import cli", "routesae.cli"),
        ("reporting.py", "from routesae.machine.device import pick_device", "routesae.machine.device.pick_device"),
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
        if name.split(".")[0] in LANGUAGE_MODEL_LIBRARIES or name.startswith("routesae.harvest.lm.model")
    ]
    assert found == []


def test_no_module_imports_a_language_model_library_when_it_is_imported() -> None:
    found = [
        f"{file} imports {name}"
        for file in files()
        for name in imports(import_time_tree(parsed(file)))
        if name.split(".")[0] in LANGUAGE_MODEL_LIBRARIES
    ]
    assert found == []


def test_command_line_imports_no_room_when_it_is_imported() -> None:
    """`routesae --help` answers at once; a room brings torch."""
    assert {Path("cli.py"), Path("console/terminal.py")} < set(COMMAND_LINE)
    for file in COMMAND_LINE:
        imported = {name for name in imports(import_time_tree(parsed(file))) if name.startswith("routesae")}
        own = ("__version__", "reporting.", "console.", "machine.settings.", "machine.stop.", "machine.files.")
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
