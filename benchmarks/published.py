"""The published RouteSAE code's training steps (2503.08200), written from a reading of that code, none of it copied.

Dense throughout: a TopK's latents are scattered into a zero matrix [N, F] and multiplied with the whole decoder. Loss
mean ‖x − x̂‖² / ‖x‖², a plain mean of f times λ where there is a penalty, λ·L0 for a jumprelu; Adam on everything;
decoder columns at unit norm after every tenth step; the loss read off the device at every step. The weights start as
a linear layer's, the decoder as the encoder's transpose.

Dimension letters: L layers, N tokens, D width, F latents, K active latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DECODER_STEPS = 10
THRESHOLD = BANDWIDTH = 0.001  # of its jumprelu


def normalised(hidden: Tensor) -> Tensor:
    """Each row at mean 0 and standard deviation 1, in fp32."""
    hidden = hidden.float()
    return (hidden - hidden.mean(-1, keepdim=True)) / (hidden.std(-1, keepdim=True) + 1e-6)


class Dictionary(nn.Module):
    """Encoder and decoder of one layer; its subclasses say what is active and what is penalised."""

    def __init__(self, width: int, latents: int):
        super().__init__()
        self.pre_bias_D = nn.Parameter(torch.zeros(width))
        self.bias_F = nn.Parameter(torch.zeros(latents))
        self.encoder = nn.Linear(width, latents, bias=False)
        self.decoder = nn.Linear(latents, width, bias=False)
        with torch.no_grad():
            self.decoder.weight.copy_(self.encoder.weight.T)

    def activate(self, z_NF: Tensor) -> Tensor:
        return z_NF.relu()

    def penalty(self, f_NF: Tensor) -> Tensor | float:
        return f_NF.abs().mean()

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The target, its reconstruction, and the latents."""
        f_NF = self.activate(self.encoder(x_ND - self.pre_bias_D) + self.bias_F)
        return x_ND, self.decoder(f_NF) + self.pre_bias_D, f_NF

    def decoders(self) -> list[nn.Linear]:
        return [self.decoder]


class TopK(Dictionary):
    def __init__(self, width: int, latents: int, k: int):
        super().__init__(width, latents)
        self.k = k

    def activate(self, z_NF: Tensor) -> Tensor:
        values_NK, indices_NK = torch.topk(z_NF, self.k, dim=-1)
        return torch.zeros_like(z_NF).scatter_(-1, indices_NK, values_NK)

    def penalty(self, f_NF: Tensor) -> float:
        return 0.0


class Gated(Dictionary):
    """Its gate's bias gets no gradient: nothing differentiable reaches it."""

    def __init__(self, width: int, latents: int):
        super().__init__(width, latents)
        self.magnitude_bias_F = nn.Parameter(torch.zeros(latents))
        self.log_scale_F = nn.Parameter(torch.zeros(latents))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared_NF = self.encoder(x_ND - self.pre_bias_D)
        open_NF = (shared_NF + self.bias_F > 0).float()
        f_NF = open_NF * (self.log_scale_F.exp() * shared_NF + self.magnitude_bias_F).relu()
        return x_ND, self.decoder(f_NF) + self.pre_bias_D, f_NF


