"""Bytes and hours of a harvest and of an epoch of training for Llama-3.2-1B: the table in docs/guides/gpu-node.md.

    python benchmarks/planning.py
    python benchmarks/planning.py --tflops 312 --disk-gb-s 1.5 3

Bytes are exact. Hours are the longer of computing and moving bytes, as the two run side by side:

    harvest:  tokens · FLOP a token / (GPUs · FLOP/s · utilisation · HARVEST)      tokens · bytes a token / disk
    epoch:    tokens · 2·D·F · STEP / (FLOP/s · utilisation), on one GPU           tokens · bytes read a token / disk

HARVEST and STEP are measured (RESULTS.md): tokens/s of a harvest beside the bare forward pass, and a training step's
time in units of its encoder's product. What a GPU and a disk give is assumed, and can be given.
"""

from __future__ import annotations

import argparse

from routesae.harvest.cache.manifest import token_bytes

BLOCKS, WIDTH, MLP_WIDTH, KEY_VALUE_WIDTH = 16, 2048, 8192, 512  # of Llama-3.2-1B
LAYERS = range(BLOCKS // 4, 3 * BLOCKS // 4 + 1)
CONTEXT, LATENTS = 512, 8 * WIDTH
HARVEST, STEP = 0.89, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=989, help="dense bfloat16, of one GPU (an H100's)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="of it that products of this size reach")
    parser.add_argument(
        "--disk-gb-s", type=float, nargs=2, default=(3.0, 12.0), help="of a node with one and with eight GPUs"
    )
    args = parser.parse_args()
    rate = args.tflops * 1e12 * args.utilisation
    print("| tokens | GPUs | dtype | on disk | harvest, hours | epoch of routesae | epoch of topk, one layer |")
    print("|---|---|---|---|---|---|---|")
    for tokens in (100_000_000, 1_000_000_000):
        for gpus, gigabytes in zip((1, 8), args.disk_gb_s, strict=True):
            for dtype in ("float16", "int8"):
                all_layers, one = token_bytes(len(LAYERS), WIDTH, dtype), token_bytes(1, WIDTH, dtype)
                disk = gigabytes * 1e9
                harvest = hours(tokens, forward_flops() / (gpus * rate * HARVEST), all_layers / disk)
                step = 2 * WIDTH * LATENTS * STEP / rate  # training is on one GPU: it waits for the disk as it is
                epochs = (hours(tokens, step, size / disk) for size in (all_layers, one))
                cells = (f"{tokens / 1e6:,.0f} M", str(gpus), dtype, f"{tokens * all_layers / 1e12:.2f} TB", harvest)
                print(f"| {' | '.join((*cells, *epochs))} |")


def forward_flops() -> float:
    """Of one token through the blocks up to the last harvested layer; no head."""
    weights = 2 * WIDTH * (WIDTH + KEY_VALUE_WIDTH) + 3 * WIDTH * MLP_WIDTH  # queries and output, keys and values
    attention = 2 * 2 * WIDTH * CONTEXT / 2  # scores and sums over half the context on average
    return LAYERS[-1] * (2 * weights + attention)


def hours(tokens: int, computing: float, moving: float) -> str:
    """Seconds a token of either → hours, and which of them it is."""
    which = "disk" if moving > computing else "GPU"
    return f"{tokens * max(computing, moving) / 3600:.2f} ({which})"


if __name__ == "__main__":
    main()
