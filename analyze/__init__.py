"""SAE (+ LM) → metrics."""

import sys

from routesae import Room

sys.modules[__name__].__class__ = Room
