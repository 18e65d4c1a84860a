"""The SAE variants: one file a family, equation first, and one line each here."""

from __future__ import annotations

from routesae.train.saes.routesae import RouteSAE
from routesae.train.saes.sae import SAE, Forward, Recipe
from routesae.train.saes.topk import TopK

__all__ = ["SAE", "SAES", "SINGLE_LAYER", "Forward", "Recipe", "RouteSAE", "TopK"]

SAES: dict[str, type[TopK] | type[RouteSAE]] = {
    "routesae": RouteSAE,
    "topk": TopK,
}
SINGLE_LAYER = ("topk",)  # read one layer, --layer; the others read all that were harvested
