"""Checkpoints of dnn-mode-connectivity: read, written, and refused where they do not fit."""

import math

import pytest
import torch
from torch import nn

import losssurf_fast as lsf
from losssurf_fast.curve import from_mode_connectivity, to_mode_connectivity

SIZES = {"conv": (4, 3, 3), "bn": (4,), "downsample": (4, 3, 1), "fc": (2, 4)}


class Base(nn.Module):
    """A base network whose shortcut is in a Sequential, as in its PreResNet."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4)
        self.block = nn.Module()
        self.block.downsample = nn.Sequential(nn.Conv1d(3, 4, 1, bias=False))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc((self.bn(self.conv(x)).relu() + self.block.downsample(x)).mean(-1))


def checkpoint(num_bends=3, kind="bezier"):
    """What torch.save of a ``CurveNet`` with such layers holds, in its order."""
    torch.manual_seed(0)
    state = {}
    if kind == "bezier":
        binomials = [float(math.comb(num_bends - 1, j)) for j in range(num_bends)]
        state["coeff_layer.binom"] = torch.tensor(binomials)
    state["coeff_layer.range"] = torch.arange(0, float(num_bends))
    if kind == "bezier":
        state["coeff_layer.rev_range"] = torch.arange(float(num_bends - 1), -1, -1)
    layers = {"conv": ["weight"], "bn": ["weight", "bias"], "block.downsample": ["weight"], "fc": ["weight", "bias"]}
    for layer, parameters in layers.items():
        size = SIZES[layer.rpartition(".")[2]]
        for parameter in parameters:
            for j in range(num_bends):
                state[f"net.{layer}.{parameter}_{j}"] = torch.randn(size if parameter == "weight" else size[:1])
        if layer == "bn":
            state |= {"net.bn.running_mean": torch.randn(4), "net.bn.running_var": torch.rand(4) + 0.5}
            state["net.bn.num_batches_tracked"] = torch.tensor(7)
    return state


def peer(state, x, t, num_bends, kind):
    """Its network's output in evaluation mode, written out."""
    if kind == "bezier":
        c = [math.comb(num_bends - 1, j) * t**j * (1 - t) ** (num_bends - 1 - j) for j in range(num_bends)]
    else:
        c = [max(0, 1 - abs(t * (num_bends - 1) - j)) for j in range(num_bends)]
    w = lambda name: sum(cj * state[f"net.{name}_{j}"].double() for j, cj in enumerate(c))
    y = nn.functional.conv1d(x, w("conv.weight"), padding=1)
    mean, var = (state[f"net.bn.running_{n}"].double() for n in ("mean", "var"))
    y = nn.functional.batch_norm(y, mean, var, w("bn.weight"), w("bn.bias")).relu()
    y = (y + nn.functional.conv1d(x, w("block.downsample.weight"))).mean(-1)
    return nn.functional.linear(y, w("fc.weight"), w("fc.bias"))


