"""A new variant is one file and one line: it is then trained, routed, saved, loaded, analysed and in --help."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from routesae.harvest.cache.reader import Cache

ROOT = Path(__file__).resolve().parents[3]
FILE = '''"""Tanh: a vanilla whose penalty does not grow with strong latents (Anthropic, January 2024).

    f = ReLU(W_enc (x − b_dec) + b_enc),   x̂ = W_decᵀ f + b_dec
    loss = NormMSE(x, x̂) + λ · mean over tokens of Σ_i tanh(f_i‖d_i‖)
"""

from __future__ import annotations

import torch
from torch import Tensor

from routesae.train.losses import mean_over_rows
from routesae.train.saes.penalty import SteeredSAE
from routesae.train.saes.sae import Forward
from routesae.train.sparse.kernels import encode_above, threshold_latents
from routesae.train.sparse.pairs import Latents


class Tanh(SteeredSAE):
    architecture = "standard"

    def autoencode(self, x_ND: Tensor, weights_N: Tensor | None = None) -> Forward:
        pairs, z_P = encode_above(x_ND, self.encoder(), torch.zeros_like(self.b_enc_F), self.k)
        latents = Latents(z_P.relu(), pairs)
        if self.training:
            self.steer(latents.active_counts.sum() / len(x_ND))
        penalty_N = pairs.by_token((latents.values_P * pairs.at(self.W_dec_FD.norm(dim=1))).tanh())
        reconstruction_ND = pairs.decode(latents.values_P, self.W_dec_FD, self.b_dec_D)
        return Forward(x_ND, reconstruction_ND, latents, mean_over_rows(penalty_N, weights_N), weights_N=weights_N)

    def latents_of(self, x_ND: Tensor) -> Latents:
        return threshold_latents(x_ND, self.encoder(), torch.zeros_like(self.b_enc_F))
'''
LINE = '    "tanh": _class("tanh.Tanh"),\n'
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from click.testing import CliRunner
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.cli import main
from routesae.train.folder.checkpoint import load_sae
from routesae.train.folder.hub import model_card
from routesae.train.folder.checkpoint import read_source
from routesae.train.run import train
from routesae.train.settings import settings_of

cache, out = sys.argv[1:]
flags = {"cache": cache, "out": out, "latents": 64, "k": 8, "batch_tokens": 500, "lr": 3e-3, "device": "cpu"}
results = train(settings_of(flags | {"sae": "tanh", "sparsity": (0.01,), "name": "fixed"}))
results += train(settings_of(flags | {"sae": "tanh", "layer": 3, "name": "steered"}))
results += train(settings_of(flags | {"sae": "routesae", "routed": "tanh", "name": "routed"}))
saes = [load_sae(result.folder, torch.device("cpu")) for result in results]
hidden = torch.randn(5, 32)
assert saes[0].decode(saes[0].encode(hidden)).shape == (5, 32)
cards = [model_card(sae.recipe, read_source(result.folder), "me/x") for sae, result in zip(saes, results)]
rows = analyze(AnalyzeSettings(cache=cache, saes=tuple(str(result.folder) for result in results), out=out))["saes"]
views = analyze(AnalyzeSettings(cache=cache, saes=(str(results[0].folder),), metrics=("L0",), infer_k=(4,), out=out))
print(json.dumps({
    "types": [type(getattr(sae, "shared", sae)).__name__ for sae in saes],
    "held_out": [result.held_out.norm_mse for result in results],
    "rows": [row["NormMSE"] for row in rows],
    "l0": [row["L0"] for row in rows],
    "view": views["saes"][0]["L0"],
    "help": CliRunner().invoke(main, ["train", "--help"]).output,
    "cards": ["opens in SAELens" in card for card in cards],
}))
"""


def test_a_penalised_variant_is_one_file_and_one_line(tiny_cache: Cache, tmp_path: Path) -> None:
    package = tmp_path / "routesae"
    ignored = shutil.ignore_patterns(".*", "tests", "benchmarks", "docs", "demo", "site", "build", "__pycache__")
    shutil.copytree(ROOT, package, ignore=ignored)
    (package / "train" / "saes" / "tanh.py").write_text(FILE)
    registry = package / "train" / "saes" / "__init__.py"
    before = registry.read_text()
    registry.write_text(before.replace('    "gated":', LINE + '    "gated":'))
    assert len(registry.read_text()) == len(before) + len(LINE)

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_cache.path), str(tmp_path / "saes")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["types"] == ["Tanh"] * 3
    assert found["rows"] == found["held_out"]
    assert max(found["rows"]) < 1
    assert 2 < found["l0"][1] < 32  # steered towards 8
    assert found["view"] <= 4
    assert found["cards"] == [True] * 3
    assert "tanh" in found["help"]
