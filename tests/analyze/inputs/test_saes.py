"""Where SAEs are looked for, and where what is written about them goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from routesae.analyze.inputs import saes
from routesae.analyze.inputs.saes import sae_folders
from routesae.reporting import WrongInput


def test_out_is_refused_beside_saes_that_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saes").mkdir()
    (tmp_path / "saes" / "linked").symlink_to(tmp_path / "there")
    named = [str(tmp_path / "saes" / name) for name in ("a", "linked")]
    for out in ("saes", tmp_path, tmp_path / "saes", tmp_path / "x" / ".." / "saes"):
        assert [str(folder) for folder, _ in sae_folders(named, Path(out)).values()] == named
    with pytest.raises(
        WrongInput, match=r"--out \S+results is where SAEs are looked for, and --sae \S+/a is not in it"
    ):
        sae_folders(named, tmp_path / "results")
    assert len(sae_folders([*named, str(tmp_path / "b")], tmp_path / "saes")) == 3  # two of them are there
    monkeypatch.setattr(saes, "fetch_sae", lambda reference: tmp_path / "hub" / reference)
    assert sae_folders(["user/repo"], tmp_path / "results")["user/repo"][1] == tmp_path / "results" / "user--repo"
