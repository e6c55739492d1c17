"""A run that a test kills: ``python surface_run.py TOOL PATH SECONDS_PER_LOSS`` prints a line for each point."""

import sys
import time
from pathlib import Path

from surface_models import Classifier, classifier_loaders
from torch.nn import functional as F
from torch.utils.data import DataLoader

import losssurf_fast as lsf


class Watch:
    """Counts losses; it is no part of what a run's file knows its loss by."""

    def __init__(self, seconds, on_point):
        self.seconds, self.on_point, self.calls = seconds, on_point, 0

    def loss(self):
        time.sleep(self.seconds)
        if self.calls % 5 == 0:  # three batches of train, two of test
            self.on_point()
        self.calls += 1


def run(tool, path=None, seconds=0.0, on_point=lambda: None):
    """The tool's result; calls ``on_point`` once for each point measured."""
    batches = classifier_loaders()
    samples = [(x, y) for batch in batches["train"] for x, y in zip(*batch, strict=True)]
    loaders = {"train": DataLoader(samples, batch_size=13, shuffle=True), "test": batches["test"]}
    watch = Watch(seconds, on_point)

    def loss_fn(outputs, targets):
        watch.loss()
        return F.cross_entropy(outputs, targets)

    kwargs = {"loss_fn": loss_fn, "path": path, "progress": False}
    model, a, b = Classifier(4), Classifier(1), Classifier(2)
    if tool == "plane":
        return lsf.Plane.through(a, b, Classifier(3)).evaluate(model, loaders, points=(5, 4), **kwargs)
    if tool == "line":
        return lsf.line(model, a, b, loaders, points=20, **kwargs)
    return lsf.rays(model, a, loaders, max_distance=1.0, num_rays=3, points=8, **kwargs)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), lambda: print("point", flush=True))
