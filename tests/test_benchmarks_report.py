"""What is made of measurements: tables, the README's part, the page of everything, rooflines."""

import pytest

from benchmarks import cases, pictures, records, report, timing


def result(provider, median, **changes):
    head = {
        "family": "noise", "op": "philox_normal", "variant": "", "mode": "forward", "dtype": "fp32",
        "shape": [2**20], "threads": 1, "provider": provider, "device": "Some CPU, avx512, 2 cores",
        "torch": "2.13.0", "triton": "3.7.1", "numpy": "2.4.6", "commit": "0123456789abcdef", "dirty": False,
        "budget": "full", "date": "2026-05-01T10:00:00+00:00",
    }  # fmt: skip
    figures = {"median_ms": median, "over_ours": median / 0.5, "floor_percent": 10 / median, "rounds": 9}
    return head | timing.empty_figures(None) | figures | changes


ROWS = [
    result("eager", 3.0),
    result("compiled", 45.0),
    result("torch", 2.0),
    result("ours", 0.5),
    result("floor", 0.1),
    result("copy", 1.0, family="machine", op="machine", gbps=13.2),
    result("gemm mm", 1.0, family="machine", op="machine", gflops=190.4),
]


def test_report_of_fixed_rows():
    assert report.sections(ROWS, report.markdown_table).splitlines() == [
        "Some CPU, avx512, 2 cores; torch 2.13.0; commit 012345678; 2026-05-01. Times in ms.",
        "",
        "**1 thread, CPU time.** Memory copy 13 GB/s; GEMM mm fp32 190 GFLOP/s.",
        "",
        "| operator | shape | dtype | mode | eager | compiled | torch | ours | speedup | target | floor |",
        "| --- | --- | --- | --- | --: | --: | --: | --: | --: | --: | --: |",
        "| philox_normal | 1048576 | fp32 | fwd | 3.000 | 45.0 | 2.000 | 0.500 | 4.00x | 5x | 20% |",
        "",
        report.LEGEND,
    ]


def test_speedup_is_over_the_strongest_baseline_target_over_eager():
    slower = [row | {"over_ours": row["median_ms"] / 0.75} for row in ROWS if row["family"] == "noise"]
    assert "| 2.67x | 5x missed |" in report.sections(
        slower, report.markdown_table
    )  # 2 / 0.75 over torch, 3 / 0.75 over eager
    losing = [row | {"over_ours": row["median_ms"] / 8.0} for row in ROWS if row["family"] == "noise"]
    assert "| 0.25x | 5x missed |" in report.sections(losing, report.markdown_table)


def test_failures_are_named():
    failed = result("ours", 1.0) | timing.empty_figures("RuntimeError: no")
    rows = [*(row | {"over_ours": None} for row in ROWS[:3]), failed]
    text = report.sections(rows, report.markdown_table)
    assert "| failed | - | 5x missed | - |" in text
    assert "- failed: philox_normal 1048576 fp32 forward, ours: RuntimeError: no" in text


def test_saved_memory_is_set_against_its_target():
    case = next(case for case in cases.load("lrt") if case.saved_target is not None)
    key = {"family": "lrt", "op": case.op, "variant": case.variant, "shape": list(case.shape), "mode": case.mode}
    rows = [result("eager", 4.0, saved_mib=40.0, **key), result("ours", 2.0, saved_mib=16.0, **key)]
    assert "| 40.0 | 16.0 | 40% | 30% missed |" in report.sections(rows, report.markdown_table)


def test_terminal_table_fits_a_hundred_columns():
    longest = result("eager", 2320.4, family="lrt", op="lrt_linear", variant="additive", shape=[512, 4096, 1024],
                     mode="full")  # fmt: skip
    lines = report.terminal([longest, *[longest | {"provider": p} for p in ("compiled", "torch", "ours")]]).splitlines()
    table = [line for line in lines if "lrt_linear" in line or line.startswith("operator")]
    assert len(table) == 2 and all(len(line) <= 100 for line in table)


def test_newest_clean_full_run_counts():
    old = result("ours", 9.0, date="2026-04-01T10:00:00+00:00")
    dirty = result("ours", 0.1, date="2026-06-01T10:00:00+00:00", dirty=True)
    quick = result("ours", 0.2, date="2026-06-02T10:00:00+00:00", budget="quick")
    other = result("ours", 7.0, family="kl", date="2026-03-01T10:00:00+00:00")
    kept = report.newest([old, *ROWS, dirty, quick, other])
    assert [row["median_ms"] for row in kept if row["provider"] == "ours"] == [0.5, 7.0]


