"""One TopK over every layer, each layer's hidden state a sample of its own.

    mlsae    every token at every layer, L·N rows a batch (2409.04185)
    random   every token at one layer, another at every batch: the control of the RouteSAE paper (2503.08200)

Both score and splice as what they are, a dictionary for each of their layers. An mlsae takes one optimiser step a
batch, over all its layers; with --recipe published it takes one a layer.

Dimension letters: L layers, N tokens, D width.
"""

import torch

from routesae.train.saes.normalise import NormalisedLayers
from routesae.train.saes.sae import Reading, Recipe
from routesae.train.saes.topk import TopK


class EveryLayer(TopK):
    """Every layer's rows are samples, one layer after another."""

    one_layer = False
    each_layer = True
    lens_opens = None

    def read(self, x: NormalisedLayers, *, training: bool) -> Reading:
        return Reading(torch.cat(list(x)), x.frame())


class MLSAE(EveryLayer):
    def __init__(self, recipe: Recipe, generator: torch.Generator | None = None):
        super().__init__(recipe, generator)
        self.turns = len(recipe.layers) if recipe.published else 1

    def read(self, x: NormalisedLayers, *, training: bool) -> Reading:
        return Reading(x[self.turn], None) if training and self.turns > 1 else super().read(x, training=training)

    def normalise_decoder(self, step: int, *, last: bool = False) -> None:
        super().normalise_decoder(step, last=True)  # after every step, also in the published code


class RandomLayer(EveryLayer):
    def read(self, x: NormalisedLayers, *, training: bool) -> Reading:
        if not training:
            return super().read(x, training=False)
        at = int(torch.randint(len(x), ()))  # from the default generator, which the trainer seeds for every step
        return Reading(x[at], None)
