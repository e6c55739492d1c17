"""The ensemble that is averaged member by member, against all its members kept, in float64."""

import math

import pytest
import torch
from common import BF16, F32, F64, CountReads

import losssurf_fast as lsf


def ensemble_of(logits, **options):
    ensemble = lsf.OnlineEnsemble(**options)
    for member in logits:
        ensemble.update(member)
    return ensemble


def shannon(probs):
    return -torch.special.xlogy(probs, probs).sum(-1)


@pytest.mark.parametrize("members", [1, 2, 7])
@pytest.mark.parametrize("shape", [(5, 4), (4,), (2, 3, 6), (0, 4), (5, 1)])
def test_online_ensemble_is_the_mean_of_softmax(members, shape):
    logits = 3 * torch.randn(members, *shape, dtype=F64)
    ensemble, probs = ensemble_of(logits), logits.softmax(-1)
    torch.testing.assert_close(ensemble.log_probs, probs.mean(0).log())
    torch.testing.assert_close(ensemble.probs, probs.mean(0))
    torch.testing.assert_close(ensemble.predictive_entropy, shannon(probs.mean(0)))
    torch.testing.assert_close(ensemble.expected_entropy, shannon(probs).mean(0))
    information = shannon(probs.mean(0)) - shannon(probs).mean(0)
    torch.testing.assert_close(ensemble.mutual_information, information, atol=1e-14, rtol=1e-7)
    assert ensemble.num_members == members and (ensemble.mutual_information >= 0).all()


def test_online_ensemble_takes_members_stacked():
    logits = torch.randn(6, 5, 4)
    one, other = ensemble_of(logits), lsf.OnlineEnsemble()
    other.update(logits[:4], stacked=True)
    other.update(logits[4:].transpose(1, 2).contiguous().transpose(1, 2), stacked=True)
    torch.testing.assert_close(one.log_probs, other.log_probs)
    torch.testing.assert_close(one.mutual_information, other.mutual_information)
    assert other.num_members == 6


@pytest.mark.parametrize("dtype, wide", [(BF16, F32), (torch.float16, F32), (F32, F32), (F64, F64)])
def test_online_ensemble_dtypes(dtype, wide):
    logits = torch.randn(3, 5, 4).to(dtype)
    ensemble = ensemble_of(logits)
    assert ensemble.log_probs.dtype == ensemble.probs.dtype == wide
    torch.testing.assert_close(ensemble.probs, logits.to(wide).softmax(-1).mean(0))


def test_the_millionth_member_counts():
    """In fp32 the sum's logarithm no longer changes after 2^20 members; half of these say class 0, later half 1."""
    ensemble, half = lsf.OnlineEnsemble(entropies=False), 2**20
    ensemble.update(torch.tensor([[0.0, -math.log(3)]]))
    ensemble._log_sum, ensemble.num_members = ensemble._log_sum + math.log(half), half  # that many of them
    for _ in range(1000):
        ensemble.update(torch.tensor([[-math.log(3), 0.0]]))
    wanted = torch.tensor([[0.75 * half + 250, 0.25 * half + 750]], dtype=F64) / (half + 1000)
    torch.testing.assert_close(ensemble._log_mean().exp(), wanted, rtol=1e-7, atol=0)


def test_online_ensemble_survives_extreme_logits():
    far = torch.tensor([[1e4, 0.0, -1e4], [0.0, -math.inf, 0.0], [math.inf, 0.0, 0.0]])
    ensemble = ensemble_of([far[:2], far[:2].flip(-1)])
    torch.testing.assert_close(ensemble.probs, torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.0, 0.5]]))
    torch.testing.assert_close(ensemble.log_probs[0, 1].item(), -1e4, rtol=1e-6, atol=0)
    assert ensemble.log_probs[1, 1] == -math.inf
    torch.testing.assert_close(ensemble.mutual_information, torch.tensor([math.log(2), 0.0], dtype=F64))
    assert ensemble_of([far]).probs[2].isnan().all()


def test_one_member_tells_nothing_about_disagreement():
    for _ in range(20):
        assert torch.equal(ensemble_of(5 * torch.randn(1, 50, 10)).mutual_information, torch.zeros(50, dtype=F64))


def test_members_that_agree_and_members_that_do_not():
    sure = torch.tensor([[800.0, 0.0]])
    assert ensemble_of([sure, sure]).mutual_information.item() == 0
    assert ensemble_of([sure, sure.flip(-1)]).mutual_information.item() == pytest.approx(math.log(2), rel=1e-15)


def test_online_ensemble_reads_nothing():
    with CountReads() as count:
        ensemble = ensemble_of(torch.randn(4, 5, 3))
        assert ensemble.log_probs.shape == (5, 3) and ensemble.mutual_information.shape == (5,)
    assert count.reads == 0


def test_online_ensemble_gradcheck():
    logits = torch.randn(3, 2, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ensemble_of(t).log_probs, logits)
    assert torch.autograd.gradcheck(lambda t: ensemble_of(t).expected_entropy, logits)


def test_online_ensemble_keeps_what_it_had_after_an_error():
    ensemble = ensemble_of(torch.randn(2, 5, 3))
    before = ensemble.log_probs
    with pytest.raises(ValueError):
        ensemble.update(torch.randn(4, 3))
    assert torch.equal(ensemble.log_probs, before) and ensemble.num_members == 2


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda e: lsf.OnlineEnsemble(entropies=1), TypeError, "entropies must be a bool, got int"),
        (lambda e: e.update([1.0]), TypeError, "OnlineEnsemble.update: logits must be a tensor, got list"),
        (lambda e: e.update(torch.zeros(5, 3, dtype=torch.complex64)), TypeError, "logits must be of a floating dtype"),
        (lambda e: e.update(torch.zeros(5, 3, dtype=torch.int64)), TypeError, "logits must be of a floating dtype"),
        (lambda e: e.update(torch.tensor(1.0)), ValueError, r"logits must be \[..., classes\], got \(\)"),
        (lambda e: e.update(torch.zeros(5, 0)), ValueError, r"logits must be \[..., classes\], got \(5, 0\)"),
        (lambda e: e.update(torch.zeros(5, 4)), ValueError, r"logits must be \(5, 3\) on cpu .* got \(5, 4\)"),
        (lambda e: e.update(torch.zeros(5, 3, device="meta")), ValueError, "on cpu as before, got .* on meta"),
        (lambda e: e.update(torch.zeros(3), stacked=True), ValueError, r"must be \[members, ..., classes\]"),
        (lambda e: e.update(torch.zeros(0, 5, 3), stacked=True), ValueError, r"got \(0, 5, 3\)"),
        (lambda e: lsf.OnlineEnsemble().log_probs, RuntimeError, "no members yet"),
        (lambda e: lsf.OnlineEnsemble().mutual_information, RuntimeError, "no members yet"),
        (lambda e: ensemble_of([torch.zeros(3)], entropies=False).mutual_information, RuntimeError, "not kept"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(ensemble_of(torch.zeros(1, 5, 3)))
