"""routesae: sparse autoencoders over the middle layers of language models, the model paid for once.

The rooms, in the order the data flows; imports only ever point upstream:

    cli, api → console → analyze → train → harvest

The names of API are the Python API, routesae/api.py. It is imported when one is used: importing this package imports
nothing else.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from routesae.api import *  # noqa: F403

__version__ = "0.1.0"
ROOMS = ("harvest", "train", "analyze")  # which can be called, too
API = ["LM", "SAE", "Batches", "Cache", "Comparison", "Document", "LayerRows", "Table", "TextLatents", "WrongInput"]
API += ["compare", "contexts", "latents", "load_lm", "load_sae", "report", "steer", *ROOMS]


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    if name not in API:
        raise AttributeError(f"module 'routesae' has no attribute {name!r}")
    return import_module(f"routesae.{name}") if name in ROOMS else getattr(import_module("routesae.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *API})


class Room(type(sys)):  # type: ignore[misc]
    """A package that can be called as the command of its name: routesae.train(…) beside routesae.train.settings."""

    def __call__(self, **settings: "Any") -> "Any":
        from importlib import import_module

        return getattr(import_module("routesae.api"), self.__name__.rpartition(".")[2])(**settings)
