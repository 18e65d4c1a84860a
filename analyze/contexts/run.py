"""The stage contexts: a cache, SAEs and the tokenizer in; of every latent the text it is active on, as files, out.

No LM is loaded: hidden states and tokens come from the cache. What is chosen: routesae.analyze.contexts.collect;
what is written: routesae.analyze.contexts.file.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routesae import __version__
from routesae.analyze.contexts.collect import Collected, Wanted, collect
from routesae.analyze.contexts.file import FORMAT, SAMPLES, write_contexts
from routesae.analyze.contexts.table import choose, context_batches, kept_by_rule, latent_table
from routesae.analyze.contexts.windows import Vocabulary
from routesae.analyze.scores.identity import sae_identity
from routesae.analyze.scores.run import OpenSAE, load_harvested_tokenizer, open_saes
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.reporting import Progress, Report, WrongInput, silent

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ContextSettings:
    """What `routesae contexts` was asked for. Raises WrongInput where a value is impossible."""

    cache: str = "shards"
    saes: tuple[str, ...] = ()
    """SAE folders or hub references; none for every SAE under `out`."""
    out: str = "saes"
    threshold: float = 15.0
    """Activations above it count for the rule; on the SAE's normalised input."""
    window: int = 64
    """Tokens of a context, at most."""
    top: int | None = None
    """Choose the N strongest activations of every latent instead of what the rule keeps."""
    per_class: int = 2
    """The rule: contexts a token class, at most."""
    max_classes: int = 32
    """The rule: latents of more token classes are left out."""
    min_contexts: int = 5
    """The rule: latents of fewer contexts are left out."""
    samples: int = 5
    """Contexts of each third, strong, middle and weak, of a uniform sample of a latent's activations."""
    seed: int = 0
    """Of that sample."""
    batch_tokens: int = 4096
    model: str | None = None
    """Where the tokenizer is now; None for where the manifest says the LM was."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise WrongInput(f"--threshold {self.threshold} is not a number of 0 or more")
        for name in ("window", "top", "per_class", "max_classes", "min_contexts", "samples", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise WrongInput(f"--{name.replace('_', '-')} {value} is below 1")
        if self.seed < 0:
            raise WrongInput(f"--seed {self.seed} is below 0")


@dataclass(frozen=True, kw_only=True)
class ContextResult:
    """One SAE's: features, the number of its latents that the published rule keeps; chosen, latents with contexts in
    contexts.json; contexts, rows of contexts.parquet, samples included."""

    sae: str
    folder: Path
    latents: int
    features: int
    chosen: int
    contexts: int
    max_activation: float

    def row(self) -> dict[str, Any]:
        """For a table."""
        named = {"latents": self.latents, "Features": self.features, "chosen": self.chosen, "contexts": self.contexts}
        return {"sae": self.sae, **named, "strongest": self.max_activation}


def contexts(settings: ContextSettings, report: Report = silent) -> list[ContextResult]:
    """Write the contexts of every SAE asked for. One from the hub gets a folder of its own under `out`.

    Raises WrongInput where cache, SAEs and tokenizer do not fit together.
    """
    cache = Cache(settings.cache)
    cache.require_whole()
    opened = open_saes(settings.saes, Path(settings.out), cache, pick_device(settings.device))
    vocabulary = Vocabulary(load_harvested_tokenizer(cache, settings.model or cache.manifest.model))
    wanted = Wanted(
        threshold=settings.threshold,
        per_class=settings.per_class,
        max_classes=settings.max_classes,
        top=settings.top,
        sample=len(SAMPLES) * settings.samples,
        window=settings.window,
        seed=settings.seed,
    )
    results = []
    for name, sae in opened.items():

        def of_this(now: Progress, stage: str = f"contexts {name}") -> None:
            report(now._replace(stage=stage))

        collected = collect(sae.sae, cache, vocabulary, wanted, batch_tokens=settings.batch_tokens, report=of_this)
        results.append(_write(settings, name, sae, cache, vocabulary, collected))
    return results


def _write(
    settings: ContextSettings,
    name: str,
    sae: OpenSAE,
    cache: Cache,
    vocabulary: Vocabulary,
    collected: Collected,
) -> ContextResult:
    kept_F = kept_by_rule(collected, max_classes=settings.max_classes, min_contexts=settings.min_contexts)
    chosen = choose(collected, kept_F)
    latents_of_chosen = chosen.kept.of.latent_M[chosen.kind_M == 0].numpy()
    if settings.top is None and not kept_F.any():
        log.warning(
            "%s: the rule keeps no latent; the strongest activation is %.1f: give a --threshold well below it",
            name,
            float(collected.max_F.max()),
        )
    result = ContextResult(
        sae=name,
        folder=sae.beside,
        latents=len(kept_F),
        features=int(kept_F.sum()),
        chosen=len(np.unique(latents_of_chosen)),
        contexts=len(chosen.kind_M),
        max_activation=float(collected.max_F.max()),
    )
    facts = {
        "format": FORMAT,
        "routesae": __version__,
        "settings": asdict(settings),
        "cache": {"path": cache.address, **cache.manifest.to_dict()},
        "sae": {"name": name, "folder": str(sae.folder.resolve()), **sae_identity(sae.folder, sae.sae)},
        "tokens": collected.tokens,
        "readings": collected.readings,
        "features": result.features,
        "chosen": result.chosen,
    }
    layers = sae.sae.recipe.layers if collected.one_layer else None
    batches = context_batches(chosen, cache, vocabulary, layers)
    sae.beside.mkdir(parents=True, exist_ok=True)
    write_contexts(sae.beside, facts, latent_table(collected, kept_F), batches)
    return result