class Jump(torch.autograd.Function):
    """x·1[x > θ], or 1[x > θ] alone, with the rectangle kernel's gradient for θ (2407.14435, eq. 11 and 12)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold_F: Tensor, keep: bool) -> Tensor:
        ctx.save_for_backward(x, threshold_F)
        ctx.keep = keep
        above = (x > threshold_F).float()
        return x * above if keep else above

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, threshold_F = ctx.saved_tensors
        near = ((x - threshold_F).abs() < BANDWIDTH / 2).float() * grad
        if ctx.keep:
            return (x > threshold_F).float() * grad, (-threshold_F / BANDWIDTH * near).sum(0), None
        return torch.zeros_like(grad), (-1 / BANDWIDTH * near).sum(0), None


class JumpReLU(Dictionary):
    def __init__(self, width: int, latents: int):
        super().__init__(width, latents)
        self.threshold_F = nn.Parameter(torch.full((latents,), THRESHOLD))

    def activate(self, z_NF: Tensor) -> Tensor:
        return Jump.apply(z_NF, self.threshold_F, True)

    def penalty(self, f_NF: Tensor) -> Tensor:
        return Jump.apply(f_NF, self.threshold_F, False).sum(-1).mean()


class RouteSAE(nn.Module):
    """A TopK of the routed layer's state times its weight (hard), or of all layers' weighted sum (soft)."""

    def __init__(self, width: int, latents: int, k: int, layers: int, routing: str):
        super().__init__()
        self.router = nn.Linear(width, layers, bias=False)
        self.sae = TopK(width, latents, k)
        self.hard = routing == "hard"
        self.layer_counts_L = torch.zeros(layers)

    def forward(self, x_NLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights_NL = self.router(x_NLD.sum(dim=1)).softmax(-1)
        if self.hard:
            weight_N, layer_N = weights_NL.max(dim=-1)
            shares_NL = torch.zeros_like(weights_NL).scatter_(1, layer_N[:, None], 1.0)
            at_N1D = layer_N[:, None, None].expand(-1, -1, x_NLD.shape[-1])
            routed_ND = torch.gather(x_NLD, 1, at_N1D).squeeze(1) * weight_N[:, None]
        else:
            shares_NL = weights_NL
            routed_ND = (x_NLD * weights_NL[..., None]).sum(dim=1)
        self.layer_counts_L += shares_NL.sum(0).detach()
        return self.sae(routed_ND)

    def penalty(self, f_NF: Tensor) -> float:
        return 0.0

    def decoders(self) -> list[nn.Linear]:
        return self.sae.decoders()


class Crosscoder(nn.Module):
    """An encoder and a decoder a layer; every layer's pre-activations are kept apart until they are summed."""

    def __init__(self, width: int, latents: int, layers: int):
        super().__init__()
        self.bias_F = nn.Parameter(torch.zeros(latents))
        self.encoders = nn.ModuleList(nn.Linear(width, latents, bias=False) for _ in range(layers))
        self.outputs = nn.ModuleList(nn.Linear(latents, width, bias=False) for _ in range(layers))
        with torch.no_grad():
            for encoder, decoder in zip(self.encoders, self.outputs, strict=True):
                decoder.weight.copy_(encoder.weight.T)

    def forward(self, x_NLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, layers, _ = x_NLD.shape
        z_NLF = x_NLD.new_zeros(n, layers, len(self.bias_F))
        for at, encoder in enumerate(self.encoders):
            z_NLF[:, at] = encoder(x_NLD[:, at])
        f_NF = (z_NLF.sum(dim=1) + self.bias_F).relu()
        out_NLD = torch.zeros(x_NLD.shape)
        for at, decoder in enumerate(self.outputs):
            out_NLD[:, at] = decoder(f_NF)
        return x_NLD, out_NLD, f_NF

    def penalty(self, f_NF: Tensor) -> Tensor:
        return f_NF.abs().mean()

    def decoders(self) -> list[nn.Linear]:
        return list(self.outputs)  # type: ignore[arg-type]


def stepper(model: Any, lr: float, sparsity: float = 1e-3) -> Callable[[Tensor], None]:
    """What its trainer does with a batch of normalised states."""
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1.0)
    done = 0

    def normalise_decoders() -> None:
        with torch.no_grad():
            for decoder in model.decoders():
                decoder.weight /= decoder.weight.norm(dim=0, keepdim=True)

    def step(x: Tensor) -> None:
        nonlocal done
        x, out, f_NF = model(x)
        error = ((out - x).square().mean(-1) / x.square().mean(-1)).mean()
        loss = error + sparsity * model.penalty(f_NF)
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        error.item()
        if done % DECODER_STEPS == 0:
            normalise_decoders()
        done += 1

    normalise_decoders()
    return step


def build(variant: str, width: int, latents: int, k: int, layers: int) -> Any:
    """variant: "routesae hard" and "routesae soft" for the two routings."""
    if variant.startswith("routesae"):
        return RouteSAE(width, latents, k, layers, variant.split()[1])
    if variant == "topk":
        return TopK(width, latents, k)
    if variant == "crosscoder":
        return Crosscoder(width, latents, layers)
    return {"vanilla": Dictionary, "gated": Gated, "jumprelu": JumpReLU}[variant](width, latents)
