"""routesae: sparse autoencoders over the middle layers of language models, the model paid for once.

The rooms, in the order the data flows; imports only ever point upstream:

    cli, api → console → analyze → train → harvest

The names in `__all__` are the Python API, routesae/api.py. Each is imported when it is first used: importing this
package imports nothing else.
"""

# ruff: noqa: F403, F405
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from routesae.api import *

__all__ = [
    "LM",
    "SAE",
    "Batches",
    "Cache",
    "Comparison",
    "Document",
    "LayerRows",
    "Table",
    "TextLatents",
    "WrongInput",
    "analyze",
    "compare",
    "contexts",
    "harvest",
    "latents",
    "load_lm",
    "load_sae",
    "report",
    "steer",
    "train",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    if name in ROOMS:
        return import_module(f"routesae.{name}")
    if name in __all__:
        return getattr(import_module("routesae.api"), name)
    raise AttributeError(f"module 'routesae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


ROOMS = ("harvest", "train", "analyze")


class Room(type(sys)):  # type: ignore[misc]
    """A package that can be called as the command of its name: routesae.train(…) beside routesae.train.settings."""

    def __call__(self, **settings: "Any") -> "Any":
        from importlib import import_module

        return getattr(import_module("routesae.api"), self.__name__.rpartition(".")[2])(**settings)
