"""SAELens' and dictionary_learning's own trainers behind one interface: batches in; a trained SAE out.

Each runs its library's training step, losses, optimiser, clipping and initialisation as they are. Made equal with
ours from outside: rows (normalised per token beforehand), batches, learning-rate schedule, the window after which a
latent is dead, and the sparsity: λ is steered towards k active latents by the same rule as ours, jumprelu's
thresholds start where k latents are active (both peers start at nearly 0, from where a run of this length cannot
raise them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

STEER_RATE = 0.05  # as in routesae/train/saes/penalty.py


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to train, the same for every trainer. batches: normalised x_ND of every step."""

    variant: str
    width: int
    latents: int
    k: int
    lr: float
    steps: int
    seed: int
    batches: Callable[[], Iterator[Tensor]]

    @property
    def warmup_steps(self) -> int:
        return max(1, round(0.05 * self.steps))

    @property
    def decay_steps(self) -> int:
        return max(1, round(0.2 * self.steps))


@dataclass(frozen=True)
class Peer:
    """encode: x_ND → f_NF in use. decode: f_NF → x̂_ND.

    Where latents pass a threshold, encode gives what is compared with it, and thresholds_F what with.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    thresholds_F: Tensor | None = None


def steered(weight: float, active: Tensor, k: int) -> float:
    ratio = max(float(active.float().mean()) / k, 1e-3)
    return weight * math.exp(STEER_RATE * min(1.0, max(-1.0, math.log(ratio))))


def start_threshold(x_ND: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor, k: int) -> float:
    z = (x_ND[:1024] @ W_enc_DF + b_enc_F).flatten()
    return -float(torch.kthvalue(-z, k * min(1024, len(x_ND)) + 1).values)


def sae_lens(task: Task) -> Peer:
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        GatedTrainingSAE,
        GatedTrainingSAEConfig,
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(task.seed)
    common = {"d_in": task.width, "d_sae": task.latents, "dtype": "float32", "device": "cpu"}
    start = 0.1 / math.sqrt(task.k * task.width) * task.width  # SAELens' losses are sums over the width
    if task.variant == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=task.k, **common))
    elif task.variant == "batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=task.k, **common))
    elif task.variant == "jumprelu":
        # The gradient to the pre-activations too (its "Anthropic" setting); by thresholds alone, L0 stayed at 1000.
        config = JumpReLUTrainingSAEConfig(
            l0_coefficient=0.1 * task.width / task.k, jumprelu_ste_to_input=True, **common
        )
        sae = JumpReLUTrainingSAE(config)
        first = next(iter(task.batches()))
        with torch.no_grad():
            sae.threshold.fill_(start_threshold(first, sae.W_enc, sae.b_enc, task.k))
    elif task.variant == "gated":
        sae = GatedTrainingSAE(GatedTrainingSAEConfig(l1_coefficient=start, **common))
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=start, **common))
    config = SAETrainerConfig(
        total_training_samples=task.steps * 10**6,  # so that its own loop never ends; ours counts the steps
        train_batch_size_samples=10**6,
        lr=task.lr,
        lr_end=0.0,
        lr_warm_up_steps=task.warmup_steps,
        lr_decay_steps=task.decay_steps,
        dead_feature_window=task.steps // 4,
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))
    steering = next(iter(trainer.coefficient_schedulers.values()), None)
    for x_ND in task.batches():
        out = trainer.step(x_ND)
        trainer.n_training_steps += 1
        if steering is not None:
            weight = steered(steering.value, (out.feature_acts > 0).sum(1), task.k)
            steering.final_value = steering.current_value = weight
    sae.eval()

    def encode(x_ND: Tensor) -> Tensor:
        return sae.encode(x_ND)

    def pre(x_ND: Tensor) -> Tensor:
        return ((x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=1)

    def decode_batchtopk(f_NF: Tensor) -> Tensor:
        return f_NF / sae.W_dec.norm(dim=1) @ sae.W_dec + sae.b_dec

    if task.variant == "batchtopk":
        return Peer(pre, decode_batchtopk, torch.ones(task.latents))
    if task.variant == "jumprelu":
        return Peer(lambda x_ND: (x_ND - sae.b_dec) @ sae.W_enc + sae.b_enc, sae.decode, sae.threshold.detach())
    return Peer(encode, sae.decode)


def dictionary_learning(task: Task) -> Peer:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    torch.manual_seed(task.seed)
    trainers = {
        "topk": (TopKTrainer, {"k": task.k}),
        "batchtopk": (BatchTopKTrainer, {"k": task.k}),
        "jumprelu": (JumpReluTrainer, {"target_l0": task.k, "sparsity_penalty": 1.0 * task.width}),
        "gated": (GatedSAETrainer, {}),
        "vanilla": (StandardTrainerAprilUpdate, {}),
    }
    kind, own = trainers[task.variant]
    penalised = task.variant in ("gated", "vanilla", "jumprelu")
    trainer = kind(
        steps=task.steps,
        activation_dim=task.width,
        dict_size=task.latents,
        layer=0,
        lm_name="",
        lr=task.lr,
        warmup_steps=task.warmup_steps,
        decay_start=task.steps - task.decay_steps,
        seed=task.seed,
        device="cpu",
        **({"sparsity_warmup_steps": round(0.1 * task.steps)} if penalised else {}),
        **own,
    )
    if task.variant in ("gated", "vanilla"):
        trainer.l1_penalty = 0.1 / math.sqrt(task.k * task.width) * task.width
    tokens = 0
    for step, x_ND in enumerate(task.batches()):
        if step == 0 and task.variant == "jumprelu":
            with torch.no_grad():
                trainer.ae.threshold.fill_(start_threshold(x_ND, trainer.ae.W_enc, trainer.ae.b_enc, task.k))
        if tokens == 0:
            trainer.dead_feature_threshold = task.steps * len(x_ND) // 4
        tokens += len(x_ND)
        if task.variant in ("gated", "vanilla"):
            with torch.no_grad():
                active = (trainer.ae.encode(x_ND) > 0).sum(1)
            trainer.l1_penalty = steered(trainer.l1_penalty, active, task.k)
        trainer.update(step, x_ND)
    ae = trainer.ae
    if task.variant == "batchtopk":
        return Peer(lambda x_ND: ae.encoder(x_ND - ae.b_dec), ae.decode, torch.ones(task.latents))
    if task.variant == "jumprelu":
        return Peer(lambda x_ND: ae.encode(x_ND, output_pre_jump=True)[1], ae.decode, ae.threshold.detach())
    return Peer(ae.encode, ae.decode)


PEERS = {"sae_lens": sae_lens, "dictionary_learning": dictionary_learning}
