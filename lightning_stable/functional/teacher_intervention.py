r"""Outputs of a model's modules replaced by those of a teacher (Teacher Intervention, arXiv 2302.11812).

The output :math:`y` of a module becomes :math:`t`, that of the same module in the teacher's own pass over the batch.
What comes after it computes without the errors of what came before. In the released code :math:`t` is a constant:
no gradient of the loss reaches the module, which learns from losses of its own on :math:`y`. That is ``"stop"`` here.
``"through"`` passes the gradient at :math:`t` on to :math:`y` as if there had been no replacement, so that a module
without such losses is trained as well: our derivation, not the paper's.

The paper replaces outputs of attention first, then contexts, then maps of attention. Contexts and maps belong to
particular models and are not covered.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["GRADIENTS", "inject", "keep", "outermost"]

GRADIENTS: tuple[Literal["through", "stop"], ...] = ("through", "stop")


def outermost(names: list[str]) -> list[str]:
    """Return those of some dotted names that lie within no other of them."""
    chosen = set(names)
    return [name for name in names if not any(parent in chosen for parent in _parents(name))]


def keep(output: Any) -> list[Tensor | None]:
    """Return copies of the floating-point tensors within an output, ``None`` for what else is there."""
    return [leaf.detach().clone() if _is_replaced(leaf) else None for leaf in tree_flatten(output)[0]]


def inject(output: Any, kept: list[Tensor | None], gradients: str = "through") -> Any:
    """Return an output with the teacher's values in it.

    Args:
        output: What the module returned: a tensor, or tensors within tuples, lists and dictionaries.
        kept: What :func:`keep` made of the teacher's output. The values stay usable if the result is changed in place.
        gradients: ``"through"`` or ``"stop"``.

    Raises:
        ValueError: If the two are not alike.
    """
    leaves, shape = tree_flatten(output)
    found = [tuple(leaf.shape) if _is_replaced(leaf) else None for leaf in leaves]
    expected = [None if value is None else tuple(value.shape) for value in kept]
    if found != expected:
        raise ValueError(f"The teacher's output has tensors of shape {expected}, and here they are {found}.")
    replaced = [
        leaf if value is None else _replaced(leaf, value, gradients) for leaf, value in zip(leaves, kept, strict=True)
    ]
    return tree_unflatten(replaced, shape)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _is_replaced(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _replaced(output: Tensor, teacher: Tensor, gradients: str) -> Tensor:
    if gradients == "stop":
        return teacher.to(output.dtype, copy=True)
    passed: Tensor = _Replace.apply(output, teacher)  # type: ignore[no-untyped-call]
    return passed


class _Replace(torch.autograd.Function):
    """Forward exactly the teacher's values, which ``y + (t - y)`` would round; backward the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, teacher: Tensor) -> Tensor:
        return teacher.to(output.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
