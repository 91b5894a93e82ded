"""``lightning-stable export-adapter``: trained adapters as a PEFT folder, or merged into the model.

The work is in :mod:`lightning_stable.peft._export`. What the forms are, and which one to take: ``lightning-stable show
export_adapter``.
"""

import argparse
import sys
from pathlib import Path

from lightning_stable.cli.locate import CommandError, short_path
from lightning_stable.registry import nearest

__all__ = ["add_options", "run"]

_FORMS = ("lora", "merged", "native")
_NEXT = {
    "lora": "Load it: peft.PeftModel.from_pretrained(base, {out!r})",
    "merged": "Load it: transformers.AutoModelForCausalLM.from_pretrained({out!r}), or the class of your model",
    "native": "Load it: peft.PeftModel.from_pretrained(base, {out!r})",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``export-adapter``."""
    parser.description = (
        "Write the adapters of a checkpoint, trained with the callback Adapters, to a folder. More: 'lightning-stable "
        "show export_adapter'."
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint file")
    parser.add_argument("out", metavar="OUT", help="the folder to write, empty or not there yet")
    parser.add_argument(
        "--as",
        dest="form",
        metavar="FORM",
        default="lora",
        help="lora: a PEFT folder of plain LoRA for the untouched base (the default); merged: the whole model, with "
        "--base; native: a PEFT folder of the adapters as they were trained",
    )
    parser.add_argument(
        "--base", metavar="DIR", help="the model that training started from, a folder of save_pretrained"
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")


def run(options: argparse.Namespace) -> int:
    """Write the adapters of a checkpoint to a folder, and say what is there.

    Args:
        options: With ``checkpoint``, ``out``, ``form``, ``base`` and ``force``.

    Returns:
        0: failures are errors.

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
    return 0
