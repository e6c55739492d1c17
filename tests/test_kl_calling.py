"""The kl family as users call it: transforms, compile, autocast, refusals."""

import itertools
import math

import pytest
import torch
from common import BF16, F32, F64
from test_kl import NAMES, OP, OPTIONS, functions, public, sample

import losssurf_fast as lsf
from losssurf_fast import ops

# ---- ways of calling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_kl_opcheck(name, grad):
    for weight, dtype in itertools.product((False, True), (F32, BF16)):
        params, weights = (
            [t.clone().requires_grad_(grad) for t in tensors] for tensors in sample((5, 4), dtype, weight)
        )
        stem = {"ard": "kl_ard", "normal": "kl_normal"}.get(name, "kl_log_uniform")
        torch.library.opcheck(getattr(OP, stem), (params, weights, [3], *OPTIONS[name]))
        if not grad:
            torch.library.opcheck(getattr(OP, f"{stem}_slopes"), (params, weights, [3], *OPTIONS[name]))
    slopes = [torch.randn(5), torch.randn(3, 2).to(BF16)]
    torch.library.opcheck(OP.kl_backward, (slopes, torch.tensor(2.0), [1, 7]))


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_kl_func_transforms_and_forward_mode(name, weight):
    params, weights = sample((3, 4), F64, weight)
    inputs = tuple(t.contiguous() for t in (*params, *weights))
    function = public(name)
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(function(*leaves), leaves)
    argnums = tuple(range(len(inputs)))
    grads = torch.func.grad(function, argnums=argnums)(*inputs)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    slope = sum((e * t).sum() for e, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(function, inputs, tangents)[1], slope)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent, slope)
        dual = functions(name)[0](duals[:1], duals[1:])  # the operator itself
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope)
    rows = torch.func.vmap(function)(*inputs)
    torch.testing.assert_close(rows, torch.stack([function(*row) for row in zip(*inputs, strict=True)]))


@pytest.mark.parametrize("name", NAMES)
def test_kl_compile(name):
    params, weights = sample((20, 30), weight=True)
    inputs = [t.clone().requires_grad_() for t in (*params, *weights)]
    function = lambda p, w: 0.5 * public(name)([p, p * 2], [w, w])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    value, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_kl_autocast_does_not_touch_it():
    log_alpha = torch.randn(30)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.kl_log_uniform(log_alpha), functions("exact")[0]([log_alpha], []))


