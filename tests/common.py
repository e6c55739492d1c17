"""What the test files share: kernels forced one by one, and the two comparisons."""

import contextlib

import torch

from losssurf_fast import _C

INSTRUCTION_SETS = ("avx512", "avx2", "baseline")


@contextlib.contextmanager
def instruction_set(name):
    """Run one instruction set's kernels; yields False where this CPU lacks it."""
    before = _C.instruction_set()
    try:
        yield _C.use_instruction_set(name)
    finally:
        _C.use_instruction_set(before)


def assert_as_good_as_eager(actual, eager, exact, factor=2.0):
    """The kernel's largest error is at most ``factor`` times that of the eager reference in the same dtype.

    Both are measured against ``exact``, the same computation in float64; one unit in the last place of the output's
    scale is allowed on top, so that an eager result that happens to be exact does not ask for the impossible.
    """
    assert actual.dtype == eager.dtype and actual.shape == exact.shape
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, exact)
        return
    assert torch.isfinite(actual).all()
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().max()
    eager_error = (eager.double() - exact).abs().max()
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= factor * eager_error + ulp, f"error {error:.3g}, eager {eager_error:.3g}, ulp {ulp:.3g}"
