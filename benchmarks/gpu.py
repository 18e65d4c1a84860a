"""What a GPU makes of harvest and training, beside its own limits and beside plain dense code: one table, one JSON.

    python benchmarks/gpu.py --json gpu.json          # an H100: under 6 minutes; no hub, no network
    python benchmarks/gpu.py --tiny --device cpu      # the same on small shapes, to see that it runs

A random LM in the shape of Llama-3.2-1B (16 blocks, width 2,048), random text. Measured are

- the device's ceilings: a bfloat16 product of two square matrices, a copy on the device, a copy from pinned memory;
- harvest of one layer and of nine, to memory (/dev/shm) and to a disk, beside the bare forward pass cut after the
  same layer over as many rows;
- a training step beside plain dense code written here (one product, torch.topk, autograd, fused Adam, bfloat16
  autocast), and beside the limit: the encoder's product and the bytes that Adam reads and writes, at the ceilings;
- the loader's rate of batches onto the device, peak memory, and how often a step waits for the device.

Times are medians over rounds, of which the contenders of one row take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import record
import torch
import torch.nn.functional as F
from step_peers import LONG, LR
from synthetic import synthetic_cache
from torch import Tensor

from routesae.harvest.cache.reader import Cache
from routesae.harvest.lm.model import cut_after, load_lm
from routesae.harvest.lm.passes import run_until
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.machine.device import pick_device
from routesae.train.jobs import jobs_of
from routesae.train.loading.batches import Selection, epoch_plans, load
from routesae.train.run import pace_of, trainee_of
from routesae.train.saes.normalise import Hidden
from routesae.train.settings import settings_of

CHUNK = 16_384  # tokens a shard of the training cache


class Bench:
    def __init__(self, device: torch.device, tiny: bool, folder: Path, rounds: int):
        self.device, self.tiny, self.folder, self.rounds = device, tiny, folder, rounds
        self.width, self.blocks, self.middle = (64, 4, (1, 3)) if tiny else (2048, 16, (4, 12))
        self.rows: list[dict[str, Any]] = []
        self.ceilings: dict[str, float] = {}

    def add(self, what: str, value: float, unit: str, **beside: Any) -> None:
        self.rows.append({"what": what, "value": value, "unit": unit, **beside})
        shown = ", ".join(f"{name} {number:.3g}" for name, number in beside.items())
        print(f"| {what} | {value:.4g} {unit} | {shown} |", flush=True)

    def seconds(self, *contenders: Callable[[], object]) -> list[float]:
        """The median seconds of each, which take turns; a first round does not count."""
        taken: list[list[float]] = [[] for _ in contenders]
        for _ in range(self.rounds + 1):
            for run, of in zip(contenders, taken, strict=True):
                self.wait()
                began = time.perf_counter()
                run()
                self.wait()
                of.append(time.perf_counter() - began)
        return [statistics.median(of[1:]) for of in taken]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ---------------------------------------------------------------------------------------------------- ceilings

    def limits(self) -> None:
        n = 256 if self.tiny else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.empty((4 << 20) if self.tiny else (1 << 30), dtype=torch.uint8, device=self.device)
        target, host = torch.empty_like(source), torch.empty(source.shape, dtype=torch.uint8)
        host = host.pin_memory() if self.device.type == "cuda" else host
        product, copy, upload = self.seconds(
            lambda: a @ b, lambda: target.copy_(source), lambda: target.copy_(host, non_blocking=True)
        )
        self.ceilings = {
            "products": 2 * n**3 / product,
            "bytes": 2 * len(source) / copy,
            "upload": len(source) / upload,
        }
        self.add("bfloat16 product", self.ceilings["products"] / 1e12, "TFLOP/s")
        self.add("copy on the device, read and written", self.ceilings["bytes"] / 1e9, "GB/s")
        self.add("copy from pinned memory", self.ceilings["upload"] / 1e9, "GB/s")

    # ----------------------------------------------------------------------------------------------------- harvest

    def model(self) -> Path:
        """A random Llama and a tokenizer of letters, on the disk."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        path = self.folder / "model"
        letters = {letter: i + 2 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, **letters}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=4 if self.tiny else 32,
            num_key_value_heads=2 if self.tiny else 8,
            max_position_embeddings=1024,
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            LlamaForCausalLM(config).bfloat16().save_pretrained(path)
        return path

    def harvests(self) -> None:
        path, context = self.model(), 64 if self.tiny else 512
        tokens = 4096 if self.tiny else 1 << 20
        text = self.folder / "text.txt"
        rng = np.random.default_rng(0)
        letters = rng.choice(np.frombuffer(b"abcdefgh ", np.uint8), tokens + tokens // 4)
        text.write_bytes(letters.tobytes())
        lm = load_lm(str(path), device=self.device, lm_dtype="bfloat16")
        bare = cut_after(lm, self.middle[1])
        batch = 8 if self.tiny else 64
        rows_BT = torch.randint(2, 200, (batch, context), device=self.device)
        (forward,) = self.seconds(partial(run_until, bare, rows_BT, self.middle[1]))
        rate = rows_BT.numel() / forward
        self.add(f"bare forward pass to layer {self.middle[1]}", rate, "tokens/s")
        del lm, bare
        memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else self.folder
        for layers in (str(self.middle[1]), f"{self.middle[0]}-{self.middle[1]}"):
            for name, where in (("memory", memory), ("disk", self.folder)):
                with tempfile.TemporaryDirectory(dir=where) as out:
                    settings = HarvestSettings(
                        model=str(path),
                        data=str(text),
                        tokens=tokens if "-" not in layers else tokens // 4,
                        context=context,
                        layers=layers,
                        shard_tokens=1024 if self.tiny else 65_536,
                        batch_sequences=batch,
                        lm_dtype="bfloat16",
                        device=str(self.device),
                        out=str(Path(out, "shards")),
                    )
                    seen: list[tuple[float, int]] = []

                    def report(progress: Any, seen: list[tuple[float, int]] = seen) -> None:
                        if progress.stage == "harvest":
                            seen.append((time.perf_counter(), progress.done))

                    cache = harvest(settings, report)
                    done = time.perf_counter()
                    began, before = seen[0]  # after the first batch, so that loading the LM is not among it
                    ours = (seen[-1][1] - before) / (done - began)
                    written = ours * cache.manifest.token_bytes
                    self.add(
                        f"harvest of layers {layers} to {name}",
                        ours,
                        "tokens/s",
                        of_bare=ours / rate,
                        GB_s=written / 1e9,
                    )

    # ---------------------------------------------------------------------------------------------------- training

    def training(self) -> None:
        layers = self.middle[1] - self.middle[0] + 1
        tokens = 8192 if self.tiny else 262_144
        cache = synthetic_cache(
            self.folder / "cache",
            layers=layers,
            tokens=tokens,
            shard_tokens=min(CHUNK, tokens // 4),
            width=self.width,
        )
        self.loading(cache)
        sizes = (256,) if self.tiny else (16_384, 65_536)
        batches = (512,) if self.tiny else (4096, 16_384)
        k = 8 if self.tiny else 64
        for latents in sizes:
            for batch in batches:
                self.step(cache, "topk", latents, k, batch)
        for variant in ("batchtopk", "jumprelu", "routesae"):
            self.step(cache, variant, sizes[0], k, batches[0])

    def loading(self, cache: Cache) -> None:
        batch = 512 if self.tiny else 4096
        selection = Selection(cache, 0, cache.manifest.rows, cache.manifest.layers)

        def epochs() -> None:
            plans = chain.from_iterable(epoch_plans(selection, seed=0, epoch=n, batch_tokens=batch) for n in range(2))
            with closing(load(selection, plans, batch, self.device)) as batches:
                for _ in batches:
                    pass

        (seconds,) = self.seconds(epochs)
        rate = 2 * len(selection) / seconds
        moved = rate * cache.manifest.token_bytes
        self.add(
            f"loader, {len(selection.layers)} layers onto the device",
            rate,
            "tokens/s",
            GB_s=moved / 1e9,
            of_upload=moved / self.ceilings["upload"],
        )

    def step(self, cache: Cache, variant: str, latents: int, k: int, batch: int) -> None:
        flags: dict[str, Any] = {"sae": variant, "latents": latents, "k": k, "lr": LR, "cache": str(cache.path)}
        flags |= {"batch_tokens": batch, "epochs": LONG // 1000, "device": str(self.device)}
        settings = settings_of(flags | {"out": str(self.folder / f"saes-{variant}-{latents}-{batch}")})
        (job,) = jobs_of(settings, cache)
        job.partial.mkdir(parents=True)
        layers = job.recipe.layers
        selection = Selection(cache, 0, cache.manifest.train_rows, layers)
        plans = epoch_plans(selection, seed=0, epoch=0, batch_tokens=batch)
        with ExitStack() as stack:
            loaded = stack.enter_context(closing(load(selection, plans, batch, self.device)))
            hidden = Hidden(*(part.clone() for part in next(iter(loaded))), layers=layers)
            trainee = trainee_of(job, settings, pace_of(selection, settings, self.device), self.device, stack)
            trainee.sae.initialise(hidden)
            stack.enter_context(trainee.arithmetic.applied())
            done = 0

            def ours() -> None:
                nonlocal done
                done += 1
                trainee.step(done, hidden, batch)

            plain = PlainTopK(self.width, latents, k, self.device)
            x_ND = F.layer_norm(hidden.hidden_LND[0].float(), (self.width,))
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            ours()
            peak = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else float("nan")
            taken, dense = self.seconds(ours, lambda: plain.step(x_ND))
            waits = self.waits(ours)
        weights = 2 * latents * self.width
        limit = batch * weights / self.ceilings["products"] + 28 * weights / self.ceilings["bytes"]
        self.add(
            f"step of {variant}, F {latents:,}, k {k}, batch {batch:,}",
            1000 * taken,
            "ms",
            dense_topk_ms=1000 * dense,
            limit_ms=1000 * limit,
            peak_GB=peak,
            waits=waits,
        )

    def waits(self, run: Callable[[], object]) -> float:
        """How often a step waits for the device, on CUDA."""
        if self.device.type != "cuda":
            return float("nan")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return float(sum("synchroniz" in str(one.message) for one in heard))


class PlainTopK:
    """What one writes first: dense products under bfloat16 autocast, torch.topk, autograd, fused Adam."""

    def __init__(self, width: int, latents: int, k: int, device: torch.device):
        self.k = k
        W = F.normalize(torch.randn(latents, width, device=device), dim=1)
        zeros = [torch.zeros(n, device=device) for n in (latents, width)]
        self.W_enc_FD, self.W_dec_FD, self.b_enc_F, self.b_dec_D = (
            torch.nn.Parameter(tensor) for tensor in (W, W.clone(), *zeros)
        )
        parameters = [self.W_enc_FD, self.W_dec_FD, self.b_enc_F, self.b_dec_D]
        self.adam = torch.optim.Adam(parameters, lr=LR, fused=True)

    def step(self, x_ND: Tensor) -> None:
        with torch.autocast(x_ND.device.type, torch.bfloat16):
            z_NF = F.linear(x_ND - self.b_dec_D, self.W_enc_FD, self.b_enc_F)
            top = z_NF.topk(self.k, dim=1, sorted=False)
            f_NF = torch.zeros_like(z_NF).scatter(1, top.indices, top.values.relu())
            reconstruction_ND = f_NF @ self.W_dec_FD + self.b_dec_D
        loss = (reconstruction_ND.float() - x_ND).square().sum() / x_ND.square().sum()
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        with torch.no_grad():
            self.W_dec_FD.div_(self.W_dec_FD.norm(dim=1, keepdim=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="Small shapes, that a CPU runs in seconds.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("harvest", "train"))
    parser.add_argument("--folder", default=None, help="On the disk to use; the system's temporary one if absent.")
    parser.add_argument("--json", type=Path, help="Write all figures to this file.")
    args = parser.parse_args()
    device = pick_device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else record.machine()["cpu"]
    print(f"{card}, torch {torch.__version__}\n\n| what | figure | beside it |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(device, args.tiny, Path(folder), 2 if args.tiny else args.rounds)
        bench.limits()
        if args.only != "train":
            bench.harvests()
        if args.only != "harvest":
            bench.training()
    if args.json:
        args.json.write_text(json.dumps({"card": card, **record.where(), "rows": bench.rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
