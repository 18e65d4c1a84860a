"""What is packaged is what is on disk, and an installed wheel stands without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKAGED = ("tests", "benchmarks", "docs", "build", "dist", "site")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders_with_init() -> set[str]:
    """Dotted names of the packages on disk."""
    found = set()
    for path, folders, names in os.walk(ROOT):
        folders[:] = [folder for folder in folders if folder not in NOT_PACKAGED and not folder.startswith(".")]
        if "__init__.py" in names:
            found.add(".".join(["routesae", *Path(path).relative_to(ROOT).parts]))
    return found


def modules_on_disk() -> set[str]:
    """Paths inside the wheel of every module of every package on disk."""
    return {
        f"{package.replace('.', '/')}/{file.name}"
        for package in folders_with_init()
        for file in ROOT.joinpath(*package.split(".")[1:]).glob("*.py")
    }


def data_on_disk() -> set[str]:
    """Paths inside the wheel of what the rooms read beside their modules: templates, scripts, tables."""
    files = (file for room in ("harvest", "train", "analyze") for file in (ROOT / room).rglob("*"))
    return {
        f"routesae/{file.relative_to(ROOT)}"
        for file in files
        if file.is_file() and file.suffix not in (".py", ".pyc") and "__pycache__" not in file.parts
    }


def clean_environment() -> dict[str, str]:
    """The environment without what would put the checkout or this Python's packages on a new one's path."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "PIP_"))}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source distribution, and the wheel built from it: of a copy of the files that git knows, so that nothing is
    written into the checkout."""
    source, out = tmp_path_factory.mktemp("source") / "any-name", tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, cwd=source, env=clean_environment(), capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


def test_listed_packages_are_the_folders_on_disk() -> None:
    packages = PYPROJECT["tool"]["setuptools"]["packages"]
    assert len(packages) == len(set(packages))
    assert set(packages) == folders_with_init()


def test_every_folder_with_python_files_is_a_package() -> None:
    """A folder without an __init__.py would import from the checkout and be missing from the wheel."""
    found = set()
    for path, folders, names in os.walk(ROOT):
        folders[:] = [folder for folder in folders if folder not in NOT_PACKAGED and not folder.startswith(".")]
        folders[:] = [folder for folder in folders if not (Path(path) / folder / "pyvenv.cfg").exists()]
        if any(name.endswith(".py") for name in names):
            found.add(".".join(["routesae", *Path(path).relative_to(ROOT).parts]))
    assert found == folders_with_init()


def test_wheel_holds_every_module_and_the_type_marker_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert len(modules_on_disk()) > 25
    assert len(data_on_disk()) > 6
    assert names == modules_on_disk() | data_on_disk() | {"routesae/py.typed"}


def test_source_distribution_holds_the_package_and_what_says_what_it_is(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.removeprefix("routesae/") for name in modules_on_disk() | data_on_disk()} <= names
    assert {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "pyproject.toml"} <= names
    assert {name.partition("/")[0] for name in names} & set(NOT_PACKAGED) == set()


def test_wheel_says_who_it_is(wheel: Path) -> None:
    project = PYPROJECT["project"]
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    headers = text.partition("\n\n")[0].splitlines()
    assert f"Version: {project['version']}" in headers
    assert "License-Expression: MIT" in headers
    assert "Requires-Python: >=3.11" in headers


def test_version_is_the_same_in_the_package_and_the_project() -> None:
    from routesae import __version__

    assert PYPROJECT["project"]["version"] == __version__
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_installed_wheel_answers_from_elsewhere_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    fresh, elsewhere = tmp_path / "fresh", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], env=clean_environment(), check=True)
    (site,) = fresh.glob("lib/python*/site-packages")
    # Dependencies are too large to download again: this Python's are seen, its editable installs are not, since
    # .pth files work in the environment's own folder only.
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies))

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=elsewhere, env=clean_environment(), capture_output=True, text=True)

    python = fresh / "bin" / "python"
    before = run(python, "-c", "import torch, click, routesae")
    assert "ModuleNotFoundError: No module named 'routesae'" in before.stderr
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
    installed = run(*pip, "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel)
    assert installed.returncode == 0, installed.stderr
    where = run(python, "-c", "import routesae, routesae.analyze.scores.run; print(routesae.__file__)")
    assert where.stdout.strip() == str(site / "routesae" / "__init__.py"), where.stderr
    for command in ([fresh / "bin" / "routesae"], [python, "-m", "routesae"]):
        answered = run(*command, "--help")
        assert (answered.returncode, answered.stderr) == (0, "")
        assert all(name in answered.stdout for name in ("harvest", "train", "analyze", "cache"))


def extras() -> list[Requirement]:
    return [Requirement(line) for extra in PYPROJECT["project"]["optional-dependencies"].values() for line in extra]


def requirements() -> list[Requirement]:
    """What is asked of others: without the project's own extras, which dev takes in."""
    found = [*map(Requirement, PYPROJECT["project"]["dependencies"]), *extras()]
    return [requirement for requirement in found if requirement.name != PYPROJECT["project"]["name"]]


def test_extras_that_are_taken_in_are_there_and_every_tracker_has_one() -> None:
    from routesae.train.trackers import TRACKERS

    there = PYPROJECT["project"]["optional-dependencies"]
    own = [requirement for requirement in extras() if requirement.name == PYPROJECT["project"]["name"]]
    taken_in = {extra for requirement in own for extra in requirement.extras}
    assert taken_in <= set(there)
    for name in TRACKERS:  # --log NAME says: pip install 'routesae[NAME]'
        assert [Requirement(line).name for line in there[name]] == [name]
        assert name in taken_in  # so that the tests of trackers run


def pins() -> dict[str, Version]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_every_dependency_is_pinned_within_its_range() -> None:
    assert len(requirements()) > 15
    unpinned = [r.name for r in requirements() if canonicalize_name(r.name) not in pins()]
    assert unpinned == []
    outside = [str(r) for r in requirements() if not r.specifier.contains(pins()[canonicalize_name(r.name)])]
    assert outside == []


def test_every_dependency_has_a_range_and_no_pin_in_the_project() -> None:
    for requirement in requirements():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert "==" not in operators
        assert ">=" in operators or requirement.name.startswith("types-"), requirement


def test_every_third_party_import_is_a_declared_dependency() -> None:
    """What a dependency happens to bring along may be gone with its next version."""
    import ast

    imported_as = {"scikit_learn": "sklearn"}
    declared = {canonicalize_name(r.name).replace("-", "_") for r in requirements()}
    declared = {imported_as.get(name, name) for name in declared}
    optional = {"tokenizers"}  # part of transformers' own interface
    used = set()
    for module in modules_on_disk():
        for node in ast.walk(ast.parse((ROOT / module.removeprefix("routesae/")).read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add(str(node.module).partition(".")[0])
    assert used - set(sys.stdlib_module_names) - {"routesae"} - declared - optional == set()
