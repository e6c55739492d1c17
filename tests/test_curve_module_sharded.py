"""Curve whose bends are sharded over two ranks, against one process; what they saved is loaded here by one."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from curve_ranks import all_ranks, assert_gradients, batch, here, network, whole
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import losssurf_fast as lsf
from losssurf_fast.curve import sharding


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


def compiled(rank):
    expected, curve, x = network(), network().shard_(), batch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "LOSES_COMPILED_GRADIENTS", True)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"under torch.compile need torch 2.13"):  # Dynamo may wrap it
            torch.compile(curve, backend="aot_eager", fullgraph=True)(here(x, rank), t=torch.tensor(0.3))
    if sharding.LOSES_COMPILED_GRADIENTS:
        return
    torch._dynamo.reset()
    compiled = torch.compile(curve, backend="aot_eager", fullgraph=True)
    for t in (torch.tensor(0.3), torch.tensor(0.8)):
        curve.zero_grad(), expected.zero_grad()
        compiled(here(x, rank), t=t).square().mean().backward()
        expected(x, t=t).square().mean().backward()
        assert_gradients(curve, expected)


def collectives_of_a_step(rank, shard):
    """One gather: of one network where bends are combined as they lie, of all bends under FSDP2."""
    curve = network(for_fsdp=True)
    of_network = sum(p.numel() for p in curve.bends[0].parameters())
    shard(curve)
    gathered, gather = [], sharding._all_gather
    with CommDebugMode() as mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_all_gather", lambda t, *args: gathered.append(2 * t.numel()) or gather(t, *args))
        (curve(here(batch(), rank)).square().mean() + curve.l2()).backward()
    counts = {str(op): count for op, count in mode.get_comm_counts().items() if "broadcast" not in str(op)}  # of t
    assert sorted(counts.values()) == [1, 1] and ["gather" in op for op in sorted(counts)] == [True, False], counts
    assert any("reduce_scatter" in op for op in counts), counts
    if not isinstance(curve, FSDPModule):
        assert len(gathered) == 1 and of_network <= gathered[0] < 1.5 * of_network  # rows are padded


def channels_last(rank):
    expected, curve = (lsf.Curve(convolutions()) for _ in range(2))
    curve.shard_()
    torch.manual_seed(5)
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    curve(here(x, rank), t=0.3).square().mean().backward()
    expected(x, t=0.3).square().mean().backward()
    assert_gradients(curve, expected)
    with torch.no_grad():
        torch.testing.assert_close(curve(x, t=0.6), expected(x, t=0.6))


def convolutions():
    torch.manual_seed(4)
    return [nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last) for _ in range(2)]


def refusals(rank):
    stratified = network(t_per_rank="stratified")
    with pytest.raises(ValueError, match="Curve.shard_: sharded bends need t_per_rank='same', got 'stratified'"):
        stratified.shard_()
    sharded = network().shard_()
    sharded.t_per_rank = "stratified"
    with pytest.raises(ValueError, match="Curve: sharded bends need t_per_rank='same', got 'stratified'"):
        sharded(batch())
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


def rank_main(rank, folder):
    sharded(rank, folder)
    compiled(rank)
    collectives_of_a_step(rank, lambda curve: curve.shard_())
    collectives_of_a_step(rank, fully_shard)
    channels_last(rank)
    refusals(rank)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_ranks_save_and_one_process_loads(tmp_path):
    run_ranks(rank_main, str(tmp_path))
    assert not dist.is_initialized()
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    curve = network()
    state = {"curve": curve.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    curve.load_state_dict(state["curve"])
    torch.testing.assert_close(dict(curve.state_dict()), dict(expected))


def test_sharding_needs_ranks():
    with pytest.raises(ValueError, match="Curve.shard_: torch.distributed must be initialised"):
        network().shard_()