def test_a_short_run_leaves_the_others_of_a_fuller_one_standing():
    fuller = [result("ours", float(size), shape=[size], date="2026-04-01T10:00:00+00:00") for size in (16, 32)]
    shorter = result("ours", 3.0, shape=[32], date="2026-05-01T10:00:00+00:00")
    assert [row["median_ms"] for row in report.newest([*fuller, shorter])] == [16.0, 3.0]


def test_a_red_gate_counts_until_the_family_is_measured():
    red = result("ours", 1.0, threads=None, shape=[], error="not green", date="2026-05-01T10:00:00+00:00")
    before, after = (result("ours", 3.0, date=f"2026-0{month}-01T10:00:00+00:00") for month in (4, 6))
    assert report.newest([before, red]) == [before, red]
    assert report.newest([before, red, after]) == [after]
    again = red | {"budget": "quick", "date": "2026-07-01T10:00:00+00:00"}
    assert report.newest([before, red, after, again]) == [after, again]


def test_section_of_a_readme_is_replaced_and_markers_are_demanded():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.with_section(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="once each"):
        report.with_section("no markers", "new")


def test_pictures_are_the_same_from_the_same_rows_and_linked(tmp_path):
    rows = [
        row | {"shape": [size], "median_ms": row["median_ms"] * size / 2**20} for row in ROWS for size in (64, 2**20)
    ]
    (first,) = report.pictures(rows, tmp_path)
    content = first.read_bytes()
    assert first.name == "some-cpu-avx512-2-cores-noise.svg"
    assert report.pictures(rows, tmp_path) == [first] and first.read_bytes() == content
    assert report.performance_page(rows).endswith(f"![{first.stem}](../benchmarks/results/{first.name})\n")


def test_documents_show_the_newest_results():
    newest = report.newest(report.read())
    section = report.readme_section(report.README.read_text())
    assert section == report.headlines(newest), "run `python -m benchmarks.report --readme`"
    page = report.PERFORMANCE.read_text()
    assert page == report.performance_page(newest), "run `python -m benchmarks.report --readme`"


def test_readme_has_headlines_on_one_thread_and_the_page_everything():
    (case, *_), other = (
        [c for c in cases.load("noise") if c.headline],
        next(c for c in cases.load("noise") if not c.headline),
    )
    rows = [
        row | {"op": c.op, "variant": c.variant, "shape": list(c.shape), "dtype": c.dtype, "mode": c.mode, "threads": n}
        for row in ROWS
        for c in (case, other)
        for n in (1, 2)
    ]
    shown, page = report.headlines(rows), report.performance_page(rows)
    assert shown.count("| philox_normal") == 1 and "1 thread" in shown and "2 pinned" not in shown
    measured = page[: page.index("## Not measured")]
    assert measured.count("| philox_normal") == 4 and "2 pinned" in measured


# ---- a GPU ---------------------------------------------------------------------------------------------------------


GPU = {"device": "Some GPU", "cases": "cuda", "budget": "quick"}


def gpu_rows(case, **figures):
    """Rows of a GPU's case with its machine's: eager takes three times as long as ours, the compiled as long."""
    key = {
        "family": "lrt", "op": case.op, "variant": case.variant, "shape": list(case.shape), "dtype": case.dtype,
        "mode": case.mode,
    }  # fmt: skip
    return [
        result("eager", 1.5, over_ours=3.0, peak_mib=100.0, **key, **GPU),
        result("compiled", 0.5, over_ours=1.0, **key, **GPU),
        result("ours", 0.5, **{"gbps": 3600.0, "floor_percent": 80.0, "peak_mib": 40.0} | figures, **key, **GPU),
        result("copy", 1.0, op="machine", gbps=4000.0, **GPU | {"family": "machine"}),
        result("gemm mm", 1.0, op="machine", dtype="bf16", gflops=790e3, **GPU | {"family": "machine"}),
        result("gemm rowwise", 1.0, op="machine", **GPU | {"family": "machine"}, error="RuntimeError: no fp8"),
    ]


def gpu_case(mode, wanted):
    return next(c for c in cases.load("lrt", device_type="cuda") if c.mode == mode and getattr(c, wanted) is not None)


@pytest.mark.parametrize(
    ("mode", "wanted", "figures", "shown"),
    [
        ("forward", "compiled_target", {}, "| 3.00x | 1.00x | - | 80% | 90% | 40 | 40% | eager 1.15x, compiled 1x |"),
        ("full", "peak_target", {}, "eager 1.1x, memory 50% |"),
        ("full", "peak_target", {"peak_mib": 51.0}, "eager 1.1x, memory 50% missed |"),
        ("full", "peak_target", {"peak_mib": None}, "| - | - | eager 1.1x, memory 50% missed |"),
        ("forward", "copy_target", {}, "| copy 90% |"),
        ("forward", "copy_target", {"gbps": 3500.0}, "| 88% | 40 | 40% | copy 90% missed |"),
    ],
)  # fmt: skip
def test_a_gpus_table_says_which_targets_are_met(mode, wanted, figures, shown):
    text = report.sections(gpu_rows(gpu_case(mode, wanted), **figures), report.markdown_table)
    assert shown in text and "**GPU time.** Memory copy 4000 GB/s" in text and report.GPU_LEGEND in text
    assert "GEMM mm bf16 790 TFLOP/s." in text and "CPU time" not in text and report.LEGEND not in text


