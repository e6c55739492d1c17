"""A running average of a model's weights, beside the model that is trained.

Sources: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018 (SWA); Polyak
and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the warm-up of the decay is ``num_updates``
of TensorFlow's ``tf.train.ExponentialMovingAverage``.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import nn

from losssurf_fast.averaging import loading, tensors
from losssurf_fast.averaging import offload as offloading
from losssurf_fast.averaging.compressed import Compressed
from losssurf_fast.averaging.holder import averaged_dtype, holder_of, require_weights
from losssurf_fast.averaging.pairing import Pairing, by_device
from losssurf_fast.ops.averaging import AVERAGING_DTYPES

_NAME = "AveragedModel"


class AveragedModel(nn.Module):
    """``torch.optim.swa_utils.AveragedModel`` in one pass over the weights, in enough precision, also over shards.

    The first update copies the model. Update number n + 1 with the weights w then gives every average a::

        swa   a <- a + (w - a) / (n + 1)                  the mean of all models so far
        ema   a <- d a + (1 - d) w                        d = decay, or min(decay, (1 + n) / (10 + n)) in the warm-up

    Parameters are paired by name, tied ones averaged once, frozen ones too. Buffers are copied at each update, or
    averaged as well (``use_buffers``); integer and bool tensors are copied. Averages of bf16 and fp16 weights are held,
    and appear in ``module`` and in the state_dict, in fp32; ``forward`` casts them to the model's dtypes, unless ``to``
    has given them others. State dicts load from and into torch's class, also those of a model in
    DistributedDataParallel or torch.compile: wrappers are taken off, at construction and on load. A state_dict that
    does not fit is refused before anything is changed.

    A model sharded by ``fully_shard`` is not copied: ``module`` is then a tree of bare modules with the averages,
    DTensors placed as the parameters are, and cannot be called (see :func:`averaged_weights`). An update touches the
    local shards alone, without communication.

    Args:
        model: the model to average; its wrappers (DistributedDataParallel, torch.compile) are taken off.
        device: where the averages are held; by default where the model's tensors are.
        avg_fn: ``avg_fn(average, weight, n_averaged)`` returns the new average of one tensor, of its shape, in place of
            ``average=``.
        multi_avg_fn: ``multi_avg_fn(averages, weights, n_averaged)`` changes a list in place; each list has one dtype
            and one device. Weights are cast to the average's dtype for both.
        use_buffers: average floating buffers as parameters, instead of copying them.
        average: "swa" or "ema".
        decay: of "ema", in [0, 1].
        ema_warmup: let the decay of "ema" grow with the number of averaged models.
        average_dtype: a floating dtype for the averages; None is at least fp32. torch.int8 holds them in eight bits
            with one exponent for each index of the first dimension, or for a whole vector (on a shard: for what lies
            there), rounded stochastically (SWALP); they are made fp32 when they are used, until the next update. A NaN
            or inf takes all that shares its exponent with it.
        update_every: only every k-th call of ``update_parameters`` averages; after loading, calls count from 0.
        include_start: count the weights at construction as the first model.
        offload: "cpu" holds the averages in host memory (pinned, with a GPU). An update starts a copy of the weights on
            a stream of its own and returns; the averaging runs on the host when the average is next used. Whoever
            keeps tensors of ``module`` from before calls ``synchronize()``.
        check_finite: refuse an update from weights that hold NaN or inf. Waits for the device.

    Raises:
        TypeError, ValueError: an argument is not as above, or the model has lazy or meta tensors.
        NotImplementedError: torch.int8 averages of a model that is sharded in another dimension than the first.
    """

    n_averaged: torch.Tensor
    _pending: tuple[Pairing, int] | None = None  # an offloaded update, and n
    _compressed: Compressed | None = None

    @torch.inference_mode(False)  # or no update could follow outside it
    def __init__(
        self,
        model: nn.Module,
        device: int | str | torch.device | None = None,
        avg_fn: Callable | None = None,
        multi_avg_fn: Callable | None = None,
        use_buffers: bool = False,
        *,
        average: str = "swa",
        decay: float = 0.999,
        ema_warmup: bool = False,
        average_dtype: torch.dtype | None = None,
        update_every: int = 1,
        include_start: bool = False,
        offload: str | None = None,
        check_finite: bool = False,
    ):
        super().__init__()
        flags = {"use_buffers": use_buffers, "ema_warmup": ema_warmup}
        flags |= {"include_start": include_start, "check_finite": check_finite}
        functions = {"avg_fn": avg_fn, "multi_avg_fn": multi_avg_fn}
        _check_arguments(model, device, functions, average, decay, average_dtype, update_every, offload, flags)
        device = torch.device("cpu") if offload else device
        model = tensors.unwrap(model)
        parameters, buffers = tensors.named_parameters(model), tensors.named_buffers(model)
        require_weights(_NAME, {**parameters, **buffers})
        held_in = torch.float32 if average_dtype == torch.int8 else average_dtype
        dtypes = {name: averaged_dtype(t.dtype, held_in) for name, t in {**parameters, **buffers}.items()}
        if not use_buffers:  # a copy loses nothing
            dtypes |= {n: torch.promote_types(b.dtype, dtypes[n]) for n, b in buffers.items() if b.is_floating_point()}
        pin = bool(offload) and torch.cuda.is_available()
        self.module, self._sharded = holder_of(model, dtypes, device, pin)
        self._dtypes = {name: (dtypes[name], t.dtype) for name, t in {**parameters, **buffers}.items()}
        self.register_buffer("n_averaged", torch.tensor(int(include_start), dtype=torch.long, device=device))
        self.avg_fn, self.multi_avg_fn, self.use_buffers = avg_fn, multi_avg_fn, use_buffers
        self.average, self.decay, self.ema_warmup = average, float(decay), ema_warmup
        self.average_dtype = average_dtype
        self.update_every, self.offload, self.check_finite = update_every, offload, check_finite
        self._calls = 0
        self._count, self._counted = int(include_start), (self.n_averaged, self.n_averaged._version)
        self._pairing: Pairing | None = None
        self._staging: offloading.Staging | None = None
        if average_dtype == torch.int8:
            averaged = tensors.named_parameters(self.module)
            averaged |= tensors.named_buffers(self.module) if use_buffers else {}
            self._compressed = Compressed(_NAME, averaged)
            for name, t in averaged.items():
                self._compressed.hide(name, tensors.local(t), 0)

    def forward(self, *args, **kwargs):
        """The averaged model's output.

        Where averages are cast, backward through activation checkpointing within the model raises torch's error for
        recomputed values of other dtypes: take both passes in the model, ``with averaged_weights(model, average)``.

        Raises:
            RuntimeError: the averages are sharded.
        """
        if self._sharded:
            raise RuntimeError(
                f"{_NAME}: sharded averages cannot be called; use `with averaged_weights(model, average): model(...)`"
            )
        module = self.module
        cast = {}
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            held, dtype = self._dtypes.get(tensors.plain_name(name), (None, None))
            if t.dtype == held != dtype:  # what .to() has given another dtype is meant to be used in it
                cast[name] = t.to(dtype)
        if not cast:
            return module(*args, **kwargs)
        output = torch.func.functional_call(module, cast, args, kwargs)
        with torch.no_grad():  # running statistics; torch counts no version where it moves them
            for name, b in module.named_buffers():
                if name in cast:
                    after = cast[name]
                    b.copy_(torch.where(after == b.to(after.dtype), b, after.to(b.dtype)))
        return output

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average in the weights of ``model``, one of the names and shapes of the model at construction.

        Raises:
            TypeError: ``model`` is no module, or has a weight in a dtype that cannot be averaged.
            ValueError: names, shapes or placements differ, or ``check_finite`` found NaN or inf, on any rank. Nothing
                is changed, the count neither; but where ``avg_fn`` returns something else than a tensor of the shape,
                or a function of one's own raises, the averages before it are new.
        """
        if (self._calls + 1) % self.update_every:
            self._calls += 1
            return
        caller = f"{_NAME}.update_parameters"
        self._finish()
        pairing = self._paired(caller, model)
        if self.check_finite:
            pairing.refuse_nonfinite(caller)
        _, values, _, sources = pairing.lists()
        n = self._number()
        if self.offload and offloading.leaves_device(values + sources):
            if self._staging is None or not self._staging.fits(values + sources):
                self._staging = offloading.Staging(values + sources)
            self._staging.fetch(values + sources)
            self._pending = pairing, n
        else:
            self._take(pairing, values, sources, n, self.n_averaged)
        self._calls += 1
        self._add(1, n)

    @torch.no_grad()
    def synchronize(self) -> None:
        """Finish an offloaded update, and make the values of eight-bit averages. All that shows averages calls it."""
        self._finish()
        if self._compressed is not None:
            for name, t in (*self._named(tensors.named_parameters), *self._named(tensors.named_buffers)):
                self._compressed.show(name, t)

    def averages(self) -> dict[str, torch.Tensor]:
        """The averaged parameters, and the buffers, by the model's names: what the next update changes, or discards."""
        named = {**tensors.named_parameters(self.module), **tensors.named_buffers(self.module)}
        return {name: t.detach() for name, t in named.items()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """Load averages saved here or by torch's class.

        Raises:
            RuntimeError: keys (if ``strict``), shapes, placements or kinds of dtype differ, or n_averaged is no count.
                Nothing is changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"{_NAME}.load_state_dict: state_dict must be a mapping, got {type(state_dict).__name__}")
        loaded = OrderedDict(state_dict)
        if hasattr(state_dict, "_metadata"):
            loaded._metadata = state_dict._metadata
        ours = self.state_dict()
        loading.rename(loaded, ours, "")
        loading.check(f"{_NAME}.load_state_dict", loaded, ours, strict)
        return super().load_state_dict(loaded, strict, assign)

    def extra_repr(self) -> str:
        shown = [f"average={self.average!r}"]
        shown += [f"decay={self.decay}, ema_warmup={self.ema_warmup}"] if self.average == "ema" else []
        given = {"average_dtype": None, "update_every": 1, "offload": None}
        shown += [f"{k}={getattr(self, k)}" for k, default in given.items() if getattr(self, k) != default]
        if self._counts() or self.n_averaged.device.type == "cpu":  # not for the price of waiting for the device
            shown.append(f"n_averaged={self._number()}")
        return ", ".join(shown)

    # ---- within ------------------------------------------------------------------------------------------------------

    def _named(self, named: Callable) -> list[tuple[str, torch.Tensor]]:
        return [(name, tensors.local(t)) for name, t in named(self._modules["module"]).items()]

    def _paired(self, caller: str, model: nn.Module) -> Pairing:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
        model, module = tensors.unwrap(model), self._modules["module"]
        if self._pairing is None or not self._pairing.holds(module, model):
            self._pairing = None
            self._pairing = Pairing(caller, module, model, self.use_buffers)
        return self._pairing

    def _finish(self) -> None:
        if self._pending is not None:
            self._staging.wait()
            (pairing, n), self._pending = self._pending, None
            host, averaged = self._staging.host, len(pairing.names)
            try:
                self._take(pairing, host[:averaged], host[averaged:], n, torch.tensor(n))
            except BaseException:  # most likely avg_fn's; the update is lost, as without offload
                self._add(-1, n + 1)
                raise

    def _add(self, change: int, n: int) -> None:
        """Make the count n + change."""
        buffer = self.n_averaged.add_(change)
        self._count, self._counted = n + change, (buffer, buffer._version)

    def _number(self) -> int:
        """n_averaged, without reading it from the device unless someone else has changed it."""
        if not self._counts():
            self._count = int(self.n_averaged)
        return self._count

    def _counts(self) -> bool:
        """Whether the count on the host is that of ``n_averaged``."""
        buffer = self.n_averaged
        return self._counted is not None and buffer is self._counted[0] and buffer._version == self._counted[1]

    def _take(self, pairing: Pairing, values, sources, n: int, count: torch.Tensor) -> None:
        averages, _, copies, _ = pairing.lists()
        if self._compressed is None:
            for ours, theirs in by_device(averages, values):
                self._average(ours, theirs, n, count)
        else:  # one after the other, so that one alone is fp32
            for name, a, v in zip(pairing.names, averages, values, strict=True):
                with self._compressed.open(name, a, n):
                    self._average([a], [v.to(a.device)], n, count)
        if copies:
            torch._foreach_copy_(copies, sources)
        torch.clear_autocast_cache()  # of casts of the old values

    def _average(self, averages, values, n: int, count: torch.Tensor) -> None:
        if n == 0:
            torch._foreach_copy_(averages, values)
        elif self.avg_fn is not None or self.multi_avg_fn is not None:
            self._custom(averages, values, count)
        else:
            torch.ops.losssurf_fast.lerp_.default(averages, values, self._weight(n))
            torch.autograd.graph.increment_version(averages)

    def _weight(self, n: int) -> float:
        if self.average == "swa":
            return 1 / (n + 1)
        return 1 - (min(self.decay, (1 + n) / (10 + n)) if self.ema_warmup else self.decay)

    def _custom(self, averages, values, count: torch.Tensor) -> None:
        averages = [a.detach() for a in averages]
        values = [v.detach().to(a.dtype) for a, v in zip(averages, values, strict=True)]
        if self.avg_fn is not None:
            for a, v in zip(averages, values, strict=True):
                new = self.avg_fn(a, v, count.to(a.device))
                if not isinstance(new, torch.Tensor) or new.shape != a.shape:
                    got = tuple(new.shape) if isinstance(new, torch.Tensor) else type(new).__name__
                    raise ValueError(f"{_NAME}: avg_fn must return a tensor of shape {tuple(a.shape)}, got {got}")
                a.copy_(new)
            return
        groups: dict[tuple, tuple[list, list]] = {}
        for a, v in zip(averages, values, strict=True):
            ours, theirs = groups.setdefault((a.device, a.dtype), ([], []))
            ours.append(a)
            theirs.append(v)
        for (device, _), (ours, theirs) in groups.items():
            self.multi_avg_fn(ours, theirs, count.to(device))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.synchronize()
        if prefix:  # as a part of another module: load_state_dict has not seen the keys
            ours, errors = self.state_dict(), args[-1]
            loading.rename(state_dict, ours, prefix)
            part = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            try:
                loading.check(f"{prefix}load_state_dict", part, ours, strict=False)
            except RuntimeError as error:
                errors.append(str(error))
                state_dict |= {prefix + k: v for k, v in ours.items() if k in part}  # torch goes on to the children
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._calls = 0

    def state_dict(self, *args, **kwargs):
        self.synchronize()
        return super().state_dict(*args, **kwargs)

    def named_children(self):
        self.synchronize()
        return super().named_children()

    def named_modules(self, *args, **kwargs):
        self.synchronize()
        return super().named_modules(*args, **kwargs)

    def _apply(self, *args, **kwargs):
        self.synchronize()
        return super()._apply(*args, **kwargs)

    def __getattr__(self, name: str):
        if name == "module":
            self.synchronize()
        return super().__getattr__(name)

    def __getstate__(self) -> dict:
        self.synchronize()
        return {**self.__dict__, "_pairing": None, "_staging": None, "_counted": None}


def _check_arguments(model, device, functions, average, decay, average_dtype, update_every, offload, flags) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_NAME}: model must be a torch.nn.Module, got {type(model).__name__}")
    for argument, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{_NAME}: {argument} must be a bool, got {type(value).__name__}")
    functions = {argument: function for argument, function in functions.items() if function is not None}
    for argument, function in functions.items():
        if not callable(function):
            raise TypeError(f"{_NAME}: {argument} must be callable, got {type(function).__name__}")
    if len(functions) > 1:
        raise ValueError(f"{_NAME}: only one of avg_fn and multi_avg_fn can be given")
    if average not in ("swa", "ema"):
        raise ValueError(f"{_NAME}: average must be 'swa' or 'ema', got {average!r}")
    if average == "ema" and functions:
        raise ValueError(f"{_NAME}: average='ema' and a function of one's own exclude each other")
    if flags["ema_warmup"] and average != "ema":
        raise ValueError(f"{_NAME}: ema_warmup needs average='ema', got {average!r}")
    if not isinstance(decay, int | float) or isinstance(decay, bool):
        raise TypeError(f"{_NAME}: decay must be a number, got {type(decay).__name__}")
    if not 0 <= decay <= 1:
        raise ValueError(f"{_NAME}: decay must lie in [0, 1], got {decay}")
    if average_dtype not in (None, torch.int8, *AVERAGING_DTYPES):
        wanted = f"None, torch.int8 or one of {AVERAGING_DTYPES}"
        raise ValueError(f"{_NAME}: average_dtype must be {wanted}, got {average_dtype}")
    if not isinstance(update_every, int) or isinstance(update_every, bool):
        raise TypeError(f"{_NAME}: update_every must be an int, got {type(update_every).__name__}")
    if update_every < 1:
        raise ValueError(f"{_NAME}: update_every must be at least 1, got {update_every}")
    if offload not in (None, "cpu"):
        raise ValueError(f"{_NAME}: offload must be None or 'cpu', got {offload!r}")
    if offload and device is not None and torch.device(device).type != "cpu":
        raise ValueError(f"{_NAME}: offload='cpu' holds the averages on the CPU, got device={device}")
