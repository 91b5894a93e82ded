"""``lightning-stable export-adapter``: trained adapters as a PEFT folder, or merged into the model.

The work is in :mod:`lightning_stable.peft._export`. What the forms are, and which one to take: ``lightning-stable show
export_adapter``.
"""

import argparse
import sys
from pathlib import Path

from lightning_stable.cli.locate import CommandError, short_path
from lightning_stable.registry import nearest

__all__ = ["export"]

_FORMS = ("lora", "merged", "native")
_NEXT = {
    "lora": "Load it: peft.PeftModel.from_pretrained(base, {out!r})",
    "merged": "Load it: transformers.AutoModelForCausalLM.from_pretrained({out!r}), or the class of your model",
    "native": "Load it: peft.PeftModel.from_pretrained(base, {out!r})",
}


def export(options: argparse.Namespace) -> None:
    """Write the adapters of a checkpoint to a folder, and say what is there.

    Args:
        options: With ``checkpoint``, ``out``, ``form``, ``base`` and ``force``.

    Raises:
        CommandError: If there are no adapters to be had, the base is another one, or the folder cannot be written.
    """
    if options.form not in _FORMS:
        raise CommandError(f"--as {options.form}: there is no such form. {nearest(options.form, list(_FORMS))}")
    out = Path(options.out)
    if out.is_dir() and any(out.iterdir()) and not options.force:
        raise CommandError(f"{out} is not empty. Give another folder, or --force to replace an earlier export there.")
    from lightning_stable.peft._export import export_adapter

    try:
        done = export_adapter(options.checkpoint, out, form=options.form, base=options.base, force=options.force)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    sys.stdout.write(f"{done.summary}: {short_path(out)}\n{_NEXT[options.form].format(out=str(out))}\n")
    for note in done.notes:
        sys.stderr.write(f"lightning-stable: warning: {note}\n")