def test_kl_backward_leaves_saved_tensors():
    """Whoever holds them, by a hook or from the graph, sees what the forward has saved."""
    held = []
    log_alpha = torch.randn(50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        hooked = ops.kl_log_uniform(log_alpha) * 3
    plain = ops.kl_log_uniform(log_alpha) * 3
    held += plain.grad_fn.next_functions[0][0].saved_tensors
    before = [t.detach().clone() for t in held]
    (hooked + plain).backward()
    assert len(held) >= 4 and all(map(torch.equal, held, before))


# ---- refusals -------------------------------------------------------------------------------------------------------

A, W = torch.randn(3, 4), torch.randn(3, 4)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: ops.kl_log_uniform(1.0), TypeError, "kl_log_uniform: log_alpha must be a tensor or .* got float"),
        (lambda: ops.kl_ard("ab"), TypeError, "kl_ard: log_alpha must be a tensor or .* got str"),
        (lambda: ops.kl_ard([A, 2]), TypeError, "kl_ard: log_alpha must be .* got list of Tensor, int"),
        (lambda: ops.kl_ard([]), ValueError, "kl_ard: log_alpha must hold at least one tensor, got an empty list"),
        (lambda: ops.kl_ard(A.int()), TypeError, "kl_ard: log_alpha must have one of the dtypes .* got torch.int32"),
        (lambda: ops.kl_ard([A, A.to("meta")]), ValueError, "kl_ard: log_alpha must be on one device, cpu, got meta"),
        (lambda: ops.kl_ard(A, weight=[W, W]), ValueError, "weight must hold 1 tensors like log_alpha, got 2"),
        (lambda: ops.kl_ard(A, weight=W.t()), ValueError, r"weight must have log_alpha's shape \(3, 4\), got \(4, 3\)"),
        (lambda: ops.kl_ard(A, weight=W.double()), TypeError, "must both be float64 or neither, got torch.float64"),
        (lambda: ops.kl_ard(A, weight=W.to("meta")), ValueError, "kl_ard: weight must be on one device, cpu, got meta"),
        (lambda: ops.kl_ard(A, 12, weight=W), ValueError, "kl_ard: numel must be None where weight is given, got 12"),
        (lambda: ops.kl_ard(A, 12.0), TypeError, "kl_ard: numel must be an int or a sequence of ints, got 12.0"),
        (lambda: ops.kl_ard(A, True), TypeError, "kl_ard: numel must be an int .* got True"),
        (lambda: ops.kl_ard(A, [12, 12]), ValueError, "kl_ard: numel must hold 1 ints like log_alpha, got 2"),
        (lambda: ops.kl_ard(A, 13), ValueError, r"numel must be a multiple of .* 12 of shape \(3, 4\), got 13"),
        (lambda: ops.kl_ard(A, -12), ValueError, "kl_ard: numel must be a multiple of .* got -12"),
        (lambda: ops.kl_ard(A[:0], 5), ValueError, "kl_ard: numel must be a multiple of .* got 5"),
        (lambda: ops.kl_log_uniform(A, exact=1), TypeError, "kl_log_uniform: exact must be a bool, got int"),
        (lambda: ops.kl_normal(W, "a"), TypeError, "kl_normal: log_sigma2 must be a tensor or .* got str"),
        (lambda: ops.kl_normal(W, A[0]), ValueError, r"kl_normal: weight must have log_sigma2's shape \(4,\)"),
        (lambda: ops.kl_normal(W, A, "1"), TypeError, "kl_normal: prior_std must be a number, got str"),
        (lambda: ops.kl_normal(W, A, 0.0), ValueError, "kl_normal: prior_std must lie in .*, got 0.0"),
        (lambda: ops.kl_normal(W, A, 1e-39), ValueError, r"prior_std must lie in \[1.2e-38, 3.4e\+38\], got 1e-39"),
        (lambda: ops.kl_normal(W, A, math.inf), ValueError, "kl_normal: prior_std must lie in .*, got inf"),
    ],
)
def test_kl_bad_inputs(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_kl_kernel_for():
    for name in ("kl_log_uniform", "kl_ard", "kl_normal", "kl_backward"):
        assert lsf.kernel_for(name, "cpu").startswith("C++")


def test_kl_retained_graph_and_accumulation():
    """Every backward starts from the slopes that the forward has left."""
    log_alpha = torch.randn(50, requires_grad=True)
    value = ops.kl_log_uniform(log_alpha) * 3
    first = torch.autograd.grad(value, log_alpha, retain_graph=True)[0].clone()
    second = torch.autograd.grad(value, log_alpha, retain_graph=True)[0].mul_(0)
    value.backward()
    assert torch.equal(log_alpha.grad, first) and not torch.equal(second, first)
    (ops.kl_log_uniform(log_alpha) * 3).backward()
    assert torch.equal(log_alpha.grad, 2 * first)
    batch = torch.autograd.grad(
        ops.kl_log_uniform(log_alpha), log_alpha, torch.tensor([1.0, 3.0]), is_grads_batched=True
    )[0]
    torch.testing.assert_close(batch[1], first)


MISMATCHED = [  # parameters, weights, counts
    ([], [torch.zeros(4, 3)], []),
    ([torch.zeros(4, 3)], [], []),
    ([torch.zeros(4, 3)], [], [1, 1]),
    ([torch.zeros(4, 3)], [torch.zeros(4)], [1]),
    ([torch.zeros(3000, 819)], [torch.zeros(2, 2)], [1]),
    ([torch.zeros(4, 3), torch.zeros(2)], [torch.zeros(4, 3)], [1, 1]),
]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("params", "weights", "counts"), MISMATCHED)
@pytest.mark.parametrize("name", NAMES)
def test_raw_operators_refuse_lists_that_do_not_fit(name, params, weights, counts, device):
    params, weights = ([t.to(device) for t in tensors] for tensors in (params, weights))
    stem = {"ard": "kl_ard", "normal": "kl_normal"}.get(name, "kl_log_uniform")
    for op in (getattr(OP, stem), getattr(OP, f"{stem}_slopes")):
        with pytest.raises(ValueError, match=rf"^{stem}: "):
            op(params, weights, counts, *OPTIONS[name])


@pytest.mark.parametrize("device", DEVICES)
def test_raw_operators_refuse_other_mistakes(device):
    zeros = lambda *shape, dtype=F32: torch.zeros(shape, dtype=dtype, device=device)
    with pytest.raises(TypeError, match=r"^kl_normal: weight and its parameter must both be float64"):
        OP.kl_normal([zeros(3)], [zeros(3, dtype=F64)], [1], 1.0)
    for grad, counts in ((zeros(), []), (zeros(), [1, 1]), (zeros(2), [1])):
        with pytest.raises(ValueError, match=r"^kl_backward: counts must be as many as slopes"):
            OP.kl_backward([zeros(4, 3)], grad, counts)


def test_sparse_parameters_are_refused():
    with pytest.raises(ValueError, match=r"^kl_normal: weight must be strided"):
        ops.kl_normal(torch.zeros(2, 2).to_sparse(), torch.zeros(2, 2))
