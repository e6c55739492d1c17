import os

import pytest
import torch

if torch.cuda.is_available():
    torch.backends.cudnn.allow_tf32 = False  # torch's default for fp32 convolutions, which tests compare with the CPU's
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on CPU tensors


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Every test starts from the same generator, and uninitialised memory holds NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
