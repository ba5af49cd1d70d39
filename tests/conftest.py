"""What holds for every test: no network, no user caches, one hypothesis profile, GPU tests only with a GPU."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

GPU_TESTS = Path(__file__).parent / "gpu"
CACHES = pytest.StashKey[str]()

# Time is no test result (deadline), and the same commit gives the same result (derandomize, no database).
settings.register_profile("loralab", deadline=None, derandomize=True, database=None)
settings.load_profile("loralab")


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test module imports a library that reads it."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        MPLBACKEND="Agg",
        TOKENIZERS_PARALLELISM="false",
    )
    # Models read HF_TOKEN and trackers start by themselves where a user's environment says so.
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    if not hasattr(config, "workerinput"):  # xdist's workers inherit the folder of the main process
        config.stash[CACHES] = tempfile.mkdtemp(prefix="loralab-tests-")
        os.environ["HF_HOME"] = os.environ["XDG_CACHE_HOME"] = config.stash[CACHES]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the caches of this test run."""
    if CACHES in config.stash:
        shutil.rmtree(config.stash[CACHES], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything under tests/gpu as `gpu`; skip what is marked so where there is no GPU."""
    for item in items:
        if item.path.is_relative_to(GPU_TESTS):
            item.add_marker(pytest.mark.gpu)
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and not _gpu_is_present():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _gpu_is_present() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _same_folder_after() -> Iterator[None]:
    """Go back to the folder where the test began, so that no test depends on one before it."""
    before = Path.cwd()
    yield
    os.chdir(before)
