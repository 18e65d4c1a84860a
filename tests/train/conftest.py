"""The ways in which the same equations are computed in training."""

from __future__ import annotations

import pytest
import torch

from routesae.train.saes import SAE
from routesae.train.sparse.policy import Arithmetic

FLOAT64_PATHS = ["dense, float64", "sparse, float64"]
FLOAT32_PATHS = ["dense, float32", "sparse, float32", "sparse, proposed in bfloat16"]


def _take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proposal = "bfloat16" if "bfloat16" in name else "float32"
    monkeypatch.setattr(
        SAE, "arithmetic", Arithmetic(proposal=proposal, sparse_below=-1.0 if "dense" in name else 1.1)
    )


@pytest.fixture(params=FLOAT64_PATHS + FLOAT32_PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.dtype, float]:
    """All pairs of a token and a latent, or those that can be active; found in x's precision, or bfloat16 first.

    Gives the dtype of rows and weights, and how near, relatively, values and gradients then come to float64's.
    """
    _take(request.param, monkeypatch)
    return (torch.float64, 1e-9) if "float64" in request.param else (torch.float32, 1e-5)


@pytest.fixture(params=FLOAT32_PATHS)
def float32_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for an SAE over several layers, which reads float32 alone."""
    _take(request.param, monkeypatch)
