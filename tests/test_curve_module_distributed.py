"""Curve on two ranks, one spawn for all checks; what they saved is loaded here by one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import losssurf_fast as lsf


class Net(nn.Module):
    """Rows that two ranks share unevenly (5), or not at all (1), tied and frozen weights, buffers.

    With a scalar and a parameter of no rows, which FSDP2 does not take.
    """

    def __init__(self, for_fsdp=False):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.middle, self.last = nn.Linear(5, 1), nn.Linear(1, 5)
        self.tied = nn.Linear(5, 1)
        self.tied.weight = self.middle.weight
        self.empty = nn.Parameter(torch.randn(1 if for_fsdp else 0, 3))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.scale = nn.Parameter(torch.randn(1) if for_fsdp else torch.randn(()))

    def forward(self, x):
        x = self.last(self.middle(self.norm(self.first(x)).tanh())) * self.scale + self.frozen
        return self.tied(x) + self.empty.sum()


def network(for_fsdp=False, **kwargs):
    torch.manual_seed(3)
    models = [Net(for_fsdp).double() for _ in range(2)]
    curve = lsf.Curve(models, **kwargs).eval()
    with torch.no_grad():
        for p in curve.bends[1].parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return curve


def batch():
    torch.manual_seed(11)
    return torch.randn(6, 4, dtype=torch.float64)


def here(x, rank):
    return x.chunk(2)[rank]


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_gradients(actual, expected):
    named = dict(expected.named_parameters())
    assert [*dict(actual.named_parameters())] == [*named]
    for name, p in actual.named_parameters():
        assert (p.grad is None) == (named[name].grad is None), name
        if p.grad is not None:
            assert type(p.grad) is type(p.data) and whole(p.grad).shape == named[name].shape
            torch.testing.assert_close(whole(p.grad), named[name].grad, msg=lambda m, name=name: f"{name}: {m}")


def all_ranks(t):
    found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(found, t.detach())
    return found


def one_t_for_all(rank):
    torch.manual_seed(rank)
    curve, x = network(), batch()
    torch.manual_seed(rank)
    first = torch.rand(())  # what this rank draws
    torch.manual_seed(rank)
    curve(x)
    a, b = all_ranks(curve.last_t)
    assert a == b and (a == first) == (rank == 0)
    stratified = network(t_per_rank="stratified")
    seen = []
    for _ in range(50):
        stratified(x)
        a, b = all_ranks(stratified.last_t)
        torch.testing.assert_close((a + 0.5) % 1, b)
        assert 0 <= b < 1
        seen.append(b)
    assert min(seen) < 0.2 and max(seen) > 0.8
    if rank == 0:  # a given t needs nobody else
        curve(x, t=0.3), curve.weights(0.2), curve.module_at(0.7), curve.l2(0.1), stratified(x, t=0.4)
        with curve.at(0.5) as module:
            module(x)
    torch._dynamo.reset()
    compiled = torch.compile(stratified, backend="aot_eager", fullgraph=True)
    torch.manual_seed(5)
    stratified(x)
    expected = stratified.last_t
    torch.manual_seed(5)
    compiled(x)
    torch.testing.assert_close(stratified.last_t, expected)


def ddp(rank):
    expected, curve, x = network(), network(), batch()
    wrapped = DistributedDataParallel(curve)
    for step in range(2):
        torch.manual_seed(step)  # rank 0's draw is that of one process
        t = torch.rand(())
        torch.manual_seed(step if rank == 0 else 99)
        expected.zero_grad(), wrapped.zero_grad()
        expected(x, t=t).square().mean().backward()
        wrapped(here(x, rank)).square().mean().backward()
        assert_gradients(curve, expected)
        with torch.no_grad():
            for c in (expected, curve):
                for p in c.parameters():
                    p.sub_(p.grad, alpha=0.1) if p.grad is not None else None
    for weight in (wrapped(here(x, rank), t=0.3).square().mean() + 0.01 * curve.l2(),):
        expected.zero_grad(), wrapped.zero_grad()
        weight.backward()
        (expected(x, t=0.3).square().mean() + 0.01 * expected.l2()).backward()
        assert_gradients(curve, expected)
    polychain = DistributedDataParallel(network(kind="polychain", num_bends=5))
    for t in (0.1, 0.9):  # bends whose coefficient is 0 are no unused parameters
        polychain(x, t=t).sum().backward()
    reentrant = network()
    plain = reentrant.module.forward
    reentrant.module.forward = lambda x: checkpoint(plain, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="needs use_reentrant=False over ranks"):
        reentrant(x.requires_grad_(), t=0.3).sum().backward()


def fsdp(rank):
    """The whole curve as FSDP2 takes any module."""
    expected, curve, x = network(for_fsdp=True), network(for_fsdp=True), batch()
    fully_shard(curve)
    assert isinstance(curve, FSDPModule) and curve.bends[1].first.weight._local_tensor.shape == (3 - rank, 4)
    optimizers = [torch.optim.SGD([p for p in c.parameters() if p.requires_grad], lr=0.1) for c in (curve, expected)]
    for step in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (curve(here(x, rank), t=0.3 + 0.1 * step).square().mean() + 0.01 * curve.l2()).backward()
        (expected(x, t=0.3 + 0.1 * step).square().mean() + 0.01 * expected.l2()).backward()
        assert_gradients(curve, expected)
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        for t in (0.0, 0.4):  # evaluation, after which the root's parameters stay gathered
            torch.testing.assert_close(curve(x, t=t), expected(x, t=t))
            with curve.at(t) as module:
                torch.testing.assert_close(module(x), expected(x, t=t))
    for name, w in curve.weights(0.6).items():
        torch.testing.assert_close(whole(w), expected.weights(0.6)[name])
    torch.testing.assert_close(whole(curve.l2(0.2)), expected.l2(0.2))
    assert torch.equal(curve.module_at(0.2)(x), expected.module_at(0.2)(x))
    return curve


def sharded(rank, folder):
    """Bends combined where they lie, one network gathered."""
    expected, x = network(), batch()
    curve = network().shard_()
    assert all(isinstance(p, DTensor) for p in curve.parameters())
    assert [p.requires_grad for p in curve.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert curve.bends[1].first.weight._local_tensor.shape == (3 - rank, 4)
    assert curve.bends[1].middle.weight._local_tensor.shape == (1 - rank, 5)
    optimizers = [torch.optim.AdamW([p for p in c.parameters() if p.requires_grad], lr=0.1) for c in (curve, expected)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.manual_seed(step if rank == 0 else 77)
        loss = curve(here(x, rank)).square().mean() + 0.01 * curve.l2()
        loss.backward()
        assert len({t.item() for t in all_ranks(curve.last_t)}) == 1
        (expected(x, t=curve.last_t).square().mean() + 0.01 * expected.l2()).backward()
        assert_gradients(curve, expected)
        norms = [torch.nn.utils.clip_grad_norm_(c.parameters(), 0.5) for c in (curve, expected)]
        torch.testing.assert_close(whole(norms[0]), norms[1])
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(curve.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(p.data), q.data)
    with torch.no_grad():
        torch.testing.assert_close(curve(x, t=0.0), expected(x, t=0.0))
        torch.testing.assert_close(curve(x, t=0.2 if rank == 0 else 0.8), expected(x, t=0.2))  # the first rank's t
    model = curve.module_at(0.4)
    torch.testing.assert_close(model(x), expected.module_at(0.4)(x))
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    with pytest.raises(NotImplementedError, match="Curve: sharded bends give no gradient to t"):
        curve(x, t=torch.tensor(0.3, requires_grad=True))
    with pytest.raises(ValueError, match="Curve.shard_: the bends are sharded already"):
        curve.shard_()
    dcp.save({"curve": curve.state_dict(), "optimizer": optimizers[0].state_dict()}, checkpoint_id=f"{folder}/dcp")
    other = network(num_bends=3).shard_(init_device_mesh("cpu", (2,)))
    state = {"curve": other.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    other.load_state_dict(state["curve"])
    assert torch.equal(other(x, t=0.3), curve(x, t=0.3))
    if rank == 0:
        torch.save(expected.state_dict(), f"{folder}/expected.pt")
    clone = copy.deepcopy(curve)
    assert torch.equal(clone(x, t=0.3), curve(x, t=0.3))
    halves = network().to(torch.bfloat16).shard_()
    halves(x.bfloat16(), t=0.3).sum().backward()
    assert halves.bends[1].first.weight.grad.dtype == torch.bfloat16


def sharded_compiled(rank):
    expected, curve, x = network(), network().shard_(), batch()
    torch._dynamo.reset()
    compiled = torch.compile(curve, backend="aot_eager", fullgraph=True)
    for t in (torch.tensor(0.3), torch.tensor(0.8)):
        curve.zero_grad(), expected.zero_grad()
        compiled(here(x, rank), t=t).square().mean().backward()
        expected(x, t=t).square().mean().backward()
        assert_gradients(curve, expected)


def refusals(rank):
    stratified = network(t_per_rank="stratified")
    with pytest.raises(ValueError, match="Curve.shard_: sharded bends need t_per_rank='same', got 'stratified'"):
        stratified.shard_()
    sharded = network().shard_()
    sharded.t_per_rank = "stratified"
    with pytest.raises(ValueError, match="Curve: sharded bends need t_per_rank='same', got 'stratified'"):
        sharded(batch())
    gathered = fully_shard(network(for_fsdp=True, t_per_rank="stratified"))
    expected = network(for_fsdp=True)
    for name, w in gathered.weights(0.3).items():
        assert torch.equal(w, expected.weights(0.3)[name])
    gathered(batch()).sum().backward()
    a, b = all_ranks(gathered.last_t)
    assert a != b
    with pytest.raises(NotImplementedError, match="mesh must have one dimension, got 2"):
        network().shard_(init_device_mesh("cpu", (1, 2)))
    columns, mesh = network(for_fsdp=True), init_device_mesh("cpu", (2,))
    for tree in columns.bends:
        w = tree.first.weight
        tree.first.weight = nn.Parameter(distribute_tensor(w.data, mesh, [Shard(1)]), w.requires_grad)
        for module in tree.modules():
            for leaf, p in module._parameters.items():
                if not isinstance(p, DTensor):
                    module._parameters[leaf] = nn.Parameter(
                        distribute_tensor(p.data, mesh, [Shard(0)]), p.requires_grad
                    )
    with pytest.raises(NotImplementedError, match=r"bends must be placed as \(Shard\(dim=0\),\) on one mesh"):
        columns(batch(), t=0.3)


def ends(rank):
    """Sharded networks as end points."""
    torch.manual_seed(0)
    plain = [nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)) for _ in range(2)]
    shards = copy.deepcopy(plain)
    for model in shards:
        fully_shard(model[0]), fully_shard(model)
    with pytest.raises(ValueError, match="Curve: 0.weight is sharded; give the whole module as model="):
        lsf.Curve(shards)
    expected = lsf.Curve(plain)
    for models in (shards, [model.state_dict() for model in shards]):
        curve = lsf.Curve(models, model=nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))
        for name, value in expected.state_dict().items():
            assert torch.equal(curve.state_dict()[name], value), name
    x = torch.randn(3, 4)
    F.mse_loss(shards[0](x), plain[0](x)).backward()  # they go on working


def rank_main(rank, folder):
    for check in (one_t_for_all, ddp, fsdp, sharded_compiled, refusals, ends):
        check(rank)
    sharded(rank, folder)
    curve = fsdp(rank)
    dcp.save({"curve": curve.state_dict()}, checkpoint_id=f"{folder}/fsdp")
    state = {f"bends.{n}": whole(p.detach()) for n, p in curve.bends.named_parameters()}
    if rank == 0:
        torch.save(state, f"{folder}/fsdp.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")
    run_ranks(rank_main, str(folder))
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_ranks_save_and_one_process_loads(folder):
    assert not dist.is_initialized()
    expected = torch.load(folder / "expected.pt", weights_only=True)
    curve = network()
    state = {"curve": curve.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp")
    curve.load_state_dict(state["curve"])
    torch.testing.assert_close(dict(curve.state_dict()), dict(expected))
    curve = network(for_fsdp=True)
    state = {"curve": curve.state_dict()}
    dcp.load(state, checkpoint_id=folder / "fsdp")
    for name, value in torch.load(folder / "fsdp.pt", weights_only=True).items():
        assert torch.equal(state["curve"][name], value)


def test_sharding_needs_ranks():
    with pytest.raises(ValueError, match="Curve.shard_: torch.distributed must be initialised"):
        network().shard_()
