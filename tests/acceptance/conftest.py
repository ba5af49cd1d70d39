"""Where the acceptance checks find real data: a folder outside the repository, named by LORALAB_DATA."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of real data; skip the test where no folder is named."""
    name = os.environ.get("LORALAB_DATA")
    if not name:
        pytest.skip("LORALAB_DATA is not set: it names the folder of real data that these checks read")
    folder = Path(name)
    assert folder.is_dir(), f"LORALAB_DATA names no folder: {folder}"
    return folder
