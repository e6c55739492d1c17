"""What dnn-mode-connectivity calls the results in its curve.npz and plane.npz: errors and accuracies in percent."""

import numpy as np

_PREFIXES = {"train": "tr", "test": "te"}


def prefix(loader: str) -> str:
    """Its name of a loader; one that it does not have keeps its own."""
    return _PREFIXES.get(loader, loader)


def field(loader: str, metric: str) -> str:
    return f"{prefix(loader)}_{'err' if metric == 'error' else metric}"


def in_its_unit(metric: str, values: np.ndarray) -> np.ndarray:
    return 100 * values if metric == "error" else values


def fields(loader: str, metric: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """A metric by its name there; of the error the accuracy besides."""
    found = {field(loader, metric): in_its_unit(metric, values)}
    return found | ({f"{prefix(loader)}_acc": 100 - 100 * values} if metric == "error" else {})


def by_name(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The metrics "train_..." and "test_..." of a tool under its names; a metric that is called so already stays."""
    found: dict[str, np.ndarray] = {}
    for name, array in values.items():
        loader, _, metric = name.partition("_")
        if loader in _PREFIXES:
            found = fields(loader, metric, array) | found | {field(loader, metric): in_its_unit(metric, array)}
    return found
