"""One training step of every trainer behind one interface: a batch in; weights one step further.

A peer's step is its library's own, called as its own loop calls it: its losses, its optimiser, clipping, projections,
decoder norms and dead-latent counts, on its defaults. Three things are set from outside, none of which changes what a
step costs: the learning rate, so small that no state moves while it is timed; λ; and, for variants whose cost depends
on how many latents are active, the bias or threshold that decides it (Gate). No latent has been dead for as long as
any of them counts, so none does AuxK's work, but for ours where a row says how many are dead.

Peers get rows that are float32 and normalised already. Ours gets float16, and each row's mean and standard deviation,
as the cache has them: its step normalises too.

Dimension letters: L layers, N tokens, D width, F latents, C = L·D.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import published
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routesae.harvest.cache.manifest import STATISTICS
from routesae.harvest.cache.reader import Cache
from routesae.train.jobs import jobs_of
from routesae.train.loading.batches import Batch, Selection
from routesae.train.run import pace_of, trainee_of
from routesae.train.saes.normalise import Hidden
from routesae.train.settings import settings_of

LR = 1e-6
SPARSITY = 1e-3
LONG = 10**6  # steps that every trainer believes it is to run
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rows:
    """A batch. stored: as the trainer reads it from the cache, float16. layers: which ones."""

    stored: Batch
    layers: tuple[int, ...]

    @cached_property
    def by_layer(self) -> Tensor:
        """x_LND, normalised."""
        return published.normalised(self.stored.hidden_LND)

    @cached_property
    def flat(self) -> Tensor:
        """x_NC, the layers side by side."""
        return self.by_layer[0] if len(self.layers) == 1 else self.by_layer.transpose(0, 1).flatten(1)

    @cached_property
    def by_token(self) -> Tensor:
        """x_NLD, in memory layer by layer, as what the published code stacks and permutes."""
        return self.by_layer.permute(1, 0, 2)

    def first_layer(self) -> Rows:
        return Rows(Batch(*(part[:1] for part in self.stored)), self.layers[:1])


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Latents are active where (x − b_dec) Wᵀ + bias > threshold. weight: () → W_FC, as it is now."""

    weight: Callable[[], Tensor]
    bias_F: Tensor
    b_dec_D: Tensor | None = None
    threshold_F: Tensor | None = None

    @torch.no_grad()
    def above(self, batch: Rows) -> Tensor:
        x_NC = batch.flat if self.b_dec_D is None else batch.flat - self.b_dec_D
        z_NF = F.linear(x_NC, self.weight(), self.bias_F)
        return z_NF if self.threshold_F is None else z_NF - self.threshold_F

    def l0(self, batch: Rows) -> float:
        return float((self.above(batch) > 0).sum()) / len(batch.flat)

    @torch.no_grad()
    def close(self, batch: Rows, k: int) -> None:
        """Raise the bar, by the same for every latent, until k of them pass it on average."""
        above_NF = self.above(batch)
        bar = -torch.kthvalue(-above_NF.flatten(), k * len(above_NF) + 1).values
        if self.threshold_F is None:
            self.bias_F.sub_(bar)
        else:
            self.threshold_F.add_(bar)


