"""The fading low-rank helper by eigenvectors: what its phases are, and the part of an error that it stands for."""

import math

import torch
from torch import Tensor


def phases(rank: int) -> list[int]:
    """List the rank of each phase."""
    found = []
    while rank >= 1:
        found.append(rank)
        rank = math.floor(rank / 2)
    return found


def weight_of(component: int, rank: int, progress: float) -> float:
    """Return how much a component counts, from 0 on for the largest."""
    return 1.0 if component + 1 <= math.floor(rank / 2) else math.cos(math.pi * progress / 2) ** 2


def helper(error: Tensor, rank: int, progress: float) -> Tensor:
    """Project an error onto each leading eigenvector of its own square, and add up the projections by weight."""
    matrix = error.double().flatten(1)
    vectors = torch.linalg.eigh(matrix @ matrix.t())[1].flip(1)  # the largest first
    found = torch.zeros_like(matrix)
    for component in range(min(rank, *matrix.shape)):
        vector = vectors[:, component : component + 1]
        found += weight_of(component, rank, progress) * vector @ (vector.t() @ matrix)
    return found.reshape(error.shape)
