"""How an SAE's sums are done on a device: pure functions of what the device can do, of shapes and of flags.

Nothing here changes what is computed, only rounding and time. A run says in one line what was chosen, and its
checkpoints and its cfg.json hold it: a run that is resumed elsewhere does as it did, as nothing is asked again.

Two numbers of a device decide. The first is how much faster it multiplies bfloat16 than float32. Where it does, the
encoder's product over all N·F pairs runs in bfloat16; on a CPU it only proposes candidates, whose pre-activations are
computed anew in float32 (sparse/search.py), so that an SAE's numbers do not depend on the CPU. On CUDA the whole step
runs under autocast; float32 products that remain are multiplied in TF32 where there is such a thing.

The second is how many multiplications it does in the time of one gathered number. Decoding, and each weight's
gradient, is either a dense product of 2·N·F·D operations at P a second, or a gathered pass over the N·k active pairs,
which reads k·N rows of D numbers of s bytes at B bytes a second. The pass is the faster one where

    k/F < 2·B / (s·P)

An H100 (P = 989e12 in bfloat16, 495e12 in TF32, 67e12 in float32; B = 3.35e12) comes to 1/590, 1/295 and 1/40 for
float32 rows, which is what the kernels gather. For a CPU, whose caches hold the rows that many tokens share, no such
formula holds: the crossing was measured at .09 to .12 of all pairs for gated and vanilla SAEs
(benchmarks/RESULTS.md), in float32 and in bfloat16.

Dimension letters: N tokens, D width, F latents, k active latents a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from routesae.machine.device import has_bfloat16_units
from routesae.machine.settings import Settings
from routesae.reporting import amount

SPARSE_BELOW = {"cpu": 1 / 12, "bfloat16": 1 / 590, "tf32": 1 / 295, "float32": 1 / 40}  # the latter three: CUDA's
# At fewer rows the encoder is fetched from memory too often, at more their product leaves the cores' caches
# (benchmarks/steps.py on a Xeon: 256 rows 1.3 times slower).
CPU_CHUNK_ROWS = {torch.float32: 512, torch.bfloat16: 2048}
WEIGHTED_CHUNK_ROWS = 256  # of every layer, that a CPU adds up at a time
# From so many pairs a token on, a CPU sums rows a few columns at a time: those of all rows then lie near a core, and
# each is read again and again (benchmarks/steps.py: up to twice as fast; with fewer pairs no faster).
MANY_PAIRS, COLUMNS = 64, 64


class Arithmetic(Settings):
    """How the sums of an SAE are done on a device, as JSON can hold it.

    sparse_below: the share of all N·F pairs below which sums run over active pairs alone. kind: of the device.
    precision: of dense products; bfloat16 is autocast's. proposal: that of the encoder's product over float32 rows
    without autocast; candidates that a narrower one finds are computed anew. threads: of the CPU. max_memory: bytes
    that encoding may take at a time; None for what is fastest.
    """

    sparse_below: float
    kind: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    proposal: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1
    max_memory: int | None = None

    def dense(self, k: int, latents: int) -> bool:
        """Whether sums run over all pairs where k latents a token are active. With max_memory they never do."""
        return self.max_memory is None and k > self.sparse_below * latents

    def rows_at_once(self, n: int, latents: int, dtype: torch.dtype) -> int:
        """Of n tokens, how many are encoded at a time in that precision."""
        if self.max_memory is not None:
            return min(n, self.max_memory // (4 * latents))
        return min(n, CPU_CHUNK_ROWS.get(dtype, 512)) if self.kind == "cpu" else n

    def proposes(self, x_ND: Tensor) -> torch.dtype:
        """The precision that the encoder's product of these rows runs in; if it is theirs, the product is exact."""
        if x_ND.dtype != torch.float32:
            return x_ND.dtype
        autocast = torch.is_autocast_enabled(x_ND.device.type)
        narrow = torch.get_autocast_dtype(x_ND.device.type) if autocast else torch.float32
        return torch.bfloat16 if narrow == torch.float32 and self.proposal == "bfloat16" else narrow

    @contextmanager
    def applied(self) -> Iterator[None]:
        """PyTorch's threads and its precision of float32 products as chosen; and as before at the end."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with _tf32(self.kind == "cuda"):
                yield
        finally:
            torch.set_num_threads(threads)

    def __str__(self) -> str:
        pairs = f"sums over active pairs below 1/{1 / self.sparse_below:.0f} of all"
        memory = "" if self.max_memory is None else f", {self.max_memory:,} bytes for encoding"
        return f"{self.precision}, proposals {self.proposal}, {pairs}, {amount(self.threads, 'thread')}{memory}"


def chosen(kind: str, *, bfloat16_units: bool, precision: str = "float32", **flags: Any) -> Arithmetic:
    """What is fastest on a device of that kind ("cpu", "cuda").

    bfloat16_units: whether it multiplies bfloat16 natively. precision: "auto" is bfloat16 on CUDA that does. flags:
    threads and max_memory.
    """
    if precision == "auto":
        precision = "bfloat16" if kind == "cuda" and bfloat16_units else "float32"
    products = "tf32" if precision == "float32" and bfloat16_units else precision  # the same GPUs have both
    return Arithmetic(
        kind=kind,
        precision=precision,
        proposal="bfloat16" if kind == "cpu" and bfloat16_units else "float32",
        sparse_below=SPARSE_BELOW["cpu" if kind == "cpu" else products],
        **flags,
    )


@cache
def arithmetic(kind: str) -> Arithmetic:
    """What is fastest in use, where nothing is trained."""
    return chosen(kind, bfloat16_units=kind == "cpu" and has_bfloat16_units())


@contextmanager
def exactly(kind: str) -> Iterator[None]:
    """Products in float32, whatever autocast and TF32 would do to them."""
    with torch.autocast(kind, enabled=False), _tf32(False):
        yield


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Whether CUDA multiplies float32 in TF32; said as torch from 2.9 on has it said, or as before that."""
    products = torch.backends.cuda.matmul
    named = hasattr(products, "fp32_precision")
    name = "fp32_precision" if named else "allow_tf32"
    before = getattr(products, name)
    setattr(products, name, ("tf32" if allowed else "ieee") if named else allowed)
    try:
        yield
    finally:
        setattr(products, name, before)
