"""The trainers of SAELens, dictionary_learning and sparsify behind one interface: batches in; an SAE of ours out.

Each runs its library's training step, losses, optimiser, projections, clipping and initialisation as they are, and
its weights become an SAE that routesae scores and saves. Rows are normalised per token beforehand, and batches and
order are ours. There are two ways to set what is left:

ours  The learning rate of the benchmark and the schedule of `routesae train`; the window after which a latent is
      dead; λ steered towards k active latents by our rule; jumprelu's thresholds begin where k latents are active.
own   What each library does if it is told nothing but sizes and k. Learning rate: SAELens 3e-4, constant;
      dictionary_learning 2e-4·√(16384/F) (topk, batchtopk, matryoshka), 7e-5 (jumprelu), 5e-5 (gated) or 1e-3
      (vanilla), after 1,000 steps of warm-up, on rows of unit mean square norm, as its `normalize_activations` makes
      them; sparsify signum, schedule-free, at 5e-3·√(16384/F), or with optimizer=adam 2e-4·√(16384/F) and
      optimizer=muon 2e-3, which warm up over 1,000 steps and decay linearly over all. λ is steered there too, as none
      of them says which λ gives k. SAELens' jumprelu aims at k by its quadratic loss. Warm-ups are cut to half of a
      shorter run.

Versions: sae-lens 6.54.12, dictionary-learning 0.1.0, eai-sparsify 1.3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from routesae.train.optimiser import lr_factor
from routesae.train.saes import SAE, Recipe, build
from routesae.train.saes.matryoshka import DEFAULT_FRACTIONS, default_prefixes
from routesae.train.saes.single import WEIGHTS

STEER_RATE = 0.05  # as in routesae/train/saes/penalty.py
FIT_STEPS = 300  # batches that a control is fitted to
AUXK_WEIGHT = 1 / 32  # sparsify's is 0 unless it is told one


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to train. lr: None for the library's own. batches: normalised x_ND of every step.

    watch: told after every step, with what makes the SAE as it is then.
    """

    variant: str
    layer: int
    width: int
    latents: int
    k: int
    lr: float | None
    steps: int
    seed: int
    own: bool
    optimizer: str
    batches: Callable[[], Iterator[Tensor]]
    watch: Callable[[int, Callable[[], SAE]], None]

    def warmup(self, steps: int) -> int:
        """The library's own warm-up, or as much of it as fits into half of the run."""
        return min(steps, self.steps // 2)

    def as_ours(self, variant: str, **weights: Tensor) -> SAE:
        """An SAE of ours of normalised rows, with these weights by SAELens' names: W_enc [D, F], W_dec [F, D]."""
        recipe = Recipe(
            sae=variant,
            layers=(self.layer,),
            width=self.width,
            latents=weights["W_dec"].shape[0],
            k=self.k,
            sparsity=None if variant == "topk" else 0.0,
        )
        sae = build(recipe)
        sae.load_files({WEIGHTS: {name: tensor.detach().float().clone() for name, tensor in weights.items()}})
        return sae.requires_grad_(False).eval()


def steered(weight: float, active: Tensor, k: int) -> float:
    ratio = max(float(active.float().mean()) / k, 1e-3)
    return weight * math.exp(STEER_RATE * min(1.0, max(-1.0, math.log(ratio))))


def start_threshold(x_ND: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor, k: int) -> float:
    z = (x_ND[:1024] @ W_enc_DF + b_enc_F).flatten()
    return -float(torch.kthvalue(-z, k * min(1024, len(x_ND)) + 1).values)


def follow_schedule(scheduler: Any, steps: int) -> None:
    """Have a LambdaLR go by the schedule of `routesae train`."""
    scheduler.lr_lambdas = [lambda step: lr_factor(step, steps)]
    for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = base * lr_factor(0, steps)


def sae_lens(task: Task) -> SAE:
    import sae_lens as lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(task.seed)
    common: dict[str, Any] = {"d_in": task.width, "d_sae": task.latents, "dtype": "float32", "device": "cpu"}
    start = 0.1 / math.sqrt(task.k * task.width) * task.width  # SAELens' losses are sums over the width
    match task.variant:
        case "topk":
            sae: Any = lens.TopKTrainingSAE(lens.TopKTrainingSAEConfig(k=task.k, **common))
        case "batchtopk":
            sae = lens.BatchTopKTrainingSAE(lens.BatchTopKTrainingSAEConfig(k=task.k, **common))
        case "matryoshka":
            widths = list(default_prefixes(task.latents))
            config = lens.MatryoshkaBatchTopKTrainingSAEConfig(k=task.k, matryoshka_widths=widths, **common)
            sae = lens.MatryoshkaBatchTopKTrainingSAE(config)
        case "jumprelu" if task.own:
            aimed = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(task.k)}
            sae = lens.JumpReLUTrainingSAE(lens.JumpReLUTrainingSAEConfig(**aimed, **common))
        case "jumprelu":
            # The gradient to the pre-activations too (its "Anthropic" setting); by thresholds alone, L0 stayed 1000.
            weight = 0.1 * task.width / task.k
            config = lens.JumpReLUTrainingSAEConfig(l0_coefficient=weight, jumprelu_ste_to_input=True, **common)
            sae = lens.JumpReLUTrainingSAE(config)
            with torch.no_grad():
                first = next(iter(task.batches()))
                sae.threshold.fill_(start_threshold(first, sae.W_enc, sae.b_enc, task.k))
        case "gated":
            sae = lens.GatedTrainingSAE(lens.GatedTrainingSAEConfig(l1_coefficient=start, **common))
        case _:
            sae = lens.StandardTrainingSAE(lens.StandardTrainingSAEConfig(l1_coefficient=start, **common))
    config = SAETrainerConfig(
        total_training_samples=task.steps * 10**6,  # so that its own loop never ends; ours counts the steps
        train_batch_size_samples=10**6,
        lr=3e-4 if task.lr is None else task.lr,  # LanguageModelSAERunnerConfig's default
        lr_end=0.0,  # which a constant rate does not come to
        dead_feature_window=1000 if task.own else task.steps // 4,
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))
    if not task.own:
        plain = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)
        follow_schedule(plain, task.steps)
        trainer.lr_scheduler = plain
    aims = task.own and task.variant == "jumprelu"
    steering = None if aims else next(iter(trainer.coefficient_schedulers.values()), None)

    def made() -> SAE:
        names = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(
            task.variant, ("b_enc",)
        )
        weights = {name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_dec", *names)}
        if task.variant in ("topk", "batchtopk", "matryoshka"):  # which rescale latents by their decoder's norm
            norms_F = sae.W_dec.norm(dim=1)
            weights |= {"W_enc": sae.W_enc * norms_F, "b_enc": sae.b_enc * norms_F}
            weights["W_dec"] = sae.W_dec / norms_F[:, None]
        if task.variant in ("batchtopk", "matryoshka"):
            weights["threshold"] = sae.topk_threshold.expand(task.latents)
        return task.as_ours(kind_of(task.variant), **weights)

    for step, x_ND in enumerate(task.batches(), 1):
        out = trainer.step(x_ND)
        trainer.n_training_steps += 1
        if steering is not None:
            weight = steered(steering.value, (out.feature_acts > 0).sum(1), task.k)
            steering.final_value = steering.current_value = weight
        task.watch(step, made)
    return made()


def kind_of(variant: str) -> str:
    """What an SAE trained as a variant is in use: one that keeps what passes a threshold is a jumprelu."""
    return "jumprelu" if variant in ("batchtopk", "matryoshka") else variant


def dictionary_learning(task: Task) -> SAE:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    torch.manual_seed(task.seed)
    parts = [1 / part for part in DEFAULT_FRACTIONS[:-1]]
    trainers: dict[str, tuple[Any, dict[str, Any]]] = {
        "topk": (TopKTrainer, {"k": task.k}),
        "batchtopk": (BatchTopKTrainer, {"k": task.k}),
        "matryoshka": (MatryoshkaBatchTopKTrainer, {"k": task.k, "group_fractions": [parts[0], *parts]}),
        "jumprelu": (JumpReluTrainer, {"target_l0": task.k}),
        "gated": (GatedSAETrainer, {}),
        "vanilla": (StandardTrainerAprilUpdate, {}),
    }
    kind, options = trainers[task.variant]
    if task.variant in ("gated", "vanilla", "jumprelu"):
        options["sparsity_warmup_steps"] = task.warmup(2000) if task.own else round(0.1 * task.steps)
    if task.variant == "jumprelu" and not task.own:
        options["sparsity_penalty"] = 1.0 * task.width
    options |= {"warmup_steps": task.warmup(1000)} | ({} if task.lr is None else {"lr": task.lr})
    sizes = {"steps": task.steps, "activation_dim": task.width, "dict_size": task.latents}
    trainer = kind(**sizes, layer=task.layer, lm_name="", seed=task.seed, device="cpu", **options)
    ae = trainer.ae
    if not task.own:
        follow_schedule(trainer.scheduler, task.steps)
    first = next(iter(task.batches()))
    scale = float(first.square().sum(1).mean().sqrt()) if task.own else 1.0
    if task.variant in ("gated", "vanilla"):
        trainer.l1_penalty = 0.1 / math.sqrt(task.k * task.width) * task.width / scale
    if task.variant == "jumprelu" and not task.own:
        with torch.no_grad():
            ae.threshold.fill_(start_threshold(first, ae.W_enc, ae.b_enc, task.k))
    if not task.own:
        trainer.dead_feature_threshold = task.steps * len(first) // 4

    def made() -> SAE:
        # Biases and thresholds times the scale: the same SAE, of rows that are not divided by it.
        match task.variant:
            case "topk" | "batchtopk":
                weights = {"W_enc": ae.encoder.weight.T, "b_enc": ae.encoder.bias * scale, "b_dec": ae.b_dec * scale}
                weights["W_dec"] = ae.decoder.weight.T
            case "matryoshka" | "jumprelu":
                weights = {"W_enc": ae.W_enc, "b_enc": ae.b_enc * scale, "b_dec": ae.b_dec * scale, "W_dec": ae.W_dec}
            case "gated":
                weights = {"W_enc": ae.encoder.weight.T, "W_dec": ae.decoder.weight.T, "r_mag": ae.r_mag}
                weights["b_dec"] = ae.decoder_bias * scale
                weights |= {"b_gate": ae.gate_bias * scale, "b_mag": ae.mag_bias * scale}
            case _:
                weights = {"W_enc": ae.encoder.weight.T, "b_enc": ae.encoder.bias * scale, "b_dec": ae.bias * scale}
                weights["W_dec"] = ae.decoder.weight.T
        if task.variant == "jumprelu":  # which does not take b_dec from its input; ours does
            weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ ae.W_enc
        if kind_of(task.variant) == "jumprelu":
            weights["threshold"] = (ae.threshold * scale).expand(task.latents)
        return task.as_ours(kind_of(task.variant), **weights)

    for step, x_ND in enumerate(task.batches(), 1):
        scaled_ND = x_ND / scale
        if task.variant in ("gated", "vanilla"):
            with torch.no_grad():
                active = (ae.encode(scaled_ND) > 0).sum(1)
            trainer.l1_penalty = steered(trainer.l1_penalty, active, task.k)
        trainer.update(step - 1, scaled_ND)
        task.watch(step, made)
    return made()


def sparsify(task: Task) -> SAE:
    """topk alone. The loop is that of its Trainer.fit, whose batches are the output of an LM's hook."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.muon import Muon
    from sparsify.sign_sgd import SignSGD
    from transformers import get_linear_schedule_with_warmup

    torch.manual_seed(task.seed)
    sae = SparseCoder(task.width, SparseCoderConfig(num_latents=task.latents, k=task.k), "cpu", torch.float32)
    larger = math.sqrt(task.latents / 2**14)
    matrices = [parameter for parameter in sae.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in sae.parameters() if parameter.ndim < 2]
    match task.optimizer:
        case "signum":
            optimizers: list[Any] = [
                ScheduleFreeWrapper(SignSGD(sae.parameters(), task.lr or 5e-3 / larger), momentum=0.95)
            ]
            optimizers[0].train()
        case "adam":
            optimizers = [torch.optim.Adam(sae.parameters(), task.lr or 2e-4 / larger)]
        case _:
            optimizers = [Muon(matrices, task.lr or 2e-3), torch.optim.Adam(vectors, task.lr or 2e-3)]
    warmups = [0 if isinstance(optimizer, Muon) else task.warmup(1000) for optimizer in optimizers]
    schedulers = [
        get_linear_schedule_with_warmup(optimizer, warmup, task.steps)
        for optimizer, warmup in zip(optimizers, warmups, strict=True)
        if task.optimizer != "signum"
    ]
    for scheduler in () if task.own else schedulers:
        follow_schedule(scheduler, task.steps)
    idle_F = torch.zeros(task.latents, dtype=torch.int64)

    def made() -> SAE:
        for optimizer in optimizers if task.optimizer == "signum" else ():
            optimizer.eval()  # the average of its iterates
        weights = {"W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias, "b_dec": sae.b_dec}
        ours = task.as_ours("topk", **weights, W_dec=sae.W_dec)
        for optimizer in optimizers if task.optimizer == "signum" else ():
            optimizer.train()
        return ours

    for step, x_ND in enumerate(task.batches(), 1):
        if step == 1:
            sae.b_dec.data = x_ND.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        dead_F = idle_F > task.steps * len(x_ND) // 4
        out = sae(x_ND, dead_mask=None if task.own else dead_F)
        (out.fvu + (0.0 if task.own else AUXK_WEIGHT) * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        idle_F += len(x_ND)
        idle_F[out.latent_indices.flatten()] = 0
        task.watch(step, made)
    return made()


def pca(task: Task) -> SAE:
    """The k largest principal components: a vanilla of 2k latents, as a component is active on either side of 0."""
    moments = [(len(x_ND), x_ND.sum(0), x_ND.T @ x_ND) for x_ND in islice(task.batches(), FIT_STEPS)]
    tokens, sum_D, square_DD = (sum(parts) for parts in zip(*moments, strict=True))
    mean_D = sum_D / tokens
    _, vectors_DD = torch.linalg.eigh((square_DD / tokens - mean_D.outer(mean_D)).double())
    W_FD = torch.cat([vectors_DD[:, -task.k :].T, -vectors_DD[:, -task.k :].T]).float()
    return task.as_ours("vanilla", W_enc=W_FD.T, W_dec=W_FD, b_dec=mean_D, b_enc=torch.zeros(len(W_FD)))


def mean(task: Task) -> SAE:
    """The mean of the training rows and no latent: a vanilla whose latents are never active."""
    sums = [(len(x_ND), x_ND.sum(0)) for x_ND in islice(task.batches(), FIT_STEPS)]
    tokens, sum_D = (sum(parts) for parts in zip(*sums, strict=True))
    W_FD = torch.zeros(task.k, task.width)
    return task.as_ours("vanilla", W_enc=W_FD.T, W_dec=W_FD, b_dec=sum_D / tokens, b_enc=W_FD[:, 0])


SINGLE = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "vanilla")
# Each trainer and what it trains. A control trains nothing: it is the same whatever the variant beside it.
PEERS: dict[str, tuple[Callable[[Task], SAE], tuple[str, ...]]] = {
    "sae_lens": (sae_lens, SINGLE),
    "dictionary_learning": (dictionary_learning, SINGLE),
    "sparsify": (sparsify, ("topk",)),
    "pca": (pca, ("control",)),
    "mean": (mean, ("control",)),
}
