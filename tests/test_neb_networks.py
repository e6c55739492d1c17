"""AutoNEB between small networks, which it leaves alone: BatchNorm, tied and frozen weights, ranks, torch.compile."""

import copy

import pytest
import torch
from distributed import run_ranks
from neb_models import F64, LOADER, SHORT, Valley, assert_untouched, bits, minima, run
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf


class Digits(nn.Sequential):
    """A perceptron with BatchNorm."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


@pytest.fixture(scope="module")
def digits():
    from losssurf_fast.demo.data import load

    data = load("digits", None)
    loader = [(data.train_x[i : i + 128], data.train_y[i : i + 128]) for i in range(0, 1280, 128)]
    nets = [Digits(0), Digits(1)]
    for net in nets:
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(15):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
    return nets, loader


class Wrapped(Digits):
    def forward(self, x):
        return {"logits": super().forward(x)}


def test_outputs_with_logits(digits):
    nets, loader = digits
    cycles = [{"steps": 2, "lr": 0.1, "subsample": 0}]
    curve, _ = run(*nets, cycles, loader, F.cross_entropy, Digits(2))
    _, report = run(*nets, cycles, loader, F.cross_entropy, Wrapped(2))
    assert report.points == curve.report.points and "error" in report.points


def test_networks_with_batch_norm(digits):
    (a, b), loader = digits
    model = copy.deepcopy(a).eval()
    before = bits(model)
    cycles = [{"steps": 40, "lr": 0.1, "subsample": 4}, {"insert": "highest", "count": 2}]
    curve, report = run(a, b.state_dict(), cycles, loader, F.cross_entropy, model)
    assert_untouched(model, before)
    line = lsf.evaluate_curve(lsf.Curve([a, b], kind="polychain", num_bends=2), {"train": loader}, num_points=11)
    barrier = line["train"]["loss"].max
    assert barrier > 0.3 and report.saddle < barrier / 5
    assert report.points["error"][0] < 0.01
    # the same again from the curve: statistics set anew at every point, distances over parameters
    again = lsf.evaluate_curve(curve, {"train": loader}, num_points=len(report.points["t"]))
    torch.testing.assert_close(torch.tensor(report.points["loss"]), torch.tensor(again["train"]["loss"].values).float())
    assert report.length == pytest.approx(again.length, rel=1e-5)
    for source, bend in ((a, curve.bends[0]), (b, curve.bends[-1])):
        assert all(torch.equal(p, dict(bend.named_parameters())[name]) for name, p in source.named_parameters())
    for name, buffer in a.named_buffers():
        assert torch.equal(buffer, dict(curve.module.named_buffers())[name])


class Broken(Exception):
    pass


def fail_after(calls):
    def loss_fn(outputs, targets):
        calls[0] -= 1
        if calls[0] < 0:
            raise Broken
        return F.cross_entropy(outputs, targets)

    return loss_fn


def test_the_model_is_untouched_whatever_raises(digits):
    (a, b), loader = digits
    model = copy.deepcopy(a)
    model[0].eval()
    next(model.parameters()).grad = torch.ones_like(model[0].weight)
    before = bits(model)
    for calls in (0, 3, 20):  # at the first loss, in a step, when the band is measured
        with pytest.raises(Broken):
            run(a, b, SHORT, loader[:1], fail_after([calls]), model)
        assert_untouched(model, before)

    def after_cycle(curve):
        assert_untouched(model, before)
        raise Broken

    with pytest.raises(Broken):
        run(a, b, SHORT, loader[:1], F.cross_entropy, model, after_cycle=after_cycle)
    assert_untouched(model, before)


def test_the_model_may_be_one_of_the_ends(digits):
    (a, b), loader = digits
    before = bits(b)
    wanted, _ = run(a, b, SHORT, loader, F.cross_entropy, copy.deepcopy(b))
    curve, _ = run(a, b, SHORT, loader, F.cross_entropy, b)
    assert_untouched(b, before)
    assert all(torch.equal(p, q) for p, q in zip(curve.parameters(), wanted.parameters(), strict=True))


def test_tied_frozen_and_half_precision_parameters():
    def network(seed, value=1.0):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)).to(torch.bfloat16)
        net[2].weight = net[0].weight
        net[3].weight.requires_grad_(False).fill_(value)
        return net

    loader = [(torch.randn(8, 4).bfloat16(), torch.arange(8) % 2)]
    loss_fn = lambda outputs, targets: F.cross_entropy(outputs.float(), targets)
    a, b = network(0), network(1)
    curve, report = run(a, b, SHORT, loader, loss_fn, network(2))
    assert len(dict(curve.bends[0].named_parameters())) == 5
    for bend in curve.bends:
        named = dict(bend.named_parameters())
        assert named["3.weight"].eq(1.0).all() and not named["3.weight"].requires_grad
        assert all(p.dtype == torch.bfloat16 for p in named.values())
    for source, bend in ((a, curve.bends[0]), (b, curve.bends[-1])):
        assert all(torch.equal(p, dict(bend.named_parameters())[name]) for name, p in source.named_parameters())
    trainable = [n for n, p in a.named_parameters() if p.requires_grad]
    gaps = [dict(b.named_parameters())[n].double() - dict(a.named_parameters())[n].double() for n in trainable]
    assert report.length >= torch.cat([g.flatten() for g in gaps]).norm().item() * (1 - 1e-6)
    with pytest.raises(ValueError, match=r"auto_neb: 3.weight requires no gradient and must be equal in start and end"):
        run(a, network(1, 2.0), SHORT, loader, loss_fn, network(2))


def test_parameters_that_the_loss_does_not_use_stay_on_the_line():
    class Unused(Valley):
        def __init__(self, x, y, z):
            super().__init__(x, y)
            self.z = nn.Parameter(torch.tensor([z], dtype=F64))

    curve, _ = run(Unused(-1, 0, 0.0), Unused(1, 0, 0.0), model=Unused(0, 0, 7.0))
    assert all(bend.z.item() == 0 for bend in curve.bends)


def test_dicts_and_generators_of_batches():
    class Named(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.layer = nn.Linear(3, 2)

        def forward(self, values):
            return self.layer(values)

    batch = {"values": torch.randn(8, 3), "labels": torch.arange(8) % 2}
    pairs = [(batch["values"], batch["labels"])]
    by_dict = run(Named(0), Named(1), SHORT, [batch], F.cross_entropy, Named(2))
    by_pair = run(Named(0), Named(1), SHORT, pairs, F.cross_entropy, Named(2))
    assert by_dict[1] == by_pair[1]
    with pytest.raises(ValueError, match="auto_neb: loader is read once for every cycle, got a list_iterator"):
        run(*minima(), loader=iter(LOADER))


def regression(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def regression_data():
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randn(8, n, generator=generator, dtype=F64) for n in (3, 1)) for _ in range(3)]


def on_a_rank(rank, path):
    loader = [(x[rank::2], y[rank::2]) for x, y in regression_data()]
    curve, report = run(regression(0), regression(1), SHORT, loader, F.mse_loss, regression(2))
    torch.save([curve.state_dict(), report.points["loss"]], f"{path}/{rank}.pt")


def test_ranks_share_the_data(tmp_path):
    run_ranks(on_a_rank, str(tmp_path))
    curve, report = run(regression(0), regression(1), SHORT, regression_data(), F.mse_loss, regression(2))
    for rank in range(2):
        state, losses = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(state, curve.state_dict())
        assert losses == pytest.approx(report.points["loss"])


def test_a_compiled_model_runs_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    ends = [regression(0), regression(1)]
    wanted, _ = run(*ends, SHORT, regression_data(), F.mse_loss, regression(2))
    compiled = torch.compile(regression(2), backend=backend)
    before = bits(compiled)
    found, _ = run(torch.compile(ends[0]), ends[1], SHORT, regression_data(), F.mse_loss, compiled)
    torch.testing.assert_close(found.state_dict(), wanted.state_dict())
    assert_untouched(compiled, before)
    assert graphs
