"""Sums of metrics over batches, against plain formulas over all predictions kept, and scikit-learn's."""

import math

import numpy as np
import pytest
import torch
from common import BF16, F32, F64, CountReads
from distributed import run_ranks
from sklearn.metrics import brier_score_loss, log_loss

import losssurf_fast as lsf
from losssurf_fast.uncertainty import metrics as module

RESULTS = ("accuracy", "nll", "brier", "ece", "predictive_entropy", "mutual_information")


def predictions(n=97, classes=5, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=g, dtype=F64)
    return logits.to(dtype), torch.randint(classes, (n,), generator=g)


def plain(logits, targets, bins=15):
    """The definitions, one sample after the other."""
    probs = logits.double().softmax(-1).numpy()
    y, n = targets.numpy(), len(targets)
    confidence, right = probs.max(1), (probs.argmax(1) == y).astype(float)
    ece = 0.0
    for b in range(bins):
        inside = ((confidence > b / bins) | (b == 0)) & (confidence <= (b + 1) / bins)
        if inside.any():
            ece += inside.sum() / n * abs(right[inside].mean() - confidence[inside].mean())
    return {
        "accuracy": right.mean(),
        "nll": -np.log(probs[np.arange(n), y]).mean(),
        "brier": ((probs - np.eye(probs.shape[1])[y]) ** 2).sum(1).mean(),
        "ece": ece,
        "predictive_entropy": -(probs * np.log(probs)).sum(1).mean(),
        "mutual_information": 0.0,
    }


def results(report):
    return {name: getattr(report, name) for name in RESULTS}


def measured(*batches, **options):
    metrics = lsf.UncertaintyMetrics(**options)
    for batch in batches:
        metrics.update(*batch)
    return metrics.compute(False)


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_metrics_are_those_of_all_predictions(bins, classes):
    logits, targets = predictions(classes=classes)
    batches = zip(logits.split(30), targets.split(30), strict=True)
    report = measured(*batches, num_bins=bins)
    assert results(report) == pytest.approx(plain(logits, targets, bins), rel=1e-13, abs=1e-15)
    assert report.num_samples == 97 == report.bin_counts.sum() and report.bin_counts.shape == (bins,)


def test_metrics_agree_with_scikit_learn():
    logits, targets = predictions()
    report, probs = measured((logits, targets)), logits.softmax(1).numpy()
    assert report.nll == pytest.approx(log_loss(targets, probs, labels=range(5)), rel=1e-12)
    assert report.brier == pytest.approx(brier_score_loss(targets, probs, labels=range(5)), rel=1e-12)


def test_metrics_of_an_ensemble():
    members, targets = torch.stack([predictions(seed=s)[0] for s in range(4)]), predictions()[1]
    ensemble = lsf.OnlineEnsemble()
    ensemble.update(members, stacked=True)
    report, mean = measured((ensemble, targets)), members.softmax(-1).mean(0)
    entropies = -torch.special.xlogy(members.softmax(-1), members.softmax(-1)).sum(-1)
    wanted = plain(mean.log(), targets)
    wanted["mutual_information"] = wanted["predictive_entropy"] - entropies.mean().item()
    assert results(report) == pytest.approx(wanted, rel=1e-12)
    assert report.mutual_information > 0.1


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_metrics_of_other_dtypes(dtype):
    logits, targets = predictions(dtype=dtype)
    found = results(measured((logits, targets.to(torch.int32))))
    assert found == pytest.approx(plain(logits, targets), rel=1e-13, abs=1e-15)


def test_metrics_of_dense_outputs_and_slices():
    logits, targets = predictions(n=60)
    flat = measured((logits, targets))
    for batch in [
        (logits.view(3, 4, 5, 5), targets.view(3, 4, 5)),
        (logits.view(3, 4, 5, 5).transpose(0, 2), targets.view(3, 4, 5).transpose(0, 2)),
        (torch.cat([logits, logits], 1)[:, :5], targets),
    ]:
        assert results(measured(batch)) == pytest.approx(results(flat), rel=1e-14)
    assert results(measured((logits[0], targets[0]))) == pytest.approx(results(measured((logits[:1], targets[:1]))))


