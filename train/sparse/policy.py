"""How an SAE's sums are done on a device: pure functions of what the device can do, of shapes and of flags.

Nothing here changes what is computed, only rounding and time. A run logs what was chosen. A checkpoint does not hold
it, so a run that is resumed on another kind of machine rounds as that one does.

Two numbers of a device decide. The first is how much faster it multiplies bfloat16 than float32. Where it does, the
encoder's product over all N·F pairs runs in bfloat16; on a CPU it only proposes candidates, whose pre-activations are
computed anew in float32 (sparse/search.py), so that an SAE's numbers do not depend on the CPU. CPUs with AMX, with
AVX512-BF16 (Zen 4 and 5, some Sapphire Rapids guests) or Arm's BF16 do; others emulate it, and float32 is faster. On
CUDA the whole step runs under autocast, in bfloat16 from compute capability 8 on (V100 and T4 emulate it).

The second is how many multiplications it does in the time of one gathered number. Decoding, and each weight's
gradient, is either a dense product of 2·N·F·D operations at P a second, or a gathered pass over the N·k active pairs,
which reads k·N rows of D numbers of s bytes at B bytes a second. The pass is the faster one where

    k/F < 2·B / (s·P)

An H100 (P = 989e12 in bfloat16, B = 3.35e12) comes to 1/590 for float32 rows, which is what the kernels gather. For a
CPU, whose caches hold the rows that many tokens share, no such formula holds: the crossing was measured at .09 to .12
of all pairs for gated and vanilla SAEs (benchmarks/RESULTS.md), in float32 and in bfloat16.

Dimension letters: N tokens, D width, F latents, k active latents a token.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from routesae.machine.device import has_bfloat16_units

SPARSE_BELOW = {"cpu": 1 / 12, "cuda": 1 / 590}
# At fewer rows the encoder is fetched from memory too often, at more their product leaves the cores' caches
# (benchmarks/steps.py on a Xeon: 256 rows 1.3 times slower).
CPU_CHUNK_ROWS = {torch.float32: 512, torch.bfloat16: 2048}


class Arithmetic(NamedTuple):
    """How the sums of an SAE are done on a device.

    proposal: precision of the encoder's product over float32 rows; candidates found in a narrower one are computed
    anew. sparse_below: the share of all N·F pairs below which sums run over active pairs alone. chunk_rows: tokens
    encoded at a time; None for what is fastest.
    """

    proposal: torch.dtype
    sparse_below: float
    chunk_rows: int | None = None

    def rows_at_once(self, n: int, kind: str, dtype: torch.dtype) -> int:
        """Of n tokens on a device of that kind, how many are encoded at a time in that precision."""
        if self.chunk_rows is not None:
            return min(n, self.chunk_rows)
        return min(n, CPU_CHUNK_ROWS.get(dtype, 512)) if kind == "cpu" else n

    def __str__(self) -> str:
        proposes = "" if self.proposal == torch.float32 else "active latents proposed in bfloat16, "
        return f"{proposes}sums over active pairs below 1/{1 / self.sparse_below:.0f} of all"


@cache
def arithmetic(kind: str) -> Arithmetic:
    """What is fastest on a device of that kind ("cpu", "cuda"); under autocast its precision goes before."""
    native = kind == "cpu" and has_bfloat16_units()
    return Arithmetic(torch.bfloat16 if native else torch.float32, SPARSE_BELOW[kind])
