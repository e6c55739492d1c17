"""Curve on two ranks: one t for all, DistributedDataParallel, FSDP2, sharded end points; one spawn for all checks."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from curve_ranks import all_ranks, assert_gradients, batch, here, network, whole
from distributed import run_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import losssurf_fast as lsf


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


def fsdp_stratified(rank):
    gathered = fully_shard(network(for_fsdp=True, t_per_rank="stratified"))
    expected = network(for_fsdp=True)
    for name, w in gathered.weights(0.3).items():
        assert torch.equal(w, expected.weights(0.3)[name])
    gathered(batch()).sum().backward()
    a, b = all_ranks(gathered.last_t)
    assert a != b


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
    for check in (one_t_for_all, ddp, fsdp_stratified, ends):
        check(rank)
    curve = fsdp(rank)
    dcp.save({"curve": curve.state_dict()}, checkpoint_id=f"{folder}/fsdp")
    state = {f"bends.{n}": whole(p.detach()) for n, p in curve.bends.named_parameters()}
    if rank == 0:
        torch.save(state, f"{folder}/fsdp.pt")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_ranks_save_and_one_process_loads(tmp_path):
    run_ranks(rank_main, str(tmp_path))
    assert not dist.is_initialized()
    curve = network(for_fsdp=True)
    state = {"curve": curve.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "fsdp")
    for name, value in torch.load(tmp_path / "fsdp.pt", weights_only=True).items():
        assert torch.equal(state["curve"][name], value)
