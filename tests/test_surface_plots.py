"""Pictures: what is in them, in every format, for every kind of value."""

import math

import numpy as np
import pytest
from matplotlib.text import Text
from surface_run import run

import losssurf_fast as lsf
from losssurf_fast.surface import Projection
from losssurf_fast.surface.contours import contour_levels


@pytest.fixture(scope="module")
def surface():
    return run("plane")


def text_of(figure):
    return {t.get_text() for t in figure.findobj(Text)}


SIGNATURES = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_formats_follow_the_suffix(suffix, surface, tmp_path):
    results = {"plane": surface, "line": run("line"), "rays": run("rays")}
    for name, result in results.items():
        result.plot(tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"{name}.{suffix}").read_bytes().startswith(SIGNATURES[suffix])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.{suffix}" for name in results)


def test_plane_picture_shows_points_paths_and_levels(surface):
    surface.trajectories = {"training": Projection(np.array([[0, 0, 0], [1, 1, 0.5]]), np.zeros((0, 3)))}
    figure = surface.plot(metric="test_error")
    axes, bar = figure.axes
    assert axes.get_aspect() == 1 and {"w1", "w2", "w3", "training", "test error (%)"} <= text_of(figure)
    assert axes.get_xlim() == (surface.xs[0], surface.xs[-1]) and axes.get_ylim() == (surface.ys[0], surface.ys[-1])
    drawn = [tuple(np.ravel(line.get_xydata())) for line in axes.lines]
    assert all(tuple(xy) in drawn for xy in surface.marks.values()) and (0, 0, 1, 1) in drawn
    ticks = [float(label.get_text()) for label in bar.get_yticklabels()]
    assert ticks == sorted(set(ticks)) and len(ticks) >= 3
    assert (
        ticks[0] <= 100 * surface.values["test_error"].min() and ticks[-1] >= 100 * surface.values["test_error"].max()
    )


@pytest.mark.parametrize("low, high", [(0, 1), (2.3, 2.30001), (1e-6, 1e6), (-5, 3), (1000, 1234)])
@pytest.mark.parametrize("log", [True, False])
def test_levels_cover_the_values_and_are_round(low, high, log):
    values = low + (high - low) * np.linspace(0, 1, 400) ** 3
    levels = contour_levels(values, log=log, vmax=None)
    gaps = np.diff(levels)
    assert 6 <= len(levels) <= 12 and (gaps > 0).all()
    assert levels[0] <= low + 1e-9 * (high - low) and high <= levels[-1] <= high + 0.11 * (high - low)
    if log:
        assert gaps[-1] > 3 * gaps[1]
    else:
        assert gaps.max() < 1.5 * gaps.min()
    for level, gap in zip(levels[1:], gaps, strict=True):  # no more digits than tell it from the one below
        unit = 10.0 ** (math.floor(math.log10(gap)) - 1)
        assert abs(level / unit - round(level / unit)) < 1e-3


def test_levels_end_at_vmax():
    levels = contour_levels(np.linspace(0, 100, 50), log=True, vmax=2.0)
    assert levels[0] == 0 and 2 <= levels[-1] <= 2.2


def test_a_flat_surface_has_a_picture(surface, tmp_path):
    flat = lsf.Surface(surface.xs, surface.ys)
    flat.values = {"loss": np.full(flat.shape, 0.25)}
    flat.plot(tmp_path / "flat.png")


def test_values_that_are_not_finite_leave_their_places_grey(surface, tmp_path):
    broken = lsf.Surface(surface.xs, surface.ys, surface.marks)
    values = surface.values["train_loss"].copy()
    values[0, 0], values[-1, -1] = math.nan, math.inf
    broken.values = {"loss": values}
    broken.plot(tmp_path / "broken.png")
    broken.values = {"loss": np.full(values.shape, math.nan)}
    with pytest.raises(ValueError, match=r"Surface\.plot: loss has no finite values to show"):
        broken.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_line_picture_marks_the_ends():
    line = run("line")
    line.labels = ("SWA", "SGD")
    figure = line.plot()
    assert len(figure.axes) == 2 and {"SWA", "SGD", "train", "test", "loss", "error (%)"} <= text_of(figure)
    assert len(line.plot(metrics=["test_loss"]).axes) == 1
    np.testing.assert_array_equal(figure.axes[1].lines[1].get_ydata(), 100 * line.values["test_error"])


def test_rays_picture_compares_networks(tmp_path):
    a, b = run("rays"), run("rays")
    b.values = {name: 2 * v for name, v in b.values.items()}
    figure = a.plot(tmp_path / "rays.png", "test_loss", label="SWA", others={"SGD": b})
    (axes,) = figure.axes
    assert len(axes.lines) == 2 * (a.num_rays + 1)
    assert {f"SWA: +0.1 at {a.width('test_loss'):.3g}", f"SGD: +0.1 at {b.width('test_loss'):.3g}"} <= text_of(figure)


@pytest.mark.parametrize("tool, kind", [("plane", "Surface"), ("line", "Line"), ("rays", "Rays")])
def test_unknown_metrics_are_refused(tool, kind):
    result = run(tool)
    bad = {"metrics": ["loss"]} if tool == "line" else {"metric": "loss"}
    with pytest.raises(ValueError, match=rf"{kind}\.plot: metric must be one of train_loss, .*, got 'loss'"):
        result.plot(**bad)
