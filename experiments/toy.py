"""The toy problem of variance networks: four Gaussians, told apart by two neurons whose weights have mean zero.

Source: Neklyudov et al., "Variance networks: when expectation does not meet your expectations", ICLR 2019.

    python -m experiments.toy
    python -m experiments.toy --epochs 21000 --batch-size 2000 --lr 1e-4      the authors' setting

2-100-100-100-100-[2]-100-4 with leaky ReLU, the bracketed layer drawn from N(0, sigma^2): a point is represented by the
spread of two activations. ``toy_activations.png`` shows draws of them over what the last layers make of each pair, for
two initializations. ``toy_regions.png`` shows the plane of the
points: what single draws of the weights answer, each for the whole plane, and what the ensemble and the means do.
"""

import functools
import math

import torch
from torch import nn

import losssurf_fast as lsf
from experiments import command, noise, report, trainer
from experiments.data import Batches
from losssurf_fast.figures import finish, new_figure

MEANS = ((3.0, 3.0), (3.0, 10.0), (10.0, 3.0), (10.0, 10.0))
POINTS = 500  # of each Gaussian, whose covariance is the identity
PLANE = (-2.0, 15.0)
DRAWS = 6
COLOURS = ("#d7301f", "#4292c6", "#41ab5d", "#f0a202")
DEFAULTS = {
    "toy": {"model": None, "width": 100, "epochs": 300, "batch_size": 200, "lr": 1e-3},
    "quick": {"width": 30, "epochs": 30},
}


class ToyNetwork(nn.Module):
    """2-[width]x4-(2 neurons that draw their weights)-width-4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (2, *(width,) * 4)
        self.body = nn.Sequential(
            *(part for i in range(4) for part in (nn.Linear(sizes[i], sizes[i + 1]), nn.LeakyReLU()))
        )
        self.neurons = lsf.nn.LRTLinear(width, 2, parameterization="variance")
        self.head = nn.Sequential(nn.LeakyReLU(), nn.Linear(2, width), nn.LeakyReLU(), nn.Linear(width, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.neurons(self.body(x)))


def gaussians(seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Points ``[4 * POINTS, 2]`` and the number of the Gaussian that each is from."""
    noise_of = torch.randn(4, POINTS, 2, generator=torch.Generator().manual_seed(seed))
    points = (torch.tensor(MEANS)[:, None] + noise_of).flatten(0, 1)
    return points.to(device), torch.arange(4).repeat_interleave(POINTS).to(device)


def fit(setting: command.Setting, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ToyNetwork(setting.width).to(setting.device)
    optimizer = torch.optim.Adam(model.parameters(), setting.lr)
    shares = {"shuffle": True, "rank": setting.rank, "world": setting.world}
    batches = Batches(*gaussians(setting.seed, setting.device), setting.batch_size, **shares)
    trainer.train(setting, f"toy{seed}", model, batches, optimizer, setting.epochs, seed=seed)
    return model


def procedure(setting: command.Setting) -> report.Result:
    seeds = (setting.seed, setting.seed + 1)
    models = {seed: fit(setting, seed) for seed in seeds}
    x, y = gaussians(setting.seed + 1, setting.device)
    test = Batches(x, y, 500, rank=setting.rank, world=setting.world)
    found = {f"seed {seed}": noise.accuracies(setting, model, test, 101) for seed, model in models.items()}
    text = report.comparison(
        "Accuracy (%) on new points", noise.SCHEMES, {name: list(row.values()) for name, row in found.items()}, {},
        data="toy", source="as pictures only; guessing is right in 25 %", digits=1,
    )  # fmt: skip
    figures = {
        "toy_activations.png": activations_figure(models, x, y),
        "toy_regions.png": regions_figure(models[setting.seed], x, y, setting.seed),
    }
    return report.Result(text, {"accuracy": found}, figures)


def grid(axis: torch.Tensor) -> torch.Tensor:
    """All pairs of coordinates ``[n]`` as points ``[n^2, 2]``, row by row."""
    return torch.cartesian_prod(axis, axis).flip(1)


@torch.no_grad()
def one_draw(model: ToyNetwork, x: torch.Tensor, seed: int) -> torch.Tensor:
    """Classes of ``x`` for one draw of the weights: local reparameterization would draw other ones for every point."""
    with lsf.sample_weights(model, seed, prior=None):
        return model(x).argmax(-1)


def regions_figure(model: ToyNetwork, x: torch.Tensor, y: torch.Tensor, seed: int):
    """Classes over the plane for some draws of the weights, for the ensemble, and for the mean weights."""
    axis = torch.linspace(*PLANE, 200, device=x.device)
    plane = grid(axis)
    classes = {f"draw {i + 1}": one_draw(model, plane, seed + i) for i in range(DRAWS)}
    for name, scheme in (("ensemble of 101", "ensemble"), ("mean weights", "deterministic")):
        classes[name] = lsf.predict(model, plane, scheme, 101, seed=seed).argmax(-1)
    figure = new_figure(9.6, 5.2)
    for axes, (name, found) in zip(figure.subplots(2, 4, sharex=True, sharey=True).flat, classes.items(), strict=True):
        _regions(axes, axis, found)
        _points(axes, x, y)
        axes.set_title(name, fontsize=10)
    return finish(figure)


@torch.no_grad()
def activations_figure(models: dict[int, ToyNetwork], x: torch.Tensor, y: torch.Tensor):
    """Draws of the two activations by class, over the class that the last layers give each pair of activations.

    The axes are linear near 0 and logarithmic beyond: the classes' spreads differ by orders of magnitude.
    """
    from matplotlib.ticker import AsinhLocator

    figure = new_figure(4.2 * len(models), 4)
    for axes, (seed, model) in zip(figure.subplots(1, len(models)), models.items(), strict=True):
        with lsf.prediction(model, "stochastic"), torch.random.fork_rng():
            torch.manual_seed(seed)
            drawn = model.neurons(model.body(x))
        near, far = (drawn.abs().quantile(share).item() for share in (0.1, 0.999))
        axis = near * torch.linspace(-math.asinh(far / near), math.asinh(far / near), 400, device=x.device).sinh()
        for scale in (axes.set_xscale, axes.set_yscale):
            scale("asinh", linear_width=near)
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_locator(AsinhLocator(near, numticks=5))
        _regions(axes, axis, model.head(grid(axis)).argmax(-1))
        _points(axes, drawn, y)
        axes.set_title(f"initialization {seed}", fontsize=10)
        axes.set_xlabel("first neuron")
        axes.set_ylabel("second neuron")
    return finish(figure)


def _regions(axes, axis: torch.Tensor, classes: torch.Tensor) -> None:
    from matplotlib.colors import ListedColormap

    coordinates, answers = axis.cpu().numpy(), classes.view(len(axis), -1).cpu().numpy()
    axes.pcolormesh(
        coordinates, coordinates, answers, cmap=ListedColormap(COLOURS), vmin=0, vmax=3, alpha=0.35, rasterized=True
    )
    limits = coordinates[0].item(), coordinates[-1].item()
    axes.set(xlim=limits, ylim=limits, box_aspect=1)


def _points(axes, points: torch.Tensor, classes: torch.Tensor) -> None:
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))  # no class lies over all others
    colours = [COLOURS[c] for c in classes.cpu()[order].tolist()]
    axes.scatter(*points.cpu()[order].T.numpy(), c=colours, s=3, linewidths=0)


main = functools.partial(command.main, "toy", procedure, DEFAULTS, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