def test_cases_that_no_gpu_has_measured_are_called_so():
    every = [case for family in cases.families() for case in cases.load(family, device_type="cuda")]
    page = report.performance_page(ROWS)
    assert "No GPU has been measured yet." in page and page.count("| not measured |") == len(every)
    case = gpu_case("forward", "compiled_target")
    page = report.performance_page([*ROWS, *gpu_rows(case)])
    assert "\nSome GPU:\n" in page and page.count("| not measured |") == len(every) - 1
    for other in every:
        name, shape = " ".join(filter(None, (other.op, other.variant))), "x".join(map(str, other.shape))
        assert f"| {name} | {shape} | {other.dtype} |" in page


# ---- rooflines -----------------------------------------------------------------------------------------------------


def series(sizes=(64, 2**20), **changes):
    scale = lambda row, size: {
        "shape": [size],
        "median_ms": row["median_ms"] * size / 2**20,
        "gbps": 8.0,
        "gflops": 20.0,
    }
    return [row | scale(row, size) | changes for row in ROWS if row["family"] == "noise" for size in sizes]


def machine():
    return [row for row in ROWS if row["family"] == "machine"]


def test_ceilings_are_the_machines_own_rates():
    row = result("ours", 2.0, gbps=6.6, gflops=95.2)  # half the copy's 13.2 GB/s, half the GEMM's 190.4 GFLOP/s
    assert pictures.ceilings(row, machine()) == pytest.approx({"copy": 1.0, "gemm": 1.0})
    assert pictures.ceilings(row | {"dtype": "bf16"}, machine()) == pytest.approx({"copy": 1.0})  # no such GEMM
    assert pictures.ceilings(row, []) == {}


def test_rooflines_have_ceilings_and_ring_what_loses():
    figure = pictures.picture("Some CPU", machine(), series())
    (axis,) = figure.axes
    assert set(axis.get_legend_handles_labels()[1]) == {
        "eager", "compiled", "torch", "ours", "floor", "bytes / copy (13 GB/s)", "operations / GEMM rate",
    }  # fmt: skip
    copy = next(line for line in axis.lines if line.get_label().startswith("bytes"))
    assert list(copy.get_ydata()) == pytest.approx([8.0 / 13.2 * 3.0 * size / 2**20 for size in (64, 2**20)])
    losing = [
        row | {"over_ours": 0.9} if row["provider"] == "torch" and row["shape"] == [64] else row for row in series()
    ]
    (axis,) = pictures.picture("Some CPU", machine(), losing).axes
    (ring,) = [line for line in axis.lines if line.get_label() == pictures.LOST]
    assert list(ring.get_xdata()) == [64]


def test_a_case_of_one_size_has_a_line_of_its_own():
    rows = [*series(), *series(sizes=(2**20,), variant="alone")]
    several, singles = pictures.series_and_singles(rows)
    assert len(several) == 1 and {row["variant"] for row in singles} == {"alone"}
    (_, below) = pictures.picture("Some CPU", machine(), rows).axes
    assert [label.get_text() for label in below.get_yticklabels()] == ["philox_normal alone 1048576 fp32 fwd"]


def test_series_of_unlike_layers_are_split():
    shapes = [(1, 64, 64), (4, 64, 64), (1, 128, 128), (4, 128, 128)]  # 4 * 64^2 = 128^2
    rows = [row | {"shape": list(shape)} for row in series(sizes=(1,)) for shape in shapes]
    several, singles = pictures.series_and_singles(rows)
    assert [key[-1] for key in several] == [(64, 64), (128, 128)] and singles == []
    convolutions = [row | {"shape": [n, 3, 8, 8, 3, 0]} for row in series(sizes=(1,)) for n in (1, 2)]
    assert pictures.series_and_singles(convolutions)[0] == {}


def test_of_a_device_the_fastest_gemm_of_the_dtype_counts():
    rows = [*machine(), machine()[-1] | {"gflops": 250.0}, machine()[-1] | {"gflops": 900.0, "dtype": "bf16"}]
    rows.append(rows[0] | {"provider": "gemm broken", "gflops": None})
    assert records.gemm_rate(rows, "fp32") == 250.0 and records.gemm_rate(rows, "fp8") is None
