"""LoLDU from its paper's equations, in plain Python: elimination with partial pivoting, and both forms of the layer."""

Matrix = list[list[float]]

__all__ = ["ldu", "matmul", "residual_form", "uniform_bounds"]


def ldu(weight: Matrix) -> tuple[list[int], Matrix, list[float], Matrix]:
    """Return order, L, d and U with ``weight[order[i]] = sum_k L[i][k] d[k] U[k]``, U with ones on its diagonal.

    ``order[i]`` is the row of the weight that became row i. A pivot of 0 leaves its row of U as it is, with 1 in d.
    """
    rows, columns = len(weight), len(weight[0])
    work = [list(row) for row in weight]
    order = list(range(rows))
    count = min(rows, columns)
    lower = [[0.0] * count for _ in range(rows)]
    for step in range(count):
        pivot = max(range(step, rows), key=lambda row: abs(work[row][step]))
        work[step], work[pivot] = work[pivot], work[step]
        lower[step], lower[pivot] = lower[pivot], lower[step]
        order[step], order[pivot] = order[pivot], order[step]
        lower[step][step] = 1.0
        if work[step][step] == 0.0:
            continue
        for row in range(step + 1, rows):
            share = work[row][step] / work[step][step]
            lower[row][step] = share
            work[row] = [a - share * b for a, b in zip(work[row], work[step], strict=True)]
    diagonal = [work[k][k] if work[k][k] != 0.0 else 1.0 for k in range(count)]
    upper = [[value / diagonal[k] if j >= k else 0.0 for j, value in enumerate(work[k])] for k in range(count)]
    return order, lower, diagonal, upper


def matmul(a: Matrix, b: Matrix) -> Matrix:
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]


def residual_form(weight: Matrix, rank: int, scale: float, z_start: list[float], z: list[float]) -> Matrix:
    """Return ``W_res + scale P L_r diag(z) U_r`` with ``W_res = W - scale P L_r diag(z_start) U_r``."""
    order, lower, _, upper = ldu(weight)
    result = [list(row) for row in weight]
    for place, row in enumerate(order):
        for k in range(rank):
            factor = scale * lower[place][k]
            for j in range(len(weight[0])):
                result[row][j] += factor * (z[k] - z_start[k]) * upper[k][j]
    return result


def uniform_bounds(diagonal: list[float]) -> tuple[float, float]:
    """Return between which numbers the start "uniform" draws: half the mean to both sides of 0."""
    half = abs(sum(diagonal) / len(diagonal)) / 2
    return -half, half
