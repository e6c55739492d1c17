import pytest
import torch
from swag_models import walk
from torch import nn
from torch.utils.data import DataLoader

import losssurf_fast as lsf


class Classifier(nn.Sequential):
    def __init__(self, bn=False):
        super().__init__(nn.Linear(3, 6), *([nn.BatchNorm1d(6)] if bn else []), nn.Dropout(0.5), nn.Linear(6, 4))


def test_swag_predict_is_the_mean_of_softmax():
    model, x = Classifier(), torch.randn(7, 3)
    swag = lsf.SWAG(model)
    walk(model, 5, swag)
    wanted = []
    for s in range(6):
        swag.sample(scale=1.0, seed=2, sample=s, block=True)
        wanted.append(swag.eval()(x).softmax(-1))
    swag.train()
    got = swag.predict(x, 6, scale=1.0, seed=2, block=True)
    torch.testing.assert_close(got, torch.stack(wanted).mean(0))
    assert not got.requires_grad and all(m.training for m in swag.modules())
    pairs = [(x[:4], 0), (x[4:], 1)]
    torch.testing.assert_close(swag.predict(pairs, 6, scale=1.0, seed=2, block=True, device="cpu"), got)


def test_swag_predict_recalibrates_batch_norm_for_every_draw():
    model, x, train = Classifier(bn=True), torch.randn(7, 3), [(torch.randn(9, 3), 0), (torch.randn(5, 3), 0)]
    swag = lsf.SWAG(model)
    walk(model, 5, swag, size=0.3)
    wanted = []
    for s in range(4):
        swag.sample(seed=2, sample=s)
        lsf.update_bn(train, swag)
        wanted.append(swag.eval()(x).softmax(-1))
    got = swag.predict(x, 4, seed=2, bn_loader=train)
    torch.testing.assert_close(got, torch.stack(wanted).mean(0))
    assert not torch.allclose(got, swag.predict(x, 4, seed=2, bn_loader=train, subset=1))
    assert not torch.allclose(got, swag.predict(x, 4, seed=2, recalibrate=False))


@pytest.mark.parametrize(
    "data, options, error, match",
    [
        (torch.randn(7, 3), {}, ValueError, "bn_loader must yield"),
        (
            torch.randn(7, 3),
            {"bn_loader": iter([torch.randn(4, 3)])},
            ValueError,
            "bn_loader is read once for every draw",
        ),
        (iter([torch.randn(7, 3)]), {"recalibrate": False}, ValueError, "data is read once for every draw"),
        (DataLoader(torch.randn(7, 3), shuffle=True), {"recalibrate": False}, ValueError, "shuffle=True"),
        ([], {"recalibrate": False}, ValueError, "at least one batch"),
        (3, {"recalibrate": False}, TypeError, "an input or a loader, got int"),
        (torch.randn(7, 3), {"recalibrate": False, "num_samples": 0}, ValueError, "num_samples must be a positive int"),
        (torch.randn(7, 3), {"recalibrate": False, "seed": 1.5}, TypeError, "seed must be an int"),
        (torch.randn(7, 3), {"recalibrate": False, "scale": -1.0}, ValueError, "scale must be"),
    ],
)
def test_swag_predict_refuses(data, options, error, match):
    model = Classifier(bn=True)
    swag = lsf.SWAG(model)
    walk(model, 2, swag)
    with pytest.raises(error, match=match):
        swag.predict(data, **options)
    assert all(m.training for m in swag.modules())
