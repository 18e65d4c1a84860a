"""The best few of every latent: the same as sorting everything, held in a bounded space."""

from __future__ import annotations

import random

import pytest
import torch

from routesae.analyze.contexts import best as contexts_best
from routesae.analyze.contexts.best import NO_WINDOW, Activations, Best

LATENTS, CPU = 5, torch.device("cpu")
Row = tuple[int, int, int, int, float]  # latent, position, layer, class, value


def rows(count: int, seed: int) -> list[Row]:
    """Activations of few distinct values, so that many are equal; those of latent 0 are of many classes."""
    rng = random.Random(seed)
    places = rng.sample(
        [(latent, at, layer) for latent in range(LATENTS) for at in range(90) for layer in (0, 1)], count
    )
    classes = {latent: 50 if latent == 0 else 4 for latent in range(LATENTS)}
    return [(*place, place[1] % classes[place[0]], rng.choice([0.5, 1.0, 1.5])) for place in places]


def activations(rows: list[Row]) -> Activations:
    *integers, values = zip(*rows, strict=True)
    value_M = torch.tensor(values)
    window_M = torch.full((len(rows),), NO_WINDOW)
    return Activations(*(torch.tensor(column) for column in integers), value_M, value_M, window_M)


def held(best: Best) -> list[Row]:
    return list(zip(*(column.tolist() for column in best.merge()[:5]), strict=True))


@pytest.mark.parametrize("batch", [1, 7, 600])
@pytest.mark.parametrize("max_classes", [None, 6])
def test_what_is_held_is_what_sorting_everything_keeps(
    batch: int, max_classes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_best, "PENDING", 20)
    everything = rows(600, seed=1)
    best = Best(latents=LATENTS, each=2, max_classes=max_classes, window=4, device=CPU)
    for start in range(0, len(everything), batch):
        best.add(activations(everything[start : start + batch]))
    expected: list[Row] = []
    for latent in range(LATENTS):
        classes = sorted({row[3] for row in everything if row[0] == latent})
        if max_classes is not None and len(classes) > max_classes:
            continue
        for group in [classes] if max_classes is None else [[number] for number in classes]:
            mine = [row for row in everything if row[0] == latent and row[3] in group]
            expected += sorted(mine, key=lambda row: (-row[4], row[1], row[2]))[:2]
    assert held(best) == expected


def test_a_latent_of_too_many_classes_takes_no_room() -> None:
    """Else memory would grow with the vocabulary."""
    best = Best(latents=LATENTS, each=2, max_classes=6, window=4, device=CPU)
    best.add(activations([(0, at, 0, at, 1.0) for at in range(90)] + [(1, 3, 0, 3, 1.0)]))
    assert held(best) == [(1, 3, 0, 3, 1.0)]
    assert best.overfull_F.tolist() == [True, False, False, False, False]
