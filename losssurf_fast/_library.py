"""Operators and the dispatcher: the only user of ``torch.library`` in the package.

An operator is defined once by :func:`define`: its schema, its plain-torch reference (the kernel that runs where no
other is attached) and its fake. Kernels attach by dispatch key alone: C++ with ``TORCH_LIBRARY_IMPL`` in ``csrc/``,
Triton with :func:`attach` in ``ops/*_triton.py``. :func:`kernel_for` says which one serves a device.
"""

import contextlib
import functools

import torch
from torch.autograd import forward_ad

NAMESPACE = "losssurf_fast"
_library = torch.library.Library(NAMESPACE, "DEF")
_attached: dict[tuple[str, str], str] = {}  # (operator, device type) -> language of a kernel attached from Python
_missing: dict[tuple[str, str], str] = {}  # (operator or "" for all, device type) -> why a kernel is absent
AUTOCAST_DEVICES = ("cpu", "cuda")  # those of our kernels
OPERATORS: list[str] = []


def without_autocast(function):
    """``function`` with autocast off: our operators choose their dtypes themselves, in forward and in backward."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def in_autocast_dtype(x: torch.Tensor) -> torch.Tensor:
    """``x`` as an autocast GEMM would take it: in autocast's dtype where that is on, float64 as it is."""
    dtype = autocast_dtype_of(x)
    return x if dtype == x.dtype else x.to(dtype)


def autocast_dtype_of(x: torch.Tensor) -> torch.dtype:
    """That of :func:`in_autocast_dtype`."""
    device = x.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def define(schema: str, *, reference, fake) -> None:
    """Define an operator: ``reference`` serves every device without a kernel of its own, ``fake`` traces it."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, without_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    OPERATORS.append(name)


def attach(name: str, kernel, *, device: str = "cuda", language: str = "Triton") -> None:
    """Let ``kernel`` serve operator ``name`` on ``device``."""
    _library.impl(name, without_autocast(kernel), device.upper())
    _attached[name, device] = language


def explain_missing(device: str, reason: str, *operators: str) -> None:
    """Record why a device's kernels, all or those of ``operators``, are absent; :func:`kernel_for` repeats it."""
    for name in operators or ("",):
        _missing[name, device] = reason


def register_autograd(name: str, backward, setup_context) -> None:
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


def register_autograd_kernel(name: str, kernel) -> None:
    """Let ``kernel`` differentiate operator ``name`` by an ``autograd.Function`` of its own: it sees the arguments
    before autograd does, and calls the operator below it (``torch._C._AutoDispatchBelowAutograd``)."""
    _library.impl(name, kernel, "Autograd")


def register_vmap(name: str, rule) -> None:
    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=_library)


def composite_needed() -> bool:
    """Whether a ``torch.func`` transform or forward-mode AD is active.

    ``register_autograd`` formulas fail under the first and are silently skipped by the second, so public functions
    then take the operator's reference, which autograd differentiates by itself.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _alias(tensor):
    """A differentiable alias, so that a gradient to it does not run on into what the tensor was computed from."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def composite_backward(reference, inputs, grads, needed):
    """Vector-Jacobian product of ``reference(*inputs)`` that can itself be differentiated (double backward).

    ``needed[i]`` says whether ``inputs[i]`` wants a gradient; the others return None.
    """
    with torch.enable_grad():
        inputs = [_alias(x) for x in inputs]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        outputs = reference(*inputs)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)


def second_order(formula, inputs, grad, outgoing):
    """Backward of a backward: gradients of ``sum_i <outgoing_i, first_i>`` to ``(grad, *inputs)``.

    ``first`` are the gradients of ``<grad, formula(*inputs)>`` to ``inputs``, some of which may be None. The result
    is differentiable in turn where gradients are enabled.
    """
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        grad, *inputs = (_alias(t) for t in (grad, *inputs))
        present = [t for t in inputs if t is not None]
        first = dict(zip(present, torch.autograd.grad(formula(*inputs), present, grad, create_graph=True), strict=True))
        terms = [(first[t], out) for t, out in zip(inputs, outgoing, strict=True) if t is not None and out is not None]
        found = torch.autograd.grad(
            [term for term, _ in terms],
            [grad, *present],
            [out for _, out in terms],
            create_graph=keep_graph,
            allow_unused=True,
        )
    by_input = dict(zip((grad, *present), found, strict=True))
    return tuple(None if t is None else by_input[t] for t in (grad, *inputs))


@contextlib.contextmanager
def device_guard(tensor: torch.Tensor):
    """Make ``tensor``'s GPU current for a launch; nothing to do elsewhere (the Triton interpreter)."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def kernel_for(op: str, device: str | torch.device = "cpu") -> str:
    """The kernel that runs for operator ``op`` on ``device``, also where that device is absent.

    Returns one line such as ``"C++ (avx512)"``, ``"Triton"`` or ``"reference (plain torch): <why>"``.

    Raises:
        TypeError: ``op`` is not a string, or ``device`` neither a string nor a torch.device.
        ValueError: ``op`` is not an operator of this package, or nothing is computed on ``device``.
    """
    if not isinstance(op, str):
        raise TypeError(f"kernel_for: op must be an operator's name, got {type(op).__name__}")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"kernel_for: device must be a string or a torch.device, got {type(device).__name__}")
    name = op.removeprefix(f"{NAMESPACE}::")
    if name not in OPERATORS:
        raise ValueError(f"kernel_for: op must be one of {', '.join(OPERATORS)}, got {op!r}")
    try:
        kind = torch.device(device).type
        compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", kind.upper())
    except RuntimeError:  # no such device, or one without computation such as "meta"
        raise ValueError(f"kernel_for: device must be one that computes, as 'cpu' or 'cuda', got {device!r}") from None
    if (name, kind) in _attached:
        return _attached[name, kind]
    if compiled:
        if kind == "cpu":
            from losssurf_fast import _C

            return f"C++ ({_C.instruction_set()})"
        return "CUDA C++"
    reason = _missing.get((name, kind)) or _missing.get(("", kind)) or f"no kernel for {kind} is written"
    return f"reference (plain torch): {reason}"