def test_log_probabilities_are_logits():
    logits, targets = predictions()
    shifted = results(measured((logits.log_softmax(1), targets)))
    assert shifted == pytest.approx(results(measured((logits + 7, targets))), rel=1e-12)


def test_large_batches_go_in_pieces(monkeypatch):
    logits, targets = predictions()
    whole = results(measured((logits, targets)))
    monkeypatch.setattr(module, "_PIECE", 12)  # two rows; less than one row still takes one
    assert results(measured((logits, targets))) == pytest.approx(whole, rel=1e-13)
    monkeypatch.setattr(module, "_PIECE", 1)
    assert results(measured((logits, targets))) == pytest.approx(whole, rel=1e-13)


@pytest.mark.parametrize("bins", [1, 2, 3, 4, 5, 6, 7, 10, 12, 20])
def test_a_confidence_on_a_border_is_in_the_bin_below(bins):
    """Equal logits of C classes have the confidence 1 / C, a border wherever C divides the number of bins."""
    for classes in range(1, bins + 1):
        if bins % classes:
            continue
        for dtype in (F64, F32, BF16):
            report = measured((torch.zeros(1, classes, dtype=dtype), torch.zeros(1, dtype=torch.int64)), num_bins=bins)
            assert report.bin_counts.nonzero()[0] == bins // classes - 1
            assert report.bin_confidence[bins // classes - 1] == 1 / classes


def test_bins_are_closed():
    """Confidence 1 is in the last bin, and so are all; the lowest that there is, 1 / C, is in the first."""
    sure = torch.tensor([[1e4, 0.0], [0.0, math.inf]])[:1]
    report = measured((sure, torch.tensor([0])))
    assert report.bin_counts.tolist() == [0] * 14 + [1]
    assert results(report) == {name: 1.0 if name == "accuracy" else 0.0 for name in RESULTS}
    assert measured((torch.zeros(1, 1000), torch.tensor([0]))).bin_counts[0] == 1


def test_surely_wrong_predictions_are_right_numbers():
    wrong = measured((torch.tensor([[1e4, 0.0], [-1e4, 0.0]]), torch.tensor([1, 0])))
    assert results(wrong) == {
        "accuracy": 0, "nll": 1e4, "brier": 2, "ece": 1, "predictive_entropy": 0, "mutual_information": 0
    }  # fmt: skip
    impossible = measured((torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([2])))
    assert impossible.nll == math.inf and impossible.brier == 1.5
    assert impossible.predictive_entropy == pytest.approx(math.log(2), rel=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_a_result_and_a_wrong_prediction(bad):
    logits, targets = predictions(n=4)
    targets = logits.argmax(1)
    logits[0, targets[0]] = bad  # a softmax of inf is NaN
    found = results(measured((logits, targets)))
    assert found.pop("accuracy") == 0.75 and found.pop("mutual_information") == 0
    assert all(math.isnan(value) for value in found.values())


def test_ignored_samples_do_not_count():
    logits, targets = predictions()
    wanted = results(measured((logits[:50], targets[:50])))
    logits[60] = math.nan
    for ignored in (-100, 3000, 2):
        marked = torch.cat([targets[:50], torch.full((47,), ignored)])
        report = measured((logits, marked), ignore_index=ignored)
        kept = marked[:50] != ignored
        assert report.num_samples == kept.sum()
        if ignored != 2:
            assert results(report) == pytest.approx(wanted, rel=1e-13)
        else:
            assert results(report) == pytest.approx(plain(logits[:50][kept], targets[:50][kept]), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_targets_out_of_range_are_refused_at_the_end(bad):
    logits, targets = predictions()
    targets[3] = bad
    metrics = lsf.UncertaintyMetrics()
    metrics.update(logits, targets)
    metrics.update(*predictions())
    with pytest.raises(ValueError, match=r"indices in \[0, classes\) or ignore_index=-100, got 1 others"):
        metrics.compute()
    metrics.reset()
    metrics.update(*predictions())
    assert metrics.compute().num_samples == 97


def test_many_samples_are_summed_in_double():
    """2^24 + 1000 equal samples: float32 would stop counting, and its sums drift."""
    metrics = lsf.UncertaintyMetrics()
    metrics.update(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    metrics._totals *= 2**24
    for _ in range(1000):
        metrics.update(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    report = metrics.compute()
    assert report.num_samples == 2**24 + 1000
    assert report.nll == pytest.approx(math.log(1 + math.e), rel=1e-12)


def test_update_reads_nothing():
    logits, targets = predictions()
    ensemble = lsf.OnlineEnsemble()
    with CountReads() as count:
        metrics = lsf.UncertaintyMetrics()
        for _ in range(3):
            metrics.update(logits, targets)
        ensemble.update(logits)
        metrics.update(ensemble, targets)
    assert count.reads == 0
    assert metrics.compute().num_samples == 4 * 97


def test_update_keeps_no_graph_and_changes_nothing():
    logits, targets = predictions()
    before = logits.clone()
    metrics = lsf.UncertaintyMetrics()
    metrics.update(logits.requires_grad_(), targets)
    assert not metrics.state_dict()["totals"].requires_grad
    assert torch.equal(logits, before)


def test_results_so_far():
    metrics, (logits, targets) = lsf.UncertaintyMetrics(), predictions()
    metrics.update(logits[:50], targets[:50])
    assert results(metrics.compute()) == pytest.approx(plain(logits[:50], targets[:50]), rel=1e-13, abs=1e-15)
    metrics.update(logits[:0], targets[:0])
    metrics.update(logits[50:], targets[50:])
    assert results(metrics.compute()) == pytest.approx(plain(logits, targets), rel=1e-13, abs=1e-15)


def test_state_dict_goes_on(tmp_path):
    logits, targets = predictions()
    first, second = lsf.UncertaintyMetrics(), lsf.UncertaintyMetrics(device="cpu")
    first.update(logits[:50], targets[:50])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(state)
    second.update(logits[50:], targets[50:])
    assert results(second.compute()) == pytest.approx(results(measured((logits, targets))), rel=1e-13)
    assert torch.equal(state["totals"], first.state_dict()["totals"])
    second.load_state_dict(lsf.UncertaintyMetrics().state_dict())
    with pytest.raises(ValueError, match="at least one sample"):
        second.compute()


def test_report_prints_saves_and_loads(tmp_path):
    report = measured(predictions())
    lines = str(report).splitlines()
    assert len(lines) == 7 and max(map(len, lines)) <= 40
    assert lines[0].split() == ["samples", "97"] and lines[1].split()[-1] == f"{100 * report.accuracy:.4g}"
    report.save(tmp_path / "report.npz")
    loaded = lsf.UncertaintyReport.load(tmp_path / "report.npz")
    assert results(loaded) == results(report) and loaded.num_samples == 97 and str(loaded) == str(report)
    for name in ("bin_counts", "bin_accuracy", "bin_confidence"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(report, name))
    np.savez(tmp_path / "other.npz", ts=np.zeros(3))
    with pytest.raises(ValueError, match=r"UncertaintyReport.load: .*other.npz must have .* got \['ts'\]"):
        lsf.UncertaintyReport.load(tmp_path / "other.npz")
    with np.load(tmp_path / "report.npz") as arrays:
        np.savez(tmp_path / "words.npz", **{name: "hello" for name in arrays})
    with pytest.raises(ValueError, match="in .*words.npz must hold numbers, got <U5"):
        lsf.UncertaintyReport.load(tmp_path / "words.npz")


def test_reliability_diagram(tmp_path):
    report = measured(predictions(n=500), num_bins=10)
    figure = report.plot(tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    diagram, shares = figure.axes
    filled = report.bin_counts > 0
    accuracy, gaps = (np.array([bar.get_height() for bar in container]) for container in diagram.containers)
    np.testing.assert_allclose(accuracy, report.bin_accuracy[filled])
    np.testing.assert_allclose(accuracy + gaps, report.bin_confidence[filled])
    heights = [bar.get_height() for bar in shares.containers[0]]
    np.testing.assert_allclose(heights, report.bin_counts / 500)
    assert f"ECE {100 * report.ece:.2f}" in diagram.get_title()
    with pytest.raises(ValueError, match="path must end in"):
        report.plot(tmp_path / "reliability.doc")


def _ranks(rank):
    logits, targets = predictions()
    metrics = lsf.UncertaintyMetrics()
    if rank:
        metrics.update(logits[:60], targets[:60])
        metrics.update(logits[60:], targets[60:])
    assert results(metrics.compute()) == pytest.approx(results(measured((logits, targets))), rel=1e-13)
    metrics.update(logits[:10], targets[:10])
    assert metrics.compute().num_samples == 117
    if rank:
        assert metrics.compute(False).num_samples == 107
    metrics.reset()
    with pytest.raises(ValueError, match="at least one sample"):
        metrics.compute()


def test_ranks_add_up():
    run_ranks(_ranks)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x, y: lsf.UncertaintyMetrics(0), ValueError, "num_bins must be at least 1, got 0"),
        (lambda m, x, y: lsf.UncertaintyMetrics(1.5), TypeError, "num_bins must be an int, got float"),
        (lambda m, x, y: lsf.UncertaintyMetrics(ignore_index=None), TypeError, "ignore_index must be an int"),
        (lambda m, x, y: m.update([1.0], y), TypeError, "outputs must be a tensor or an OnlineEnsemble, got list"),
        (lambda m, x, y: m.update(x, [1]), TypeError, "update: targets must be a tensor, got list"),
        (lambda m, x, y: m.update(x.long(), y), TypeError, "outputs must be floating, .* got torch.int64"),
        (lambda m, x, y: m.update(x, y.float()), TypeError, "targets must be integers, .* got torch.float32"),
        (lambda m, x, y: m.update(x, y > 0), TypeError, "targets must be integers, .* got torch.bool"),
        (lambda m, x, y: m.update(x, y[:5]), ValueError, r"targets \[...\], got \(97, 5\) and \(5,\)"),
        (lambda m, x, y: m.update(x[:, :0], y), ValueError, r"got \(97, 0\) and \(97,\)"),
        (lambda m, x, y: m.update(torch.tensor(1.0), y[0]), ValueError, r"got \(\) and \(\)"),
        (lambda m, x, y: m.update(x, y.to("meta")), ValueError, "targets must be on the device cpu, got meta"),
        (lambda m, x, y: m.update(lsf.OnlineEnsemble(), y), RuntimeError, "no members yet"),
        (lambda m, x, y: m.compute(), ValueError, "at least one sample that is not ignored, got none"),
        (lambda m, x, y: m.compute("all"), TypeError, "process_group must be a ProcessGroup"),
        (lambda m, x, y: m.load_state_dict({}), ValueError, r"must hold the float64 'totals' \(50,\) of 15 bins"),
        (lambda m, x, y: m.load_state_dict(3), ValueError, "load_state_dict: state_dict must hold"),
        (
            lambda m, x, y: m.load_state_dict(lsf.UncertaintyMetrics(10).state_dict()),
            ValueError,
            "must hold the float64 'totals'",
        ),
    ],
)
def test_errors(call, error, message):
    metrics = lsf.UncertaintyMetrics()
    with pytest.raises(error, match=message):
        call(metrics, *predictions())
    assert not metrics.state_dict()["totals"].any()
