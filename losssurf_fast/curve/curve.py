"""A path between networks as a module: its weights are made anew for every forward (ops/curve.py has the formulas).

Source: Garipov et al., "Loss surfaces, mode connectivity, and fast ensembling of DNNs", NeurIPS 2018; its code's
checkpoints become curves in mode_connectivity.py.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from losssurf_fast._library import composite_needed
from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.ensemble import Ensemble
from losssurf_fast.averaging.mesh import require_finite
from losssurf_fast.averaging.swap import untouched
from losssurf_fast.curve import endpoints, sharding
from losssurf_fast.curve.bends import Bends, Places, combined, parameter_tree
from losssurf_fast.curve.geometry import T_SAMPLINGS, Geometry, as_points, even_points
from losssurf_fast.curve.recompute import at_end_of_backward, in_backward, prepare_backward
from losssurf_fast.ops.curve import KINDS, as_tensor, check_kind, check_t, curve_coefficients, curve_weights

_NAME = "Curve"
_STRATIFIED = "sharded bends need t_per_rank='same', got 'stratified'"


class Curve(nn.Module):
    """A curve in weight space between networks of one architecture, which trains like a network.

    With K = ``num_bends`` bends, the end points among them, the weights at t in [0, 1] are ``w(t) = sum_j c_j(t) w_j``
    (:func:`losssurf_fast.ops.curve_coefficients`). ``curve(x)`` draws t ~ U(0, 1) and runs the network with w(t)::

        curve = lsf.Curve([net_a, net_b])                    # a Bezier curve, one trainable bend between the nets
        optimizer = torch.optim.SGD([p for p in curve.parameters() if p.requires_grad], lr=0.015, momentum=0.9)
        for x, y in loader:
            loss = F.cross_entropy(curve(x), y) + 0.5 * weight_decay * curve.l2()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        middle = curve.module_at(0.5)                        # a network of its own

    Bends are Parameters with the weights' shapes and dtypes, ``bends.<j>.<name>`` in the state_dict, where
    ``_extra_state`` is the kind, so that weights of a chain do not load as a bezier curve's; a parameter that
    is tied, frozen, complex, or computed from others (``parametrize``) in the network is so in each. Parameters of
    integers and buffers are not combined: they are the first model's, in ``module``. That is the network, without
    parameters of its own except within :meth:`at`. BatchNorm's running statistics belong to no t: train mode updates
    them, and who evaluates a point runs ``update_bn`` first. The models stay as they are and share no memory with the
    curve.

    The weights of the last forward that recorded gradients stay installed in ``module``, so that activation
    checkpointing inside it recomputes with what forward used (over several ranks with ``use_reentrant=False`` alone);
    backward of an earlier forward reinstalls its own first. A backward's end, the next forward, :meth:`release`, a
    copy and ``to`` free them.

    Over several ranks t is rank 0's on all of them (``t_per_rank="same"``), so each of them must call it; or
    (u + rank / world) mod 1 with a common u ("stratified"): each rank's t is still uniform, and their mean gradient
    has less variance. A t that is given needs no communication. ``fully_shard(curve)`` gathers K networks for a
    forward, :meth:`shard_` only one.

    Args:
        models: two end points, or all K bends: modules (DistributedDataParallel and torch.compile are taken off),
            averages of them (AveragedModel, SWAG) or tensors by name, such as state_dicts of any of these.
            Tensors are paired by name and cast to the network's devices and dtypes. Sharded ones are gathered, on all
            ranks together. Layers are compared by type alone: strides, slopes and the like are those of ``model``.
        kind: "bezier" or "polychain".
        num_bends: K, at least 2; the ends count.
        fix_start, fix_end: keep that end point as it is (``requires_grad=False``).
        init: where inner bends start if only the ends are given: "linear", evenly on the segment between them.
        model: the module whose forward, buffers and frozen parameters the curve takes; by default the first module of
            ``models``. With state_dicts its buffers are then the first one's.
        t_per_rank: "same" or "stratified".
        t_sampling: "uniform" or "arc_length": t is drawn with the density |w'(t)| / length, so that points are uniform
            on the curve and the mean loss is the paper's first one, by arc length (equation 1), whose gradient through
            the density is left out; :meth:`arc_weight` has it. It costs one more pass over the bends per draw.

    Raises:
        TypeError, ValueError: an argument is not as above, or models differ in names, shapes, kinds of dtypes or
            layers, hold no values, NaN or inf, or are equal (a path of length zero). The message names the tensor.
        NotImplementedError: the network keeps a parameter where the curve's weights would not reach it.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        models: Sequence[nn.Module | Mapping[str, torch.Tensor]],
        *,
        kind: str = "bezier",
        num_bends: int = 3,
        fix_start: bool = True,
        fix_end: bool = True,
        init: str = "linear",
        model: nn.Module | None = None,
        t_per_rank: str = "same",
        t_sampling: str = "uniform",
    ):
        super().__init__()
        check_kind(_NAME, num_bends, kind)
        if init != "linear":
            raise ValueError(f"{_NAME}: init must be 'linear', got {init!r}")
        if t_per_rank not in sharding.T_PER_RANK:
            raise ValueError(f"{_NAME}: t_per_rank must be one of {sharding.T_PER_RANK}, got {t_per_rank!r}")
        if t_sampling not in T_SAMPLINGS:
            raise ValueError(f"{_NAME}: t_sampling must be one of {T_SAMPLINGS}, got {t_sampling!r}")
        for argument, value in (("fix_start", fix_start), ("fix_end", fix_end)):
            if not isinstance(value, bool):
                raise TypeError(f"{_NAME}: {argument} must be a bool, got {type(value).__name__}")
        models = endpoints.as_models(models, num_bends)
        template = endpoints.template_of(models, model)
        points = endpoints.weights_of(models, template)
        parameters = {n: p for n, p in tensors.named_parameters(template).items() if combined(p)}
        self.kind, self.num_bends, self.t_per_rank, self.t_sampling = kind, num_bends, t_per_rank, t_sampling
        self._frozen = frozen = frozenset(n for n, p in parameters.items() if not p.requires_grad)
        trees = []
        for j, values in enumerate(_bends(points, parameters, num_bends)):
            fixed = (j == 0 and fix_start) or (j == num_bends - 1 and fix_end)
            trees.append(parameter_tree({n: nn.Parameter(v, not fixed and n not in frozen) for n, v in values.items()}))
        self.bends = nn.ModuleList(trees)
        self.module = endpoints.copy_of(template)
        if isinstance(models[0], Mapping):
            endpoints.load_buffers(self.module, models[0])
        self._bends, self._places = Bends(self.bends), Places(self.module)
        self._has_complex = any(p.is_complex() for p in self.bends[0].parameters())
        self._last_t: torch.Tensor | None = None
        self._last_weights: dict[str, torch.Tensor] | None = None
        self.train(template.training)

    # ---- weights ----------------------------------------------------------------------------------------------------

    def coefficients(self, t: float | torch.Tensor) -> torch.Tensor:
        """The K coefficients of the bends at ``t``, on their device, in float32 (float64 for a number)."""
        return curve_coefficients(self._as_t(t), self.num_bends, self.kind)

    def weights(self, t: float | torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights at ``t`` by the network's names, tied ones once; gradients flow to the bends and to t.

        Of sharded bends they are whole on every rank; each of them must call it, and the first one's t counts.
        """
        tensors.reshard(tensors.fsdp_modules(self))
        return self._weights(self._as_t(t))

    def _weights(self, t: torch.Tensor) -> dict[str, torch.Tensor]:
        bends = self._bends.lists()
        layout = None
        if sharding.is_sharded(bends[0][0]):
            layout = sharding.Layout.of(bends[0])
            t = sharding.same_t(t, layout.mesh)
            bends = [[sharding.part(p) for p in bend] for bend in bends]
        if self._has_complex:
            found = curve_weights([[*map(tensors.real, bend)] for bend in bends], self.coefficients(t))
            pairs = zip(found, bends[0], strict=True)
            found = [torch.view_as_complex(w) if p.is_complex() else w for w, p in pairs]
        else:
            found = curve_weights(bends, self.coefficients(t))
        if layout is not None:
            found = sharding.whole(layout, found)
        return dict(zip(self._bends.names, found, strict=True))

    def _as_t(self, t: float | torch.Tensor) -> torch.Tensor:
        found = check_t(_NAME, t)
        if found.numel() != 1:
            raise ValueError(f"{_NAME}: t must be a number or a tensor of one, got shape {tuple(found.shape)}")
        if not isinstance(t, torch.Tensor):
            found = as_tensor(t, torch.float64)  # float32 would move a float64 network
        return found.reshape(()).to(self._bends.first().device)

    def sample_t(self) -> torch.Tensor:
        """A new t from the default generator of the bends' device, agreed upon by the ranks."""
        t = sharding.t_of_rank(torch.rand((), device=self._bends.first().device), self.t_per_rank)
        if self.t_sampling == "arc_length":
            with torch.no_grad():
                t = Geometry.of(self._bends.lists(), self.kind).quantile(t)
        return t

    def l2(self, t: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sum of squares of all weights at ``t``, as a differentiable scalar; None is the last forward's t.

        Half the weight decay times this is the paper's regularizer, with the optimizer's weight decay 0. Add it to the
        loss: it shares the last forward's graph, which a backward frees.

        Raises:
            RuntimeError: t is None and there was no forward yet.
        """
        weights, t = self._last_weights if t is None else None, self._known_t("l2", t)
        if weights is None:
            weights = self.weights(t)
        parts = [tensors.real(w) for w in weights.values()]
        wide = functools.reduce(torch.promote_types, {w.dtype for w in parts}, torch.float32)
        return torch.stack(torch._foreach_norm(parts, 2, dtype=wide)).square().sum()

    def _known_t(self, caller: str, t: float | torch.Tensor | None) -> float | torch.Tensor:
        if t is None and self._last_t is None:
            raise RuntimeError(f"{_NAME}.{caller}: without t it is that of the last forward, and there was none")
        return self._last_t if t is None else t

    @property
    def last_t(self) -> torch.Tensor | None:
        """The t of the last forward."""
        return self._last_t

    # ---- lengths ----------------------------------------------------------------------------------------------------

    def geometry(self) -> Geometry:
        """Norms, distances and speeds as they are now, from one pass over the bends, of sharded ones by all ranks."""
        tensors.reshard(tensors.fsdp_modules(self))
        return Geometry.of(self._bends.lists(), self.kind)

    def length(self, num_points: int | None = None) -> torch.Tensor:
        """The curve's length over its parameters, a float64 scalar that gradients flow through.

        None gives the arc length (exact for a chain, by quadrature for a bezier curve); a number that of the straight
        lines between so many points at even steps of t, the sum of ``dl`` in :func:`losssurf_fast.evaluate_curve`.
        """
        points = None if num_points is None else even_points(f"{_NAME}.length", num_points)
        geometry = self.geometry()
        return geometry.length() if points is None else geometry.chords(points.to(geometry.gram.device)).sum()

    def arc_weight(self, t: float | torch.Tensor | None = None) -> torch.Tensor:
        """|w'(t)| / length in t's shape, float64: the density of t under which the curve's points are uniform.

        ``loss_fn(curve(x), y) * curve.arc_weight()`` with uniform t has the loss by arc length as its mean, and its
        gradient that of this loss: the weight is differentiable in the bends (not if these are sharded) and in t. None
        is the last forward's t.

        Raises:
            RuntimeError: t is None and there was no forward yet.
        """
        t, geometry = check_t(f"{_NAME}.arc_weight", self._known_t("arc_weight", t)), self.geometry()
        return geometry.arc_weight(t.to(geometry.gram.device))

    # ---- the network at a point -------------------------------------------------------------------------------------

    def forward(self, *args, t: float | torch.Tensor | None = None, **kwargs):
        """``module(*args, **kwargs)`` with the weights at ``t``, a number or a 0-d tensor; None draws one.

        A ``t`` of the network's own must come by position: a warning at the curve's construction says so. A t outside
        [0, 1] is refused where it can be seen: a tensor on another device than the CPU is not looked at, nor one in a
        compiled graph, and the curve goes on past its ends there. Compile with tensors for t: each number is a graph of
        its own.
        """
        if t is None and self.t_per_rank == "stratified" and sharding.is_sharded(self._bends.first()):
            raise ValueError(f"{_NAME}: {_STRATIFIED}")
        t = self.sample_t() if t is None else self._as_t(t)
        passing = torch.compiler.is_compiling() or composite_needed() or not torch.is_grad_enabled()
        again = not passing and in_backward()  # activation checkpointing around the curve
        self._last_weights = None
        if not passing and not again:
            self._places.free()  # before there are new ones
        weights = self._weights(t)
        self._last_t, self._last_weights = t, None if passing else weights
        if again:
            at_end_of_backward(functools.partial(self._forget, weights))
        if passing or again or self._places.in_block:
            with self._places.installed_for(weights):
                outputs = self.module(*args, **kwargs)
        else:
            self._places.install(weights, registered=True)
            try:
                outputs = self.module(*args, **kwargs)
            except BaseException:  # which may be that of memory
                self.release()
                raise
            finally:
                self._places.hide()
        if not passing:
            prepare_backward(self, t, weights, outputs)
        return outputs

    @contextlib.contextmanager
    def at(self, t: float | torch.Tensor) -> Iterator[nn.Module]:
        """``module`` as the network at ``t``, its parameters among it, for a ``with`` block.

        The weights are without gradients. After the block the module has what it had before, except for buffers.
        """
        with torch.no_grad():
            weights = self.weights(t)
        with self._places.installed_for(weights):
            yield self.module

    @torch.no_grad()
    def module_at(self, t: float | torch.Tensor) -> nn.Module:
        """A network of its own with the weights at ``t`` as Parameters and a copy of ``module``'s buffers."""
        weights = self.weights(t)
        parameters = {n: nn.Parameter(w.detach().clone(), n not in self._frozen) for n, w in weights.items()}
        return self._places.model_with(self.module, parameters)

    def predict(
        self,
        data: torch.Tensor | Iterable,
        ts: Sequence[float] | torch.Tensor,
        *,
        bn_loader: Iterable | None = None,
        recalibrate: bool = True,
        subset: float | int | None = None,
        device: torch.device | str | int | None = None,
        forward_kwargs: Mapping | None = None,
        process_group=None,
    ) -> torch.Tensor:
        """Class probabilities ``[..., classes]``: the mean of the softmax over points of the curve.

        Accumulated as a log-mean-exp in float32 (float64 for float64 logits), without gradients, ``module`` in
        ``eval()``; modes and buffers are as before afterwards.

        Args:
            data: an input of the network, or a loader, read once per point and so always in the same order, whose
                batches are as in :func:`losssurf_fast.update_bn`; the results are concatenated along the first
                dimension.
            ts: the points, in [0, 1].
            bn_loader: where the network has BatchNorm layers, the data by which :func:`losssurf_fast.update_bn` sets
                their statistics anew at every point.
            recalibrate: False keeps the statistics that ``module`` has.
            subset, process_group: for update_bn; where it reduces over ranks, the failure of one is raised on all.
            device, forward_kwargs: as in update_bn, for both loaders.

        Raises:
            RuntimeError: another rank failed.
            TypeError, ValueError: an argument is not as above, a network with BatchNorm layers got no ``bn_loader``,
                ``data`` can be read only once or is shuffled, or the outputs are no logits.
        """
        points = as_points("predict", ts)
        how = bn_loader, recalibrate, subset, device, forward_kwargs, process_group
        ensemble = Ensemble(self.module, "point", data, *how, self._bends.first().device)
        ensemble.jointly(ensemble.check)
        with untouched(self.module), self._places.untouched():
            return ensemble.mean_of_softmax(self.at(t) for t in points)

    def release(self) -> None:
        """Free the last forward's weights, which backward of an activation checkpoint inside the network needs."""
        self._last_weights = None
        self._places.clear()

    def _forget(self, weights: dict[str, torch.Tensor]) -> None:
        """After a backward :meth:`l2` makes new ones: an optimizer may move the bends, and their graph is gone."""
        if self._last_weights is weights:
            self._last_weights = None

    # ---- the module -------------------------------------------------------------------------------------------------

    def shard_(self, mesh=None) -> "Curve":
        """Shard the bends over the ranks of ``mesh`` (one dimension; None is all ranks), in place, as FSDP2 would.

        Each of them holds its rows of every bend, as DTensor Parameters: make the optimizer afterwards. A forward
        combines the bends where they lie and gathers one network; backward leaves the mean over the ranks of the
        gradients. The values are the first rank's. Every rank must call forward, :meth:`weights`, :meth:`l2`,
        :meth:`at` and :meth:`module_at` together, and the first one's t counts for all of them.

        Raises:
            ValueError: t is stratified over the ranks, the bends are sharded, or torch.distributed is not initialised.
            NotImplementedError: the mesh has several dimensions.
        """
        if self.t_per_rank == "stratified":
            raise ValueError(f"{_NAME}.shard_: {_STRATIFIED}")
        self.release()
        sharding.shard_(self.bends, mesh)
        return self

    def _apply(self, fn, recurse=True):
        self.release()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        self.release()  # they are no leaves, which neither a copy nor a file takes
        last_t = self._last_t
        return {**self.__dict__, "_last_t": None if last_t is None else last_t.detach()}

    def _replicate_for_data_parallel(self):
        raise NotImplementedError(f"{_NAME}: nn.DataParallel is not supported; use DistributedDataParallel")

    def get_extra_state(self) -> torch.Tensor:
        """The kind's number, as a tensor, which distributed checkpoints and safetensors take."""
        return torch.tensor(KINDS.index(self.kind))

    def set_extra_state(self, state: torch.Tensor) -> None:
        if int(state) != KINDS.index(self.kind):
            found = KINDS[int(state)] if 0 <= int(state) < len(KINDS) else int(state)
            raise ValueError(f"{_NAME}: the state_dict must be of kind {self.kind!r}, it is of {found!r}")

    def extra_repr(self) -> str:
        fixed = [j for j, bend in enumerate(self.bends) if not any(p.requires_grad for p in bend.parameters())]
        how = f"t_per_rank={self.t_per_rank!r}, t_sampling={self.t_sampling!r}"
        return f"kind={self.kind!r}, num_bends={self.num_bends}, fixed={fixed}, {how}"


def _bends(
    points: list[dict[str, torch.Tensor]], like: Mapping[str, torch.Tensor], num_bends: int
) -> list[dict[str, torch.Tensor]]:
    """New tensors of all bends, from all or the ends, with the devices, dtypes and strides of ``like``."""
    given = []
    for i, point in enumerate(points):
        given.append({name: torch.empty_like(p).copy_(point[name]) for name, p in like.items()})
        require_finite(f"{_NAME}: models[{i}]", given[i])
    if len(given) == num_bends:
        return given
    first, last = given
    between = lambda t: {name: torch.lerp(p, last[name], t) for name, p in first.items()}
    return [first, *(between(j / (num_bends - 1)) for j in range(1, num_bends - 1)), last]