@pytest.mark.parametrize("kind", ["bezier", "polychain"])
@pytest.mark.parametrize("num_bends", [2, 3, 5])
def test_outputs_are_the_peers(kind, num_bends):
    state = checkpoint(num_bends, kind)
    train = {"epoch": 3, "model_state": state, "optimizer_state": {"state": {}}}
    parallel = {f"module.{k}": v for k, v in state.items()}
    x = torch.randn(3, 3, 6, dtype=torch.float64)
    for loaded in (state, train, {"state_dict": state}, parallel):
        model = Base()
        curve = from_mode_connectivity(loaded, model, fix_end=False).eval()
        assert curve.kind == kind and curve.num_bends == num_bends
        assert not any(p.requires_grad for p in curve.bends[0].parameters())
        assert all(p.requires_grad for p in curve.bends[-1].parameters())
        assert curve.module.bn.num_batches_tracked == 7 and model.bn.num_batches_tracked == 0
        curve.double()
        for t in (0.0, 0.3, 1.0):
            torch.testing.assert_close(curve(x, t=t), peer(state, x, t, num_bends, kind))
    back = to_mode_connectivity(curve.float(), {"block.downsample.0": "block.downsample"})
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value) and back[name].dtype == value.dtype, name


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"classifier.1": (3, 2), "classifier.4": (3, 3), "classifier.6": (2, 3)}, ["fc1", "fc2", "fc3"]),
        (
            {f"conv_part.{i}": (3, 3) for i in (0, 3, 6)} | {f"fc_part.{i}": (3, 3) for i in (0, 2, 4)},
            ["conv1", "conv2", "conv3", "fc4", "fc5", "fc6"],
        ),
        ({"layer2.0.shortcut.0": (2, 2)}, ["layer2.0.shortcut"]),
        ({"fc1": (2, 2), "fc2": (3, 2)}, ["fc1", "fc2"]),
    ],
)
def test_names_of_its_architectures(ours, theirs):
    base = nn.Module()
    for name, size in ours.items():
        *path, leaf = name.split(".")
        owner = base
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        owner.add_module(leaf, nn.Linear(size[1], size[0]))
    state = {}
    for size, layer in zip(ours.values(), theirs, strict=True):
        for j in range(3):
            state[f"net.{layer}.weight_{j}"], state[f"net.{layer}.bias_{j}"] = torch.randn(size), torch.randn(size[0])
    weights = dict(from_mode_connectivity(state, base).bends[2].named_parameters())
    for name, layer in zip(ours, theirs, strict=True):
        assert torch.equal(weights[f"{name}.weight"], state[f"net.{layer}.weight_2"])
        assert torch.equal(weights[f"{name}.bias"], state[f"net.{layer}.bias_2"])


def test_names_of_ones_own():
    state = {f"net.head.weight_{j}": torch.randn(2, 3) for j in range(2)}
    state |= {f"net.head.bias_{j}": torch.randn(2) for j in range(2)}
    model = nn.Sequential(nn.Linear(3, 2))
    curve = from_mode_connectivity(state, model, names={"head": "0"}, kind="bezier")
    assert torch.equal(curve.bends[1].get_parameter("0.weight"), state["net.head.weight_1"]) and curve.kind == "bezier"
    assert from_mode_connectivity(state, model, names={"head": "0"}).kind == "polychain"


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


def test_refusals():
    state = checkpoint()
    bends = [k for k in state if k.startswith("net.") and k.endswith("_1")]
    wide = {**state, "net.fc.weight_1": torch.randn(2, 5)}
    start = lambda k: k[:-1] + "0" if k[-2:] in ("_1", "_2") else k
    same = {k: state[start(k)] for k in state}
    fits = "from_mode_connectivity: the checkpoint does not fit model: Curve: "
    for loaded, error, message in (
        ([state], TypeError, "from_mode_connectivity: checkpoint must be a state_dict, got list"),
        ("checkpoint.pt", TypeError, "checkpoint must be a state_dict, got str; torch.load it first"),
        (Base().state_dict(), ValueError, r"checkpoint must have net.<layer>.weight_0, _1 ..., got bends \[\]"),
        (without(state, *bends), ValueError, r"got bends \[0, 2\]"),
        (without(state, "net.fc.bias_1"), ValueError, fits + r"models\[1\] must have .* it lacks fc.bias"),
        (wide, ValueError, fits + r"models\[1\]: fc.weight must have shape \(2, 4\), got \(2, 5\)"),
        (
            {**state, "net.more.mean": torch.zeros(1)},
            ValueError,
            fits + r"models\[0\] must have .* it has more.mean",
        ),
        (same, ValueError, fits + "models must differ, got 3 with equal weights"),
    ):
        with pytest.raises(error, match=message):
            from_mode_connectivity(loaded, Base())
    with pytest.raises(TypeError, match="from_mode_connectivity: model must be a module, got dict"):
        from_mode_connectivity(state, {})
    with pytest.raises(ValueError, match="kind must be one of"):
        from_mode_connectivity(state, Base(), kind="line")
    with pytest.raises(TypeError, match="to_mode_connectivity: curve must be a Curve, got Base"):
        to_mode_connectivity(Base())


def test_written_checkpoint_is_read_again():
    torch.manual_seed(0)
    curve = lsf.Curve([Base(), Base()], num_bends=4, kind="polychain")
    again = from_mode_connectivity(to_mode_connectivity(curve), Base())
    for name, value in curve.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
