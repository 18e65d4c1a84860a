"""The tutorials run as a reader runs them: one after the other, in one folder, on the demo model and corpus."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
IN_ORDER = ("text-to-page", "find-explain-steer", "own-variant")


def test_the_tutorials_run_and_leave_what_they_say(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "tutorials", ignore=shutil.ignore_patterns("tutorial"))
    assert {file.stem for file in folder.glob("*.ipynb")} == set(IN_ORDER)
    for name in IN_ORDER:
        notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert (folder / "tutorial" / "report.html").stat().st_size > 100_000
    lines = next(folder.glob("tutorial/saes/topk*/**/interpretations.jsonl")).read_text().splitlines()
    assert len(lines) == 101  # what was asked, and an answer each
    assert {path.name for path in folder.glob("tutorial/variants/orthogonal*/*")} >= {"cfg.json", "metrics.jsonl"}


def test_the_tutorials_show_what_they_printed() -> None:
    """Stored with their results, and with nothing that went wrong."""
    for name in IN_ORDER:
        code = [cell for cell in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"] if "outputs" in cell]
        outputs = [output for cell in code for output in cell["outputs"]]
        assert all(cell["execution_count"] for cell in code)
        assert len(outputs) >= 3
        assert not [output for output in outputs if output["output_type"] == "error"]
