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


def cached(name):
    cache = os.environ.get("HEED_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "heed"
    )
    path = Path(cache) / name
    if not path.exists():
        pytest.skip(f"{path} is missing (scripts/fetch.sh fetches it)")
    return path
