"""What runs of the real command share."""

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the runs of a module keep the videos of the needle world."""
    return tmp_path_factory.mktemp("cache")
