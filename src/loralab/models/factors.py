"""Low-rank factors of a matrix: the pairs (A, B) with B A near it that some adapters start from.

Owns the arithmetic alone; the same matrix gives the same factors wherever it is asked.
"""

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]

# Up to this many rows or columns, the whole decomposition takes a second at most.
EXACT_WIDTH = 1024
# Beyond it: directions drawn besides those asked for, and power iterations.
_EXTRA, ITERATIONS = 8, 16
_SEED = 0


def principal_factors(weight: Tensor, rank: int) -> Factors:
    """Return the factors of the best approximation of a rank, the singular values shared out evenly.

    Args:
        weight: the matrix (out, in), float32.
        rank: R, at most the shorter side.

    Returns:
        A (R, in) and B (out, R).

    Source: Halko, Martinsson & Tropp 2011, Finding structure with randomness, algorithms 4.4 and 5.1; for matrices
    of which both sides are longer than `EXACT_WIDTH`.
    """
    matrix = _decomposable(weight)
    if min(matrix.shape) <= EXACT_WIDTH:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = _leading_space(matrix, rank + _EXTRA)
        inner, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ inner
    root = values[:rank].sqrt()
    first, second = root[:, None] * right[:rank], left[:, :rank] * root
    return first.contiguous().to(weight.device), second.contiguous().to(weight.device)


def _leading_space(matrix: Tensor, count: int) -> Tensor:
    """Return an orthonormal basis of about the leading left singular vectors (out, count)."""
    drawn = torch.randn(matrix.shape[1], count, generator=torch.Generator().manual_seed(_SEED))
    basis: Tensor = torch.linalg.qr(matrix @ drawn.to(matrix.device)).Q
    for _ in range(ITERATIONS):
        other = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ other).Q
    return basis


def orthogonal_factors(weight: Tensor, rank: int) -> Factors:
    """Return the first columns of Q and rows of R of a matrix's QR decomposition.

    Args:
        weight: the matrix (out, in), float32.
        rank: R, at most the shorter side.

    Returns:
        A = R's rows (R, in) and B = Q's columns (out, R).
    """
    columns, rows = torch.linalg.qr(_decomposable(weight))
    first, second = rows[:rank].contiguous(), columns[:, :rank].contiguous()
    return first.to(weight.device), second.to(weight.device)


def _decomposable(weight: Tensor) -> Tensor:
    return weight.to("cpu") if weight.device.type == "mps" else weight
