"""Warnings of libraries do not fail the tests of a GPU: other versions of them are installed there."""

from pathlib import Path

import pytest

# What torch 2.11 says of a thread's first product, and its compiler of itself.
_LIBRARIES = (
    "default:Attempting to run cuBLAS",
    "default:The .grad attribute of a Tensor that is not a leaf",
    "default::DeprecationWarning",
    "default::FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the libraries warn in what lies below this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in _LIBRARIES:
                item.add_marker(pytest.mark.filterwarnings(warning))
