"""The options of ``lightning-stable sweep``: apart from what carries it out, which no other command has to load."""

import argparse

__all__ = ["DIVERGED_AT", "add_sweep_options"]

DIVERGED_AT = 0.25
"""Share of what a run had learnt that it may lose."""

_EPILOG = """\
Everything else goes on to each run, as in 'lightning-stable fit': --trainer.max_steps 500, --vars.batch_size 32.

precisions:
  32-true, bf16-mixed ...  the host's own
  e8m5                     SimulatedPrecision with weights, activations and gradients in that format
  e4m3/e5m2                weights and activations in the first, gradients in the second
  int4:group:128           with a scaling: tensor, channel, row, group:N

Started again with the same --out it goes on: runs that have ended are not run again. More seeds, rates and precisions
may be added. The guide: lightning-stable show sweep
"""


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("-c", "--config", action="append", required=True, help="a recipe's name, a YAML file or addon:NAME; repeatable")
    add("--lr", nargs="+", type=float, required=True, metavar="LR", help="the learning rates")
    add("--precision", nargs="+", default=["32-true"], metavar="P", help="the precisions (default: 32-true)")
    add("--seeds", nargs="+", type=int, default=[5], metavar="N", help="how many seeds, or the seeds (default: 5)")
    add("--jobs", type=int, default=1, metavar="N", help="runs side by side (default: 1)")
    add("--out", default="runs/sweep", metavar="DIR", help="where everything is written (default: runs/sweep)")
    add("--lr-key", default="vars.lr", metavar="KEY", help="the option that sets the rate (default: vars.lr)")
    add("--metric", default="val_loss", metavar="NAME", help="the logged loss to judge by (default: val_loss)")
    add(
        "--diverged-at",
        type=float,
        default=DIVERGED_AT,
        metavar="SHARE",
        help="a run that lost more than this share of what it had learnt has diverged (default: 0.25)",
    )
    add("--keep-checkpoints", action="store_true", help="keep the checkpoints of runs that ended")
    add("--ray", action="store_true", help="run by Ray, on the machines of its cluster")
    add("--gpus-per-run", type=float, default=0.0, metavar="N", help="with --ray: GPUs of a run (default: 0)")
