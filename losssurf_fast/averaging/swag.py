"""SWAG: a Gaussian over a model's weights, gathered along training (ops/swag.py has the mathematics).

Source: Maddox et al., "A simple baseline for Bayesian uncertainty in deep learning", NeurIPS 2019.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from losssurf_fast import ops
from losssurf_fast.averaging import swag_convert, swag_density, swag_predict, swag_state
from losssurf_fast.averaging.holder import require_weights
from losssurf_fast.averaging.mesh import broadcast_, mesh_of, require_finite, zeros_beside
from losssurf_fast.averaging.tensors import (
    local,
    match,
    named_parameters,
    part_of,
    persistent_buffers,
    place_of,
    unwrap,
    without_repeats,
)  # fmt: skip
from losssurf_fast.ops.averaging import AVERAGING_DTYPES
from losssurf_fast.ops.noise import as_seed


class SWAG(nn.Module):
    """Mean, variance and the last deviations of the weights that a model goes through, and samples of them.

    ::

        swag = SWAG(model, max_num_models=20)
        swag.collect_model(model)                  # once an epoch of a constant or cyclical learning rate
        probs = swag.predict(x, num_samples=30, bn_loader=train_loader)

    A sample is ``mean + sqrt(scale) (sqrt(m2 / n) z1 + D^T z2 / sqrt(r - 1))`` with ``D`` the ``r = min(n, K)``
    deviations held. ``scale`` = 1/2 is the paper's SWAG, ``cov=False`` its SWAG-diagonal, ``scale=0`` SWA.

    The state is held in float32 (float64 for float64 parameters) whatever the model's dtype, pairs with models by
    name, and takes updates from the model inside DistributedDataParallel or torch.compile. Tied weights count once.
    ``module`` is a copy of the model into which samples are written; ``swag(x)`` calls it.

    Under FSDP2 (``fully_shard`` first) the state is sharded like the parameters and collecting communicates nothing.
    The model is not copied then: ``module`` is None, and samples go into the live one, ``sample(into=model)``. A draw
    is the same, bit for bit, however the weights are cut.

    Args:
        model: a module; the state starts empty, with its names, shapes, devices and placements.
        max_num_models: K, the number of deviations kept: ``K * numel`` elements.
        no_cov_mat: keep no deviations (SWAG-diagonal).
        deviations_dtype: float32, bfloat16 or float16; float64 parameters keep theirs in float64.
        device: of the state and of ``module``; the parameters' by default. Not for sharded models.

    Raises:
        TypeError, ValueError: an argument is not as above, or a parameter is not of a floating dtype.
        NotImplementedError: a placement whose noise is not written.
    """

    @torch.inference_mode(False)  # or no update could follow outside it
    def __init__(
        self,
        model: nn.Module,
        *,
        max_num_models: int = 20,
        no_cov_mat: bool = False,
        deviations_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, type):
            raise TypeError(f"SWAG: model must be a module, got the class {model.__name__}; call it first")
        if not isinstance(model, nn.Module):
            raise TypeError(f"SWAG: model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(max_num_models, bool) or not isinstance(max_num_models, int):
            raise TypeError(f"SWAG: max_num_models must be an int, got {type(max_num_models).__name__}")
        if max_num_models < 1:
            raise ValueError(f"SWAG: max_num_models must be at least 1, got {max_num_models}; see no_cov_mat")
        if deviations_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"SWAG: deviations_dtype must be float32, bfloat16 or float16, got {deviations_dtype}")
        parameters = named_parameters(model)
        require_weights("SWAG", parameters)
        for name, p in parameters.items():
            if not p.is_floating_point():
                raise TypeError(f"SWAG: {name} must have a floating dtype of {AVERAGING_DTYPES}, got {p.dtype}")
        self._mesh = mesh_of("SWAG", parameters.values())
        if self._mesh is not None and device is not None:
            raise ValueError(
                f"SWAG: device must be None for a sharded model, got {device}; the state is sharded like it"
            )
        self.max_num_models, self.no_cov_mat, self.n_models = max_num_models, no_cov_mat, 0
        self._places = [place_of("SWAG", p, row) for row, p in enumerate(parameters.values())]
        self._mean, self._m2, self._deviations = {}, {}, {}
        for name, p in parameters.items():
            wide = torch.promote_types(p.dtype, torch.float32)
            self._mean[name], self._m2[name] = zeros_beside(p, (), wide, device), zeros_beside(p, (), wide, device)
            if not no_cov_mat:
                narrow = torch.float64 if wide == torch.float64 else deviations_dtype
                self._deviations[name] = zeros_beside(p, (max_num_models,), narrow, device)
        buffers = persistent_buffers(model)
        self._collected_buffers = {n: b.detach().to(device or b.device, copy=True) for n, b in buffers.items()}
        if len(swag_state.entries(self)) != 1 + len(parameters) * (2 if no_cov_mat else 3) + len(buffers):
            raise ValueError("SWAG: a buffer has the name of a parameter's moment (X_mean, X_m2 or X_deviations)")
        self._sharded = self._mesh is not None
        self.module = None if self._sharded else copy.deepcopy(unwrap(model)).to(device)
        self._drawn = False

    @torch.no_grad()
    def collect_model(self, model: nn.Module, *, check_finite: bool = False) -> None:
        """Take in the weights of ``model``; its buffers are copied.

        Args:
            check_finite: refuse NaN and infinite weights (reads the result on the host) instead of taking them in.

        Raises:
            TypeError, ValueError: ``model`` is no module or differs in names, shapes or placements, or a weight is
                not finite. Nothing is changed.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"collect_model: model must be a torch.nn.Module, got {type(model).__name__}")
        parameters = match("collect_model", self._mean, named_parameters(model))
        buffers = match("collect_model", self._collected_buffers, persistent_buffers(model))
        mean, m2, deviations = self._local_state()
        if check_finite:
            require_finite("collect_model", dict(zip(self._mean, parameters, strict=True)))
        values = [local(p).to(a.device) for p, a in zip(parameters, mean, strict=True)]
        self._copy_buffers(buffers)
        ops.swag_collect_(mean, m2, deviations, values, self.n_models)
        self.n_models += 1

    @torch.no_grad()
    def sample(
        self,
        scale: float = 0.5,
        cov: bool = True,
        seed: int | torch.Tensor | None = None,
        block: bool = False,
        *,
        sample: int = 0,
        into: nn.Module | None = None,
    ) -> dict[str, torch.Tensor]:
        """Draw weights and write them into ``module``, or into the parameters of ``into``; the state stays as it is.

        Statistics of BatchNorm layers are not those of the drawn weights: call :func:`update_bn` next.

        Args:
            scale: of the covariance, not negative; it enters as its root with ``block``, too.
            cov: whether the low-rank part is added.
            seed: an int or a 0-d int64 tensor fixes the draw. None draws it from the default generator, on a mesh from
                its first rank's for all. Ranks that hold whole models (DDP) do not ask each other, as one of them may
                sample alone: give them one seed.
            block: draw the low-rank part for each parameter alone, instead of once for the model.
            sample: which draw of this seed.
            into: a model whose names, shapes and placements are those of the state.

        Returns:
            The parameters that were written, by name.

        Raises:
            RuntimeError: nothing has been collected, or the model is sharded and ``into`` is None.
            TypeError, ValueError: an argument is not as above. Nothing is changed.
        """
        if into is None and self.module is None:
            raise RuntimeError("sample: a sharded model is not copied; draw into the live one, sample(into=model)")
        if into is not None and not isinstance(into, nn.Module):
            raise TypeError(f"sample: into must be a torch.nn.Module, got {type(into).__name__}")
        parameters = match("sample", self._mean, named_parameters(self.module if into is None else into))
        self._draw("sample", seed, scale, cov, block, sample, None, [local(p) for p in parameters])
        torch.autograd.graph.increment_version([p for p in parameters if isinstance(p, DTensor)])
        torch.clear_autocast_cache()  # of casts of the old values
        self._drawn = self._drawn or into is None
        return dict(zip(self._mean, parameters, strict=True))

    @torch.no_grad()
    def samples(
        self,
        num_samples: int,
        *,
        scale: float = 0.5,
        cov: bool = True,
        seed: int | torch.Tensor | None = None,
        block: bool = False,
        sample: int = 0,
    ) -> dict[str, torch.Tensor]:
        """Many draws in one pass over the deviations, each parameter as ``[num_samples, *shape]`` in the state's dtype.

        Those of ``sample(seed=seed, sample=s)`` for s = sample, sample + 1, ..., with its arguments and errors;
        ``module`` keeps its weights. Under FSDP2 the results are sharded as the parameters are.
        """
        drawn = self._draw("samples", seed, scale, cov, block, sample, num_samples, None)
        return {name: part_of(self._mean[name], t, (num_samples,)) for name, t in zip(self._mean, drawn, strict=True)}

    def predict(
        self,
        data: torch.Tensor | Iterable,
        num_samples: int = 30,
        *,
        scale: float = 0.5,
        cov: bool = True,
        seed: int | None = None,
        block: bool = False,
        bn_loader: Iterable | None = None,
        recalibrate: bool = True,
        subset: float | int | None = None,
        device: torch.device | str | int | None = None,
        forward_kwargs: Mapping | None = None,
        process_group=None,
    ) -> torch.Tensor:
        """Class probabilities ``[..., classes]``: the mean of the softmax over draws of the weights.

        Accumulated as a log-mean-exp in float32 (float64 for float64 logits), without gradients. The model is in
        ``eval()`` meanwhile; afterwards ``module`` holds the last draw. Draw s is ``sample(seed=seed, sample=s)``.

        Args:
            data: an input of the model, or a loader, read once per draw and so always in the same order, whose batches
                are as in :func:`update_bn`; the results are concatenated along the first dimension.
            num_samples: how many draws.
            scale, cov, seed, block: as in :meth:`sample`.
            bn_loader: where the model has BatchNorm layers, the data by which :func:`update_bn` sets their statistics
                anew for every draw.
            recalibrate: False keeps the statistics that ``module`` has.
            subset, process_group: for :func:`update_bn`; where it reduces over ranks, seed=None is the same on them,
                and the failure of one is raised on all.
            device, forward_kwargs: as in :func:`update_bn`, for both loaders.

        Raises:
            RuntimeError: nothing has been collected, the model is sharded, or another rank failed.
            TypeError, ValueError: an argument is not as above, a model with BatchNorm layers got no ``bn_loader``,
                ``data`` can be read only once or is shuffled, or the outputs are no logits.
        """
        return swag_predict.predict(
            self, data, num_samples, scale, cov, seed, block, bn_loader, recalibrate, subset, device, forward_kwargs,
            process_group,
        )  # fmt: skip

    def log_prob(
        self,
        weights: nn.Module | Mapping[str, torch.Tensor] | None = None,
        *,
        scale: float = 0.5,
        cov: bool = True,
        block: bool = False,
        var_floor: float = 1e-30,
    ) -> torch.Tensor:
        """Log-density of weights under the Gaussian that :meth:`sample` draws from, as a 0-d float64 tensor.

        By Woodbury's identity: a Cholesky factor of r x r and one pass over the deviations, in chunks, in float64. No
        gradients. On a mesh every rank gets the value of the whole, by one sum over each of its dimensions.

        Args:
            weights: a model, or tensors by parameter name (buffers are ignored); None for those drawn into ``module``.
            scale: of the covariance, positive.
            cov, block: as in :meth:`sample`.
            var_floor: the least diagonal variance before scaling. Weights that never moved have none of their own, and
                a density only by this floor; raise it where they are to count less.

        Raises:
            RuntimeError: nothing has been collected, or drawn where ``weights`` is None.
            TypeError, ValueError: an argument is not as above.
        """
        return swag_density.log_prob(self, weights, scale, cov, block, var_floor)

    def logdet(
        self, *, scale: float = 0.5, cov: bool = True, block: bool = False, var_floor: float = 1e-30
    ) -> torch.Tensor:
        """Log-determinant of the covariance of :meth:`log_prob`, with its arguments, as a 0-d float64 tensor."""
        return swag_density.density("logdet", self, None, scale, cov, block, var_floor)

    def averages(self) -> dict[str, torch.Tensor]:
        """The means by parameter name: SWA's weights. They are the state itself, not copies.

        Raises:
            RuntimeError: nothing has been collected.
        """
        self._refuse_empty("averages")
        return dict(self._mean)

    def forward(self, *args, **kwargs):
        """The output of ``module``, for the weights that :meth:`sample` drew last."""
        if not self._drawn:
            how = "sample()" if self.module is not None else "sample(into=model), a sharded model, then that model"
            raise RuntimeError(f"SWAG: nothing has been drawn into module; call {how}")
        return self.module(*args, **kwargs)

    def state_dict(self, *, destination=None, prefix: str = "", keep_vars: bool = False) -> dict[str, torch.Tensor]:
        """The state by key, in memory that it shares, with shapes that do not change while models are collected.

        For every parameter X: ``base.X_mean`` and ``base.X_m2`` (sum of squared deviations), and ``base.X_deviations``
        [K, *shape], where the deviation of model i (from 0) is row i mod K; for every buffer ``base.<its name>``; and
        ``n_models``. The draw in ``module`` is none of it. Sharded tensors are DTensors, so
        torch.distributed.checkpoint saves on some ranks and loads on others; a SWAG is one of its Stateful objects.
        Within another module the keys have their prefix there; the arguments are torch's. :meth:`to_swa_gaussian`
        gives the published code's keys.
        """
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key in [key for key in state if key.startswith(f"{prefix}module.")]:
            del state[key]
        return state

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """Take over what :meth:`state_dict` gave for a model with the same names, shapes and placements.

        Within another module, whose ``load_state_dict`` raises at the end, a SWAG that lacks a key or got a tensor that
        is not like its own is left as it was.

        Args:
            strict: False ignores keys besides those of the state, and loads nothing where one is missing.
            assign: as torch's; values are copied all the same.

        Returns:
            ``missing_keys`` and ``unexpected_keys``, as torch does.

        Raises:
            TypeError, ValueError: a key is missing or unexpected, or a tensor is not like the state's. Nothing is
                changed.
        """
        swag_state.check(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + key: value for key, value in swag_state.entries(self).items()})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, False, missing_keys, unexpected_keys, errors)
        swag_state.load(self, state_dict, prefix, missing_keys, unexpected_keys, errors)
        if self.module is not None:  # is not saved, so that it loads itself
            state_dict.update(self.module.state_dict(prefix=f"{prefix}module.", keep_vars=True))

    def to_swa_gaussian(self) -> dict[str, torch.Tensor]:
        """The state with the keys of wjmaddox/swa_gaussian's SWAG, whole on every rank, for its ``load_state_dict``.

        ``n_models`` [1]; for every parameter X ``base.X_mean``, ``base.X_sq_mean`` = m2 / n + mean^2 and
        ``base.X_cov_mat_sqrt`` [r, numel], the deviations from the oldest to the newest; ``base.<buffer>``. The second
        moment loses a variance under 1e-7 mean^2 to rounding.
        """
        return swag_convert.to_swa_gaussian(self)

    @classmethod
    def from_swa_gaussian(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        model: nn.Module,
        *,
        max_num_models: int | None = None,
        deviations_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "SWAG":
        """A SWAG with the state of wjmaddox/swa_gaussian's, for a model with the same names and shapes.

        Args:
            state_dict: as :meth:`to_swa_gaussian` has it; without ``*_cov_mat_sqrt`` no deviations are kept.
            max_num_models: K. By default the number of deviations where they are fewer than the models, else at least
                20. With less the newest are kept.

        Raises:
            TypeError, ValueError: keys, shapes or numbers do not fit ``model`` or each other.
            NotImplementedError: ``model`` is sharded. Convert for a whole one, save and load it by
                torch.distributed.checkpoint.
        """
        return swag_convert.from_swa_gaussian(cls, state_dict, model, max_num_models, deviations_dtype, device)

    def _local_state(self) -> tuple[list, list, list]:
        """Mean, m2 and ring buffers [K, numel] of this rank."""
        mean, m2 = [local(t) for t in self._mean.values()], [local(t) for t in self._m2.values()]
        rings = zip(self._deviations.values(), mean, strict=not self.no_cov_mat)
        return mean, m2, [local(d).view(self.max_num_models, a.numel()) for d, a in rings]

    def _draw(self, caller, seed, scale, cov, block, sample, num_samples, out) -> list[torch.Tensor]:
        self._refuse_empty(caller)
        mean, m2, deviations = self._local_state()
        shared = as_seed(caller, seed, mean[0].device if mean else torch.device("cpu"))
        if seed is None and self._mesh is not None:
            broadcast_(shared, self._mesh)
        return ops.swag_sample(
            mean, m2, deviations, self.n_models, shared, scale=scale, cov=cov, block=block, num_samples=num_samples,
            sample=sample, places=self._places, num_params=len(mean), out=out,
        )  # fmt: skip

    def _refuse_empty(self, caller: str) -> None:
        if self.n_models == 0:
            raise RuntimeError(f"{caller}: nothing has been collected; call collect_model first")

    def _copy_buffers(self, values: list[torch.Tensor]) -> None:
        copies = {} if self.module is None else persistent_buffers(self.module)
        for (name, ours), value in zip(self._collected_buffers.items(), values, strict=True):
            local(ours).copy_(local(value))
            if name in copies:
                target, source = without_repeats(copies[name], value)
                target.copy_(source)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for tensors in (self._mean, self._m2, self._deviations, self._collected_buffers):
            for name, t in tensors.items():
                tensors[name] = t.to(fn(t).device)  # not its dtype: halves of a model keep a wide state
        return self
