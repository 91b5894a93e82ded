"""Small pieces of glue to the host: a callback's place among the others, methods wrapped for the length of a fit."""

from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch import Callback, Trainer

__all__ = ["MethodWrap", "refuse_company", "run_first", "run_last"]


def run_first(trainer: Trainer, callback: Callback) -> None:
    """Let ``callback`` run before the others, so that they see its result at each hook.

    The list is replaced, not changed: the host is iterating over the old one when ``setup`` calls this.
    """
    host = cast(Any, trainer)
    host.callbacks = [callback, *(other for other in host.callbacks if other is not callback)]


def run_last(trainer: Trainer, callback: Callback) -> None:
    """Let ``callback`` run after the others, so that what it saves holds their state of this step."""
    host = cast(Any, trainer)
    host.callbacks = [*(other for other in host.callbacks if other is not callback), callback]


def refuse_company(trainer: Trainer, callback: Callback, others: tuple[type[Callback], ...], why: str) -> None:
    """Raise ``ValueError`` if another callback of one of the classes ``others`` is in the Trainer."""
    for other in cast(Any, trainer).callbacks:
        if other is not callback and isinstance(other, others):
            raise ValueError(
                f"{type(callback).__name__} and {type(other).__name__} are both among the Trainer's callbacks: {why}. "
                "Keep one of them."
            )


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

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs) if self._active else original(*args, **kwargs)

        self._wrapped = wrapped
        setattr(target, name, wrapped)

    def undo(self) -> None:
        """Put the method back as it was."""
        self._active = False
        if vars(self._target).get(self._name) is not self._wrapped:
            return
        if self._before is None:
            delattr(self._target, self._name)
        else:
            setattr(self._target, self._name, self._before)
