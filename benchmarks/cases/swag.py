"""SWAG's two operators, against a ring buffer by ``_foreach_``, against the published code's way, and flat tensors."""

import math

import torch

from benchmarks.cases import GPU_COPY, Case, Setup
from benchmarks.cases.averaging import Weights, lists, numel
from losssurf_fast.ops import swag_collect_, swag_sample

RANK, COLLECTED, DRAWS = 20, 50, 30


def eager_collect(mean, m2, columns, values):
    """One pass per term over the model's list; the oldest columns are overwritten."""
    deltas = torch._foreach_sub(values, mean)
    torch._foreach_lerp_(mean, values, 1 / (COLLECTED + 1))
    deviations = torch._foreach_sub(values, mean)
    torch._foreach_addcmul_(m2, deltas, deviations)
    torch._foreach_copy_(columns, deviations)


class Concatenating:
    """Raw moments tensor by tensor, and columns that are joined anew for each model, as the published code does."""

    def __init__(self, values):
        self.values = values
        self.mean, self.square = [v.clone() for v in values], [v.square() for v in values]
        self.columns = [v.new_zeros(RANK, v.numel()) for v in values]

    def __call__(self, *_):
        n = COLLECTED
        for i, value in enumerate(self.values):
            self.mean[i] = self.mean[i] * (n / (n + 1)) + value / (n + 1)
            self.square[i] = self.square[i] * (n / (n + 1)) + value**2 / (n + 1)
            deviation = (value - self.mean[i]).view(1, -1)
            self.columns[i] = torch.cat((self.columns[i], deviation))[1:]


def _collect(shapes, concatenating):
    def setup(device: torch.device) -> Setup:
        values = [p.detach() for p in Weights(shapes, "fp32", device).parameters()]
        mean, m2 = [v.clone() for v in values], [v.square() for v in values]
        deviations = [v.new_zeros(RANK, v.numel()) for v in values]
        columns = [d[COLLECTED % RANK].view(v.shape) for d, v in zip(deviations, values, strict=True)]
        work = (mean, m2, columns, values)

        def read_and_write():
            for a, b, column, value in zip(*work, strict=True):
                a.add_(1e-3)
                b.add_(1e-3)
                column.copy_(value)

        ours = lambda mean, m2, _, values: swag_collect_(mean, m2, deviations, values, COLLECTED)
        if concatenating:
            return Setup(work, {"eager": Concatenating(values), "ours": ours}, read_and_write)
        return Setup(work, {"eager": eager_collect, "compiled": eager_collect, "ours": ours}, read_and_write)

    return setup


def _state(shapes, device):
    values = [p.detach() for p in Weights(shapes, "fp32", device).parameters()]
    return values, [v.square() for v in values], [v.new_ones(RANK, v.numel()) for v in values]


def eager_sample(mean, m2, deviations):
    """Of flat tensors: one for the whole model."""
    z1, z2 = torch.randn_like(mean), torch.randn(RANK, device=mean.device)
    low_rank = (z2 @ deviations) / math.sqrt(RANK - 1)
    return mean + math.sqrt(0.5) * ((m2 / COLLECTED).sqrt() * z1 + low_rank)


def _sample(shapes):
    def setup(device: torch.device) -> Setup:
        state = _state(shapes, device)
        out = [torch.empty_like(t) for t in state[0]]

        def flat():  # a copy for each provider: what one has just read would be in the last cache for the next
            mean, m2, deviations = state
            return torch.cat([t.view(-1) for t in mean]), torch.cat([t.view(-1) for t in m2]), torch.cat(deviations, 1)

        eager, compiled, columns, z2 = flat(), flat(), flat()[2], torch.randn(RANK, device=device)
        providers = {
            "eager": lambda: eager_sample(*eager),
            "compiled": lambda: eager_sample(*compiled),
            "ours": lambda: swag_sample(*state, COLLECTED, 0, out=out),
        }
        return Setup((), providers, lambda: torch.mv(columns.t(), z2))

    return setup


def _many_samples(shapes):
    """All draws in one pass over the deviations, against one call for each."""

    def setup(device: torch.device) -> Setup:
        state = _state(shapes, device)
        batched = [t.new_empty(DRAWS, *t.shape) for t in state[0]]
        rows = [[t[s] for t in batched] for s in range(DRAWS)]

        def one_by_one():
            for s, out in enumerate(rows):
                swag_sample(*state, COLLECTED, 0, sample=s, out=out)

        def write_all():
            for t in batched:
                t.fill_(1.0)

        ours = lambda: swag_sample(*state, COLLECTED, 0, num_samples=DRAWS, out=batched)
        return Setup((), {"eager": one_by_one, "ours": ours}, write_all)

    return setup


def cases(tiny: bool = False, device_type: str = "cpu") -> list[Case]:
    on_gpu = device_type == "cuda"
    small, large = lists(tiny, device_type)
    large = large[:4]  # 20M elements: of the columns there are 20 times as many

    def case(op, variant, shapes, setup, passes, goal=None, headline=False):
        return Case(
            op=op,
            variant=variant,
            shape=(numel(shapes),),
            mode="forward",
            setup=setup,
            bytes=4 * passes * numel(shapes),
            flops=0,
            targets={} if goal is None or on_gpu else {1: goal},
            copy_target=GPU_COPY if on_gpu and shapes is large else None,
            compiles=not on_gpu or shapes is large,
            headline=headline or (on_gpu and shapes is large and variant == rank),
        )

    rank, draws = f"rank {RANK}", f"{DRAWS} draws"
    first = not on_gpu  # on a GPU the large ones are the headlines
    return [
        case("swag_collect_", rank, small, _collect(small, False), 6, 1.9, headline=first),
        case("swag_collect_", rank, large, _collect(large, False), 6, 1.9),
        case("swag_collect_", f"{rank} concatenating", small, _collect(small, True), 6, 10.0, headline=first),
        case("swag_collect_", f"{rank} concatenating", large, _collect(large, True), 6, 10.0),
        case("swag_sample", rank, small, _sample(small), RANK + 3, 2.1, headline=first),
        case("swag_sample", rank, large, _sample(large), RANK + 3, 2.1),
        case("swag_sample", f"{rank} {draws}", small, _many_samples(small), RANK + 2 + DRAWS, 2.5, headline=first),
    ]
