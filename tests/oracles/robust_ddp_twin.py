"""Slow twins of the robust rules, on whole gradients stacked in one array, one worker after the other.

Written from the definitions: distances between the vectors themselves, singular value decompositions of the stack. No
Gram matrix, no pieces.
"""

import numpy as np

__all__ = ["robust_mean"]


def robust_mean(gradients: np.ndarray, aggregator: str, f: int, **settings: object) -> np.ndarray:
    """Return the aggregate of gradients (n, d) in float64, without those that are not finite."""
    finite = [g.astype(np.float64) for g in gradients if np.isfinite(g).all()]
    return _RULES[aggregator](finite, f - (len(gradients) - len(finite)), **settings)


def median(gradients: list[np.ndarray], f: int) -> np.ndarray:
    return np.median(np.stack(gradients), axis=0)


def trimmed_mean(gradients: list[np.ndarray], f: int) -> np.ndarray:
    result = []
    for numbers in np.stack(gradients).T:
        ordered = sorted(numbers)
        result.append(np.mean(ordered[f : len(ordered) - f]))
    return np.array(result)


def krum(gradients: list[np.ndarray], f: int, krum_m: int = 1) -> np.ndarray:
    scores = []
    for i, own in enumerate(gradients):
        apart = sorted(np.sum((own - other) ** 2) for j, other in enumerate(gradients) if j != i)
        scores.append(sum(apart[: len(gradients) - f - 2]))
    best = sorted(range(len(gradients)), key=lambda i: scores[i])[:krum_m]
    return np.mean([gradients[i] for i in best], axis=0)


def nna(gradients: list[np.ndarray], f: int, nna_rule: str = "trimmed_mean", **settings: object) -> np.ndarray:
    mixed = []
    for i, own in enumerate(gradients):
        order = sorted(range(len(gradients)), key=lambda j: -1.0 if j == i else np.linalg.norm(own - gradients[j]))
        mixed.append(np.mean([gradients[j] for j in order[: len(gradients) - f]], axis=0))
    return _RULES[nna_rule](mixed, f, **settings)


def geometric_median(gradients: list[np.ndarray], f: int) -> np.ndarray:
    """Many plain Weiszfeld steps from the coordinate-wise median, with distances that are never quite zero."""
    found = np.median(np.stack(gradients), axis=0)
    for _ in range(400):
        weights = [1 / max(np.linalg.norm(found - g), 1e-12) for g in gradients]
        found = sum(w * g for w, g in zip(weights, gradients, strict=True)) / sum(weights)
    return found


def flag(gradients: list[np.ndarray], f: int, flag_rank: int | None = None, flag_iterations: int = 4) -> np.ndarray:
    rank = flag_rank or len(gradients) // 2 + 1
    lengths = [np.linalg.norm(g) for g in gradients]
    units = [g / length if length else g for g, length in zip(gradients, lengths, strict=True)]
    weights = [1.0] * len(units)
    for _ in range(flag_iterations):
        stack = np.stack([w * u for w, u in zip(weights, units, strict=True)], axis=1)
        left, singular, _ = np.linalg.svd(stack, full_matrices=False)
        basis = left[:, :rank][:, singular[:rank] > 1e-6 * singular[0]]
        weights = [(max(0.0, 1 - np.sum((basis.T @ u) ** 2)) + 1e-7) ** -0.25 for u in units]
    return np.median(lengths) * np.mean([basis @ (basis.T @ u) for u in units], axis=0)


_RULES = {
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "nna": nna,
    "geometric_median": geometric_median,
    "flag": flag,
}
