"""What `routesae harvest` was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from routesae.harvest.cache import COMPRESSIONS, DTYPES, OVERFLOWS
from routesae.reporting import WrongInput


@dataclass(frozen=True, kw_only=True)
class HarvestSettings:
    """What `routesae harvest` was asked for. Raises WrongInput where a value is impossible."""

    model: str = "meta-llama/Llama-3.2-1B"
    data: str = "Skylion007/openwebtext"
    split: str = "train"
    text_field: str = "text"
    min_chars: int = 100
    layers: str | None = None
    """"4-12" or "4,8,12"; None for n//4 … 3n//4."""
    tokens: int = 10_000_000
    context: int = 512
    shard_tokens: int = 65_536
    batch_sequences: int | None = None
    """Rows a forward pass; None for 8 on a CPU and what fits, from 64 down, on CUDA."""
    dtype: str = "float16"
    overflow: str = "error"
    compress: str = "none"
    skip_positions: int = 1
    keep_special: bool = False
    seed: int = 0
    device: str = "auto"
    lm_dtype: str = "auto"
    out: str = "shards"

    def __post_init__(self) -> None:
        for name, least in (
            ("tokens", 1),
            ("context", 2),
            ("shard_tokens", 1),
            ("min_chars", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise WrongInput(f"--{name.replace('_', '-')} {getattr(self, name)} is below {least}")
        if self.batch_sequences is not None and self.batch_sequences < 1:
            raise WrongInput(f"--batch-sequences {self.batch_sequences} is below 1")
        if not 0 <= self.skip_positions < self.context:
            raise WrongInput(f"--skip-positions {self.skip_positions} leaves nothing of --context {self.context}")
        for name, known in (
            ("dtype", DTYPES),
            ("overflow", OVERFLOWS),
            ("compress", COMPRESSIONS),
        ):
            if getattr(self, name) not in known:
                raise WrongInput(f"--{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if self.tokens < self.context:
            raise WrongInput(f"--tokens {self.tokens} is less than one row of --context {self.context}")


def parse_layers(layers: str | None, depth: int) -> tuple[int, ...]:
    """The list "4-12", "4,8,12" or "4-6,12" as ascending layers of a model of `depth` blocks; None: n//4 … 3n//4."""
    if layers is None:
        return tuple(range(max(1, depth // 4), max(1, 3 * depth // 4) + 1))
    wanted: set[int] = set()
    for part in layers.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise WrongInput(f"--layers {layers!r} is not a list such as 4-12 or 4,8,12")
        low, high = int(first), int(last if dash else first)
        if high < low:
            raise WrongInput(f"--layers {layers!r}: {part.strip()} runs backwards")
        if low < 1 or high > depth:
            raise WrongInput(f"--layers {layers!r}: the model has layers 1 to {depth}")
        wanted.update(range(low, high + 1))
    return tuple(sorted(wanted))
