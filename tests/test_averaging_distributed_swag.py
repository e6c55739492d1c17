"""SWAG and update_bn on two gloo ranks: sharded = whole, bit for bit."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import losssurf_fast as lsf
from losssurf_fast.averaging.mesh import zeros_beside
from losssurf_fast.averaging.tensors import local, part_of


class Net(nn.Module):
    """On two ranks: an uneven shard, an empty one, and one along the second dimension."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 3))
        self.first = nn.Linear(3, 5)
        self.bn = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 4)
        self.wide = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.wide(self.second(self.bn(self.first(x + self.token))).repeat(1, 2)[:, :6])


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    placement = lambda p: Shard(1) if p.shape == (4, 6) else Shard(0)
    for part in (model.second, model):
        fully_shard(part, mesh=mesh, shard_placement_fn=placement)
    return model


@torch.no_grad()
def copy_weights(whole, sharded):
    for name, p in sharded.named_parameters():
        p.to_local().copy_(
            distribute_tensor(dict(whole.named_parameters())[name], p.device_mesh, p.placements).to_local()
        )


@torch.no_grad()
def history(whole, swag, sharded=None, sharded_swag=None):
    """Five models, the same in every process."""
    for step in range(5):
        for p in whole.parameters():
            p.add_(0.1 * torch.randn_like(p))
        whole.bn.running_mean.add_(1)
        swag.collect_model(whole)
        if sharded is not None:
            copy_weights(whole, sharded)
            sharded.bn.running_mean.add_(1)
            if step == 3:
                sharded.eval()(torch.ones(2, 3))  # leaves the root's parameters unsharded
            sharded_swag.collect_model(sharded)


def assert_same(sharded, whole):
    assert sharded.keys() == whole.keys()
    for name, t in sharded.items():
        full = t.full_tensor() if hasattr(t, "full_tensor") else t
        assert full.shape == t.shape and torch.equal(full, whole[name]), name


def make(dtype=torch.float32):
    torch.manual_seed(0)
    whole = Net().to(dtype)
    return whole, lsf.SWAG(whole, max_num_models=3, deviations_dtype=torch.bfloat16)


def swag_ranks(rank, folder):
    whole, swag = make()
    model = shard(copy.deepcopy(whole))
    sharded = lsf.SWAG(model, max_num_models=3, deviations_dtype=torch.bfloat16)
    history(whole, swag, model, sharded)
    for p in model.parameters():  # as if offloaded: the parts stay where they are
        here = torch.empty(2, *p.to_local().shape, device="meta")
        assert local(part_of(p, here, (2,))) is here
        assert local(zeros_beside(p, (2,), torch.float64, "meta")).is_meta
    assert_same(sharded.state_dict(), swag.state_dict())
    assert_same(sharded.averages(), swag.averages())
    assert_same(sharded.to_swa_gaussian(), swag.to_swa_gaussian())

    for options in ({"seed": 3}, {"seed": 4, "block": True}, {"seed": 3, "cov": False, "sample": 2}, {"scale": 0.0}):
        assert_same(sharded.sample(into=model, **options), swag.sample(**options))
        assert_same(dict(model.named_parameters()), dict(swag.module.named_parameters()))
    assert_same(sharded.samples(2, seed=3), swag.samples(2, seed=3))
    torch.manual_seed(rank)
    drawn = sharded.samples(1)
    torch.manual_seed(0)
    assert_same(drawn, swag.samples(1))
    for block in (False, True):
        torch.testing.assert_close(sharded.log_prob(model, block=block), swag.log_prob(block=block), rtol=1e-10, atol=0)
        torch.testing.assert_close(sharded.logdet(block=block), swag.logdet(block=block), rtol=1e-10, atol=0)

    before = {k: v.clone() for k, v in sharded.state_dict().items()}
    if rank == 1:
        model.first.weight.to_local().data.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN or inf in " + ("first.weight" if rank else "other ranks")):
        sharded.collect_model(model, check_finite=True)
    with pytest.raises(ValueError, match="must be a DTensor"):
        sharded.collect_model(whole)
    with pytest.raises(ValueError, match="must be a DTensor"):
        sharded.load_state_dict(swag.state_dict())
    with pytest.raises(RuntimeError, match="sample.into=model."):
        sharded.sample(seed=1)
    with pytest.raises(RuntimeError, match="sample.into=model."):
        sharded(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="sample.into=model."):
        sharded.predict(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="a sharded SWAG holds no model"):
        lsf.update_bn([torch.randn(2, 3)], sharded)
    with pytest.raises(ValueError, match="device must be None"):
        lsf.SWAG(model, device="cpu")
    with pytest.raises(NotImplementedError, match="sharded"):
        lsf.SWAG.from_swa_gaussian(swag.to_swa_gaussian(), model)
    unchanged = {k: torch.equal(local(v), local(before[k])) for k, v in sharded.state_dict().items()}
    assert all(unchanged.values()), unchanged

    dcp.save({"swag": sharded}, checkpoint_id=folder)
    again = lsf.SWAG(model, max_num_models=3, deviations_dtype=torch.bfloat16)
    dcp.load({"swag": again}, checkpoint_id=folder)
    assert again.n_models == 5
    assert_same(again.state_dict(), swag.state_dict())


