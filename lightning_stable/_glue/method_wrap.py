"""A method of one object, wrapped for the length of a fit, and unwrapped in any order."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

__all__ = ["MethodWrap", "do_nothing"]


def do_nothing(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Stand in for a method that is not to run: what to give a :class:`MethodWrap`."""


class MethodWrap:
    """A method of one object, wrapped until :meth:`undo`.

    Undoing in any order is safe: a wrap that another one has covered in the meantime passes calls through.

    Args:
        target: The object whose method is wrapped, on the instance.
        name: The method's name.
        around: Called as ``around(original, *args, **kwargs)`` in place of the method.
    """

    def __init__(self, target: Any, name: str, around: Callable[..., Any]) -> None:
        self._target = target
        self._name = name
        self._before = vars(target).get(name)
        self._active = True
        original = getattr(target, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs) if self._active else original(*args, **kwargs)

        # The host looks through one wrap, to know from the signature what to pass.
        cast(Any, wrapped).__wrapped__ = inspect.unwrap(original)
        cast(Any, wrapped).method_wrap = self
        setattr(target, name, wrapped)

    def undo(self) -> None:
        """Put the method back as it was, once the wraps that cover this one are undone, too."""
        self._active = False
        present = vars(self._target).get(self._name)
        while isinstance(wrap := getattr(present, "method_wrap", None), MethodWrap) and not wrap._active:
            present = wrap._before
            if present is None:
                delattr(self._target, self._name)
            else:
                setattr(self._target, self._name, present)
