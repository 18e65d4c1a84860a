"""Settings resolved against a cache: recipes, and names that tell them apart."""

from __future__ import annotations

from typing import Any

import pytest

from routesae.harvest.cache.reader import Cache
from routesae.reporting import WrongInput
from routesae.train.jobs import DEFAULT_BALANCE, default_name, make_recipe
from routesae.train.settings import RunSettings


@pytest.mark.parametrize(
    ("flags", "balance"),
    [
        ({"router": "published"}, DEFAULT_BALANCE),
        ({"router": "published", "balance": 0.0}, 0.0),
        ({}, 0.0),
        ({"router": "top2"}, 0.0),
        ({"balance": 0.5}, 0.5),
        ({"recipe": "published"}, 0.0),
        ({"recipe": "published", "balance": 0.5}, 0.5),
        ({"routing": "soft"}, 0.0),
        ({"router": "frozen"}, 0.0),
        ({"router": "random"}, 0.0),
        ({"sae": "topk"}, 0.0),
    ],
)
def test_the_published_router_alone_is_balanced_by_default_and_its_recipe_is_not(
    tiny_cache: Cache, flags: dict[str, Any], balance: float
) -> None:
    assert make_recipe(RunSettings(**flags, latents=64, k=8), tiny_cache).balance == balance


def test_k_cannot_be_annealed_from_more_than_the_latents(tiny_cache: Cache) -> None:
    with pytest.raises(WrongInput, match="--anneal-k-from 65 is more than the SAE's 64 latents"):
        make_recipe(RunSettings(latents=64, k=8, anneal_k_from=65), tiny_cache)


@pytest.mark.parametrize("flags", [{"routing": "soft"}, {"aggregate": "mean"}, {"router": "top2"}, {"balance": 0.1}])
def test_one_layer_cannot_be_routed(
    flags: dict[str, Any], tiny_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = RunSettings(latents=64, k=8, **flags)
    make_recipe(asked, tiny_cache)
    monkeypatch.setattr(tiny_cache, "manifest", tiny_cache.manifest.model_copy(update={"layers": (3,)}))
    ((name, value),) = flags.items()
    with pytest.raises(
        WrongInput, match=rf"^--{name} {value}: \S+ has one layer, and nothing to route; leave it out$"
    ):
        make_recipe(asked, tiny_cache)
    assert make_recipe(RunSettings(latents=64, k=8), tiny_cache).layers == (3,)
    assert make_recipe(RunSettings(sae="topk", latents=64, k=8), tiny_cache).layers == (3,)


def test_names_tell_apart_what_differs(tiny_cache: Cache) -> None:
    runs: list[dict[str, Any]] = [
        {"sae": "topk", "layer": 3},
        {"sae": "topk", "layer": 4},
        {"sae": "topk", "layer": 3, "k": 9},
        {"sae": "jumprelu", "layer": 3},
        {"sae": "jumprelu", "layer": 3, "sparsity": 0.1},
        {"sae": "jumprelu", "layer": 3, "sparsity": 0.2},
        {"sae": "topk", "layer": 3, "recipe": "published"},
        {"sae": "routesae"},
        {"sae": "routesae", "router": "published"},
        {"sae": "routesae", "routed": "gated"},
        {"sae": "routesae", "routing": "soft"},
        {"sae": "routesae", "aggregate": "mean"},
        {"sae": "routesae", "normalize": "dataset"},
        {"sae": "topk", "layer": 3, "normalize": "none"},
        {"sae": "topk", "layer": 3, "freeze": "encoder"},
        {"sae": "topk", "layer": 3, "freeze": "decoder"},
        {"sae": "crosscoder"},
        {"sae": "mlsae"},
    ]
    names = [default_name(make_recipe(RunSettings(**{"latents": 64, "k": 8, **run}), tiny_cache)) for run in runs]
    assert len(set(names)) == len(runs)
    assert names[0] == "topk_layer3_64_k8"
