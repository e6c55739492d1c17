"""Several ranks: each reads its share of the data, one keeps the file; sharded models are refused."""

import numpy as np
import pytest
import torch
from distributed import run_ranks
from surface_models import Classifier, classifier_loaders, state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import losssurf_fast as lsf


def shares(rank):
    return {name: batches[rank::2] for name, batches in classifier_loaders().items()}


def plane():
    return lsf.Plane.through(Classifier(1), Classifier(2), Classifier(3))


class Interrupted(Exception):
    pass


class CutOff(list):
    """Batches that can be read a few times."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        if self.reads > 6:
            raise Interrupted
        return super().__iter__()


def _ranks(rank, folder):
    model, path = Classifier(4), f"{folder}/plane.npz"
    before = state(model)
    kwargs = {"points": 3, "progress": False}
    alone = plane().evaluate(model, classifier_loaders(), process_group=False, **kwargs)
    found = plane().evaluate(model, shares(rank), **kwargs)
    for name, values in alone.values.items():
        np.testing.assert_allclose(found.values[name], values, rtol=2e-5)

    cut = {name: CutOff(batches) for name, batches in shares(rank).items()}
    with pytest.raises((Interrupted, RuntimeError), match="other ranks failed|^$"):
        plane().evaluate(model, cut, path=path, **kwargs)
    assert state(model) == before
    again = plane().evaluate(model, shares(rank), path=path, **kwargs)
    assert all(np.array_equal(again.values[name], values) for name, values in found.values.items())
    error = ValueError if rank == 0 else RuntimeError
    with pytest.raises(error, match="differs in grid" if rank == 0 else "1 other ranks failed"):
        plane().evaluate(model, shares(rank), path=path, points=4, progress=False)

    mesh = init_device_mesh("cpu", (2,))
    sharded = Classifier(4)
    sharded.scale = torch.nn.Parameter(torch.ones(2))  # FSDP2 takes no scalars
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(NotImplementedError, match=r"Plane\.evaluate: model is sharded"):
        plane().evaluate(sharded, shares(rank), **kwargs)
    shards = dict(sharded.named_parameters())
    with pytest.raises(NotImplementedError, match=r"Plane\.through: w1: .* is sharded; .*full_tensor"):
        lsf.Plane.through(shards, shards, shards)


def test_ranks_share_the_data_and_the_file(tmp_path):
    run_ranks(_ranks, str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["plane.npz"]
    assert lsf.Surface.load(tmp_path / "plane.npz").done.all()
