"""The newcomer's list in docs/guides/short.md runs as it stands, on a tiny model instead of the demo's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from routesae.cli import main

LIST = (Path(__file__).resolve().parent.parent / "docs" / "guides" / "short.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", LIST, re.DOTALL)
TINY = {
    "15": "4",
    "4608": "64",
    "k64": "k8",
    "576": "32",
    '"match"': '"sparse"',
    "range(40)": "range(20)",
    '"2k"': "64",
}


def test_no_snippet_is_longer_than_five_lines() -> None:
    assert len(BLOCKS) >= 10
    assert max(len([line for line in code.splitlines() if line]) for _, code in BLOCKS) <= 5


def test_the_list_runs_from_top_to_bottom(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for kind, code in BLOCKS:
        for ours, tiny in TINY.items():
            code = code.replace(ours, tiny)
        if kind == "python":
            code = code.replace('"demo"', repr(str(tiny_model))).replace("max_new_tokens=20", "max_new_tokens=4")
            code = code.replace("latents = 64", "latents = 64\\nk = 8\\nbatch_tokens = 500")
            code = code.replace("sae=sae.folder)", "sae=sae.folder, threshold=0.5)")
            exec(compile(code, "docs/guides/short.md", "exec"), names)
            continue
        for line in code.splitlines():
            _, command, *arguments = shlex.split(line)
            if command == "harvest":
                arguments = f"--model {tiny_model} --data {tiny_corpus} --tokens 3k --context 16 --layers 3-4".split()
            if command == "train" and "--latents" in arguments:
                arguments += ["--k", "8", "--batch-tokens", "500"]
            result = CliRunner().invoke(main, [command, *arguments])
            assert result.exit_code == 0, (line, result.output, result.exception)
            if command in ("latents", "compare"):
                assert len(result.stdout.splitlines()) > 5
                assert max(map(len, result.stdout.splitlines())) <= 80
    assert names["document"].hidden[4].shape[1] == 32
    assert names["nested"].recipe.sae == "matryoshka"
    assert isinstance(names["rates"], torch.Tensor)
    printed = capsys.readouterr().out
    assert "«" in printed  # contexts beside the latents
    assert "mean_nearest" in printed
