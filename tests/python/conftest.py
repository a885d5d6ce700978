"""Where the tests find what they need."""

import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def normals():
    """normals(shape, ...): f32 arrays of standard normals, the same in every run."""
    rng = np.random.default_rng(7)
    return lambda *shape: rng.standard_normal(shape, np.float32)


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    """Gradients of few tokens may nearly cancel: what then is a large error must not come and go with the numbers."""
    try:
        import torch
    except ImportError:
        return
    torch.manual_seed(11)


def cached(name):
    cache = os.environ.get("HEED_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "heed"
    )
    path = Path(cache) / name
    if not path.exists():
        pytest.skip(f"{path} is missing (scripts/fetch.sh fetches it)")
    return path