@dataclass(frozen=True)
class Contender:
    """step: one training step on a batch. gate: None where k latents are active by construction."""

    name: str
    step: Callable[[Rows], object]
    gate: Gate | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is stepped. variant: "routesae hard" and "routesae soft" for the two routings."""

    variant: str
    width: int
    latents: int
    k: int
    layers: tuple[int, ...]


def ours(
    task: Task,
    cache: Cache,
    batch: Rows,
    stack: contextlib.ExitStack,
    out: Path,
    recipe_of_published: bool = False,
    dead: int = 0,
) -> Contender:
    """recipe_of_published: with the published code's objective, which for gated has two products fewer.

    dead: how many latents AuxK is to revive, at every step.
    """
    sae, _, routing = task.variant.partition(" ")
    flags: dict[str, Any] = {"sae": sae, "latents": task.latents, "k": task.k, "lr": LR, "cache": str(cache.path)}
    flags |= {"routing": routing} if routing else {} if sae == "crosscoder" else {"layer": task.layers[0]}
    flags |= {"recipe": "published", "sparsity": SPARSITY} if recipe_of_published else {}
    settings = settings_of(flags | {"out": str(out), "batch_tokens": len(batch.flat), "epochs": LONG // 1000})
    (job,) = jobs_of(settings, cache)
    # A routesae reads every layer of its cache; timing one of fewer needs no cache of fewer.
    job = replace(job, recipe=replace(job.recipe, layers=task.layers))
    job.partial.mkdir(parents=True)
    selection = Selection(cache, 0, cache.manifest.train_rows, task.layers)
    trainee = trainee_of(job, settings, pace_of(selection, settings, CPU), CPU, stack)
    trainee.sae.initialise(Hidden(*batch.stored, layers=batch.layers))
    trainee.dead_d = torch.arange(dead)  # for good: a run as long as this one is told to be finds none dead
    done = 0

    def step(batch: Rows) -> None:
        nonlocal done
        done += 1
        hidden = Hidden(*batch.stored, layers=batch.layers)
        trainee.step(done, hidden, hidden.tokens)

    parts: Any = trainee.sae
    gates: dict[str, Callable[[], Gate]] = {
        "vanilla": lambda: Gate(weight=lambda: parts.W_enc_FD, bias_F=parts.b_enc_F, b_dec_D=parts.b_dec_D),
        "gated": lambda: Gate(weight=lambda: parts.W_enc_FD, bias_F=parts.b_gate_F, b_dec_D=parts.b_dec_D),
        "jumprelu": lambda: Gate(
            weight=lambda: parts.W_enc_FD,
            bias_F=parts.b_enc_F,
            b_dec_D=parts.b_dec_D,
            threshold_F=parts.threshold_F,
        ),
        "crosscoder": lambda: Gate(weight=lambda: parts.W_enc_FD, bias_F=parts.b_enc_F),
    }
    name = "routesae, published recipe" if recipe_of_published else f"routesae, {dead} dead" if dead else "routesae"
    return Contender(name, step, gates[task.variant]() if task.variant in gates else None)


class _Layer(nn.Module):
    """Stands in for an LM whose only block puts out the rows of the batch."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])
        self.device = CPU
        self.rows_1ND = torch.zeros(1, 1, width)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layers[0](self.rows_1ND)


class _OneRow:
    """Stands in for a token dataset: as long as a long run for its schedules, one row when it is read."""

    def __init__(self) -> None:
        self.length, self.tokens = LONG, 1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(self.tokens, dtype=torch.long)}

    def select(self, rows: range) -> _OneRow:
        return self


def sparsify(task: Task, optimizer: str) -> Contender:
    """EleutherAI's: its Trainer.fit over a dataset of one row, once a step. The LM and saving are taken out of it."""
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SparseCoderConfig, TrainConfig, Trainer

        config = TrainConfig(
            SparseCoderConfig(num_latents=task.latents, k=task.k),
            batch_size=1,
            optimizer=optimizer,  # type: ignore[arg-type]
            lr=LR,
            hookpoints=["layers.0"],
            log_to_wandb=False,
        )
        model, data = _Layer(task.width), _OneRow()
        trainer = Trainer(config, data, model)  # type: ignore[arg-type]
    trainer.save = lambda: None  # type: ignore[method-assign]
    data.length = 1

    def step(batch: Rows) -> None:
        model.rows_1ND, data.tokens = batch.flat[None], len(batch.flat)
        precision = torch.get_float32_matmul_precision()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                trainer.fit()
        finally:
            torch.set_float32_matmul_precision(precision)  # fit lowers it, for whoever comes after it too

    return Contender(f"sparsify, {optimizer}", step)