def share(rank, data):
    """Unequal numbers of batches, of unequal sizes."""
    return list(data[:20].split(8)) if rank == 0 else list(data[20:].split(17))


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}


def update_bn_ranks(rank):
    torch.manual_seed(0)
    data, model = torch.randn(37, 3) * 3 + 1, nn.Sequential()
    model.add_module("bn", nn.BatchNorm1d(3))
    expected = {"mean": data.double().mean(0), "var": data.double().var(0)}

    def check(batches):
        torch.testing.assert_close(model.bn.running_mean.double(), expected["mean"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(model.bn.running_var.double(), expected["var"], rtol=1e-6, atol=0)
        assert int(model.bn.num_batches_tracked) == batches
        both = [torch.zeros(6) for _ in range(2)]
        dist.all_gather(both, torch.cat([model.bn.running_mean, model.bn.running_var]))
        assert torch.equal(*both)

    lsf.update_bn(share(rank, data), model)
    check(4)
    ddp = DistributedDataParallel(model)
    lsf.update_bn(list(data.split(8)) if rank == 0 else [], ddp)  # DDP's forward would broadcast buffers, and hang
    check(5)
    lsf.update_bn(data.split(8), model, process_group=False)
    check(5)
    before = statistics(model)
    with pytest.raises(ValueError, match="at least one batch"):
        lsf.update_bn([], model)
    with pytest.raises(
        ValueError if rank else RuntimeError, match="at least 2 values" if rank else "1 other ranks failed"
    ):
        lsf.update_bn([data[:1]] if rank else [data], model)
    assert all(torch.equal(v, before[k]) for k, v in statistics(model).items())

    torch.manual_seed(0)
    whole = Net()
    sharded = shard(copy.deepcopy(whole))
    halves = data[:36].chunk(2)
    lsf.update_bn(halves[rank].split(9), sharded)
    lsf.update_bn(torch.cat(halves).split(9), whole, process_group=False)
    for key, value in statistics(sharded).items():
        torch.testing.assert_close(value, statistics(whole)[key])

    swag = lsf.SWAG(whole)
    for _ in range(3):
        nn.init.normal_(whole.token)
        swag.collect_model(whole)
    by_ddp = lsf.SWAG(DistributedDataParallel(whole))
    by_ddp.collect_model(DistributedDataParallel(whole))
    assert by_ddp.state_dict().keys() == swag.state_dict().keys()
    torch.manual_seed(rank)
    probs = swag.predict(data, 3, bn_loader=halves[rank].split(9))  # one seed, drawn on rank 0
    both = [torch.zeros_like(probs) for _ in range(2)]
    dist.all_gather(both, probs)
    assert torch.equal(*both)
    data = [torch.randn(2, 3), torch.randn(2, 3 + rank)]  # a forward that fails on one rank alone
    wanted = (RuntimeError, "shapes cannot|must match") if rank else (RuntimeError, "predict: 1 other ranks failed")
    with pytest.raises(wanted[0], match=wanted[1]):
        swag.predict(data, 3, bn_loader=halves[rank].split(9))


def failing_ranks(rank):
    """What one rank cannot do is raised on both, which go on together."""
    x, model = torch.randn(8, 3), Net()
    fge = lsf.FGE(model)
    for _ in range(2):
        fge.collect_model()

    def fails(error, message, call):
        error, message = (error, message) if rank else (RuntimeError, "1 other ranks failed")
        with pytest.raises(error, match=message):
            call()

    swag, once = lsf.SWAG(model), iter([x])  # which has no length
    swag.collect_model(model)
    fails(TypeError, "needs a loader with a length", lambda: lsf.update_bn(once if rank else [x], model, subset=0.5))
    fails(ValueError, "bn_loader is read once", lambda: swag.predict(x, 2, bn_loader=once if rank else [x]))
    fails(ValueError, "num_samples must be", lambda: swag.predict(x, 2 - 2 * rank, bn_loader=[x]))
    fails(ValueError, "scale must be", lambda: swag.predict(x, 2, scale=-1.0 * rank, bn_loader=[x]))
    assert swag.predict(x, 2, bn_loader=[x]).shape == (8, 4)
    fails(RuntimeError, "must match", lambda: fge.predict(x[:, : 3 - rank], bn_loader=[x]))
    assert fge.predict(x, bn_loader=[x]).shape == (8, 4)


def ranks(rank, folder):
    swag_ranks(rank, folder)
    update_bn_ranks(rank)
    failing_ranks(rank)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_swag_and_update_bn_on_two_ranks(tmp_path):
    """One pair of processes, as starting them is most of the time; then the checkpoint of two is loaded on one."""
    run_ranks(ranks, str(tmp_path))
    whole, swag = make()
    history(whole, swag)
    _, loaded = make()
    state = {"swag": loaded.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    loaded.load_state_dict(state["swag"])
    assert loaded.n_models == 5
    assert_same(loaded.state_dict(), swag.state_dict())
    assert_same(loaded.samples(2, seed=1), swag.samples(2, seed=1))
