"""Training steps of whole networks: the ELBO, forward and backward, against the same layers in plain torch.

Floors: for LeNet-5 the same step of the network without noise; for the GPT likewise, in bf16 under autocast. The
optimizer has as many weights in all but those, and is left out.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cases import Case, Setup
from benchmarks.eager import with_eager_layers
from examples.gpt.model import GPT
from examples.gpt.training import kl_weight, objectives, stochastic
from losssurf_fast.conversion import to_lrt

# Batch; layers, width, context, batch.
LENET, GPTS = {"cpu": 128, "cuda": 2048}, {"cpu": (2, 128, 64, 8), "cuda": (6, 512, 256, 32)}
TINY_LENET, TINY_GPT = 2, (1, 32, 8, 2)
NUM_TOKENS = 100_000


class CrossEntropy(nn.Module):
    """All of a variance network's objective: its KL divergence is constant."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x, y):
        return F.cross_entropy(self.network(x), y)


def lenet5() -> nn.Sequential:
    """For images of 28 x 28, with the sizes of Caffe's (Neklyudov et al., "Variance networks")."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def one_step(loss: nn.Module, inputs: tuple):
    weights = list(loss.parameters())

    @torch.enable_grad()
    def step():
        torch.autograd.grad(loss(*inputs), weights)

    return step


def _lenet(batch: int):
    def setup(device: torch.device) -> Setup:
        inputs = torch.randn(batch, 1, 28, 28, device=device), torch.randint(10, (batch,), device=device)
        plain = lenet5().to(device)
        network = to_lrt(copy.deepcopy(plain), "variance")
        eager, ours = CrossEntropy(with_eager_layers(network)), CrossEntropy(network)
        providers = {"eager": eager, "compiled": eager, "ours": ours}
        return Setup(inputs, providers, one_step(CrossEntropy(plain), inputs))

    return setup


def _gpt(layers: int, width: int, context: int, batch: int):
    def setup(device: torch.device) -> Setup:
        plain = GPT(layers, width, context).to(device)
        network = stochastic(copy.deepcopy(plain), "additive")
        steps = objectives(plain, network, NUM_TOKENS)
        tokens, targets = torch.randint(256, (2, batch, context), device=device)
        inputs = tokens, targets, kl_weight(1.0, device)
        providers = {"eager": steps["eager"], "compiled": steps["eager"], "ours": steps["ours"]}
        return Setup(inputs, providers, one_step(steps["plain"], inputs))

    return setup


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    batch = TINY_LENET if tiny else LENET[device_type]
    weights = 20 * 25 + 50 * 20 * 25 + 800 * 500 + 500 * 10
    products = 24**2 * 20 * 25 + 8**2 * 50 * 20 * 25 + 800 * 500 + 500 * 10  # of one image
    lenet = Case(
        op="LeNet-5 step",
        variant="variance",
        shape=(batch, 1, 28, 28),
        mode="full",
        setup=_lenet(batch),
        bytes=4 * (batch * 28**2 + 3 * weights),
        flops=6 * batch * products,
        targets={1: 1.5} if device_type == "cpu" else {},
        headline=True,
    )
    return [lenet, _gpt_case(*(TINY_GPT if tiny else GPTS[device_type]))]


def _gpt_case(layers: int, width: int, context: int, batch: int) -> Case:
    weights = 12 * layers * width**2
    return Case(
        op="GPT step",
        variant=f"additive, {layers} layers, width {width}",
        shape=(batch, context),
        mode="full",
        dtype="bf16",
        setup=_gpt(layers, width, context, batch),
        bytes=4 * 6 * weights,  # both parameters of every weight and their gradients, read by each pass
        flops=2 * 6 * batch * context * weights,
        saved_target=0.6,
    )