def sae_lens(task: Task, sparse: bool = False) -> Contender:
    """sparse: with its TopK's use_sparse_activations, which is off by default. That has no backward on a CPU unless
    rescale_acts_by_decoder_norm is off too, so it is."""
    import sae_lens as lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]  # as it is; or it warns
    common = {"d_in": task.width, "d_sae": task.latents, "dtype": "float32", "device": "cpu"}
    builders: dict[str, Callable[[], Any]] = {
        "topk": lambda: lens.TopKTrainingSAE(
            lens.TopKTrainingSAEConfig(
                k=task.k, use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse, **common
            )
        ),
        "batchtopk": lambda: lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(k=task.k, **common)),
        "jumprelu": lambda: lens.JumpReLUTrainingSAE(
            lens.JumpReLUTrainingSAEConfig(l0_coefficient=SPARSITY, **common)
        ),
        "gated": lambda: lens.GatedTrainingSAE(lens.GatedTrainingSAEConfig(l1_coefficient=SPARSITY, **common)),
        "vanilla": lambda: lens.StandardTrainingSAE(
            lens.StandardTrainingSAEConfig(l1_coefficient=SPARSITY, **common)
        ),
    }
    sae = builders[task.variant]()
    config = SAETrainerConfig(
        total_training_samples=LONG * 10**6,
        train_batch_size_samples=10**6,
        lr=LR,
        lr_end=LR,
        logger=lens.LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(batch: Rows) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(batch.flat)
        trainer.n_training_steps += 1

    bias = {"vanilla": "b_enc", "jumprelu": "b_enc", "gated": "b_gate"}.get(task.variant)
    gate = None
    if bias is not None:
        threshold_F = sae.threshold if task.variant == "jumprelu" else None
        gate = Gate(weight=lambda: sae.W_enc.T, bias_F=getattr(sae, bias), b_dec_D=sae.b_dec, threshold_F=threshold_F)
    return Contender("sae_lens, sparse" if sparse else "sae_lens", step, gate)


def dictionary_learning(task: Task, april: bool = False) -> Contender:
    """april: of its two vanilla trainers, the one with decoder norms in the penalty."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainers: dict[str, tuple[Any, dict[str, Any]]] = {
        "topk": (TopKTrainer, {"k": task.k}),
        "batchtopk": (BatchTopKTrainer, {"k": task.k}),
        "jumprelu": (JumpReluTrainer, {"target_l0": task.k}),
        "gated": (GatedSAETrainer, {}),
        "vanilla": (StandardTrainerAprilUpdate if april else StandardTrainer, {}),
    }
    kind, own = trainers[task.variant]
    common = {"steps": LONG, "activation_dim": task.width, "dict_size": task.latents, "layer": 0, "lm_name": ""}
    trainer = kind(**common, lr=LR, seed=0, device="cpu", **own)
    done = 0

    def step(batch: Rows) -> None:
        nonlocal done
        trainer.update(done, batch.flat)
        done += 1

    ae = trainer.ae
    gates: dict[str, Callable[[], Gate]] = {
        "vanilla": lambda: Gate(weight=lambda: ae.encoder.weight, bias_F=ae.encoder.bias, b_dec_D=ae.bias),
        "gated": lambda: Gate(weight=lambda: ae.encoder.weight, bias_F=ae.gate_bias, b_dec_D=ae.decoder_bias),
        "jumprelu": lambda: Gate(weight=lambda: ae.W_enc.T, bias_F=ae.b_enc, threshold_F=ae.threshold),
    }
    name = "dictionary_learning, april" if april else "dictionary_learning"
    return Contender(name, step, gates[task.variant]() if task.variant in gates else None)


def published_code(task: Task, normalising: bool = False) -> Contender:
    """normalising: from float16, by its own normalisation, which its loop runs at every step."""
    model = published.build(task.variant, task.width, task.latents, task.k, len(task.layers))
    advance = published.stepper(model, LR, SPARSITY)
    many = len(task.layers) > 1

    def step(batch: Rows) -> None:
        if normalising:
            hidden_LND = batch.stored.hidden_LND
            advance(published.normalised(hidden_LND.permute(1, 0, 2) if many else hidden_LND[0]))
        else:
            advance(batch.by_token if many else batch.flat)

    gate = None
    if task.variant in ("vanilla", "gated", "jumprelu"):
        threshold_F = model.threshold_F if task.variant == "jumprelu" else None
        gate = Gate(
            weight=lambda: model.encoder.weight,
            bias_F=model.bias_F,
            b_dec_D=model.pre_bias_D,
            threshold_F=threshold_F,
        )
    elif task.variant == "crosscoder":
        gate = Gate(weight=lambda: torch.cat([part.weight for part in model.encoders], 1), bias_F=model.bias_F)
    return Contender("published, from fp16" if normalising else "published", step, gate)


def encoder_matmul(task: Task, fresh: bool = False) -> Contender:
    """EMM, the floor of a TopK step: [N, D] × [D, F] plus a bias. fresh: its output is allocated anew each time."""
    W_DF, b_F = torch.randn(task.width, task.latents) / task.width**0.5, torch.zeros(task.latents)
    outputs: dict[int, Tensor] = {}

    def into(batch: Rows) -> None:
        rows = batch.flat
        if len(rows) not in outputs:
            outputs[len(rows)] = torch.empty(len(rows), task.latents)
        torch.addmm(b_F, rows, W_DF, out=outputs[len(rows)])

    def anew(batch: Rows) -> Tensor:
        return torch.addmm(b_F, batch.flat, W_DF)

    return Contender("EMM, fresh output", anew) if fresh else Contender("EMM", into)


def contenders(task: Task) -> Iterator[Contender]:
    """All but ours."""
    single = len(task.layers) == 1
    if task.variant in ("topk", "routesae hard", "routesae soft"):
        one = Task(**{**task.__dict__, "layers": task.layers[:1]})
        yield _on_first_layer(encoder_matmul(one))
        yield _on_first_layer(encoder_matmul(one, fresh=True))
    if task.variant == "topk":
        yield sparsify(task, "signum")
        yield sparsify(task, "adam")
        yield sae_lens(task, sparse=True)
    if single:
        yield sae_lens(task)
        yield dictionary_learning(task)
    if task.variant == "vanilla":
        yield dictionary_learning(task, april=True)
    if task.variant != "batchtopk":
        yield published_code(task)
    if task.variant in ("topk", "routesae hard", "routesae soft"):
        yield published_code(task, normalising=True)


def _on_first_layer(contender: Contender) -> Contender:
    firsts: dict[int, Rows] = {}

    def step(batch: Rows) -> None:
        if id(batch) not in firsts:
            firsts[id(batch)] = batch.first_layer()
        contender.step(firsts[id(batch)])

    return Contender(contender.name, step)


def read_batches(cache: Cache, layers: Sequence[int], tokens: int, count: int) -> list[Rows]:
    """Rows as they lie in the shards, which are shuffled. Raises ValueError where the cache has too few."""
    at = [cache.manifest.layers.index(layer) for layer in layers]
    wanted = tokens * count
    parts: list[list[Tensor]] = []
    for shard in cache.shards():
        hidden = torch.stack([torch.tensor(shard.read(f"layer_{layer:02d}")[:wanted]) for layer in layers])
        statistics = [torch.tensor(shard.read(name)[:wanted]).T[at].unsqueeze(2) for name in STATISTICS]
        parts.append([hidden, *statistics])
        wanted -= hidden.shape[1]
        if wanted <= 0:
            break
    if wanted > 0:
        raise ValueError(f"{cache.path} has {wanted} tokens too few for {count} batches of {tokens}")
    whole = [torch.cat(pieces, 1).split(tokens, 1) for pieces in zip(*parts, strict=True)]
    return [Rows(Batch(*(part.contiguous() for part in split)), tuple(layers)) for split in zip(*whole, strict=True)]
