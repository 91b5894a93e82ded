"""Slow twins of the outer steps of the local-update methods, in NumPy, float64: one flat vector, whole histories.

A history is the list of mean movements (start minus end) in the order in which their outer steps are taken. Each twin
returns the anchors: the starting one, then one after each step.
"""

import itertools

import numpy as np


def local_sgd(start, history):
    """Plain steps."""
    return [np.subtract(start, sum(history[:k], np.zeros_like(start))) for k in range(len(history) + 1)]


def slowmo(start, history, rates, alpha, beta):
    """SlowMo, by the sum that its momentum unrolls to; a rate of 0 drops its movement."""
    anchors = [np.array(start)]
    for t, rate in enumerate(rates):
        unrolled = np.zeros_like(start)
        for s in range(t + 1):
            if rates[s] != 0:
                unrolled += beta ** (t - s) * history[s] / rates[s]
        anchors.append(anchors[-1] - alpha * rate * unrolled)
    return anchors


def diloco(start, history, alpha, mu):
    """Nesterov's momentum, by its unrolled sum."""
    anchors = [np.array(start)]
    for t, movement in enumerate(history):
        unrolled = sum(mu ** (t - s) * history[s] for s in range(t + 1))
        anchors.append(anchors[-1] - alpha * (movement + mu * unrolled))
    return anchors


def co2(start, history, alpha, beta, clip=None, penalty=1.0):
    """CO2: penalty, momentum, clip, in this order. ``"gap"`` looks back at the anchors themselves."""
    anchors, momentum = [np.array(start)], np.zeros_like(start)
    for movement in history:
        divisor = gap(anchors) if penalty == "gap" else penalty
        momentum = beta * momentum + movement / divisor
        if clip is not None:
            momentum = np.minimum(np.maximum(momentum, -clip), clip)
        anchors.append(anchors[-1] - alpha * momentum)
    return anchors


def gap(anchors):
    """Return 1 + the length of the last movement of the anchor over the greatest of all, 1 where it never moved."""
    lengths = [np.sqrt(np.sum((after - before) ** 2)) for before, after in itertools.pairwise(anchors)]
    return 1.0 if not lengths or max(lengths) == 0 else 1.0 + lengths[-1] / max(lengths)
