"""Pictures: what is in them, in every format, for every kind of value."""

import dataclasses
import itertools
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
    assert {f"SWA: {a.rise('test_loss')}", f"SGD: {b.rise('test_loss')}"} <= text_of(figure)
    a.delta = float(np.ptp(a.values["test_loss"])) / 100
    assert f"w: +{a.delta:g} at {a.width('test_loss'):.3g}" in text_of(a.plot(metric="test_loss"))


def test_a_width_that_is_not_there_is_said_in_words():
    rays = run("rays")
    legend = lambda value: text_of(dataclasses.replace(rays, values={"loss": np.full(rays.shape, value)}).plot())
    assert "w: +0.1 not reached" in legend(1.0)
    assert {"w: no width, it is NaN", "no finite values"} <= legend(np.nan)


def test_a_line_without_finite_values_says_so():
    line = dataclasses.replace(run("line"), values={"loss": np.full(20, np.nan), "error": np.linspace(0, 1, 20)})
    loss, error = line.plot().axes
    assert "no finite values" in text_of(loss) and "no finite values" not in text_of(error)


def test_labels_of_a_plane_neither_overlap_nor_get_lost(surface):
    names = ("a network with quite a long name", "another network with such a name", "third")
    marks = dict(zip(names, surface.marks.values(), strict=True))
    marks["fourth"] = tuple(np.array(marks["third"]) + 1e-3)
    figure = dataclasses.replace(surface, marks=marks).plot()
    figure.draw_without_rendering()
    texts = {" ".join(text.get_text().split()): text.get_window_extent() for text in figure.axes[0].texts}
    assert set(texts) == {*names[:2], "third, fourth"}
    assert all(not a.overlaps(b) for a, b in itertools.combinations(texts.values(), 2))


def test_results_print_as_tables():
    surface, line, rays = run("plane"), run("line"), run("rays")
    heading, columns, *rows = str(surface).splitlines()
    assert heading.startswith("5 x 4 points of a plane, x from ") and columns.split()[:2] == ["min", "max"]
    assert [row[:22].strip() for row in rows] == ["train loss", "train error (%)", "test loss", "test error (%)"]
    assert rows[3][22:].split()[:2] == [f"{100 * f(surface.values['test_error']):.4g}" for f in (np.min, np.max)]
    assert str(line).splitlines()[0] == f"20 points on the line through a and b, which lie {line.length:.4g} apart"
    ends = line.values["test_loss"][[0, -1]]
    assert str(line).splitlines()[4][22:].split()[:2] == [f"{end:.4g}" for end in ends]
    assert str(line).splitlines()[4].split()[-1] == f"{line.barrier('test_loss'):.4g}"
    assert str(rays).startswith(f"3 rays of 8 points and length 1; train loss: {rays.rise('train_loss')} (median)\n")
    assert str(lsf.Surface(surface.xs, surface.ys)).startswith("5 x 4 points of a plane")  # nothing measured yet
    assert str(lsf.Rays(rays.distances, 3, 0.1)).startswith("3 rays of 8 points and length 1\n")


@pytest.mark.parametrize("tool, kind", [("plane", "Surface"), ("line", "Line"), ("rays", "Rays")])
def test_unknown_metrics_are_refused(tool, kind):
    result = run(tool)
    bad = {"metrics": ["loss"]} if tool == "line" else {"metric": "loss"}
    with pytest.raises(ValueError, match=rf"{kind}\.plot: metric must be one of train_loss, .*, got 'loss'"):
        result.plot(**bad)
