"""The table of methods: one row each, from which the command, the docs index and the contract suite are made.

Other distributions add rows of their own through the entry-point group ``lightning_stable.methods``; see
``docs/extend.md``.
"""

import difflib
import importlib
from typing import Any, Literal, NamedTuple

__all__ = ["METHODS", "Method", "addons_of", "find_method", "load_class", "methods", "nearest"]

Kind = Literal["callback", "strategy", "precision", "peft", "metric"]


class Method(NamedTuple):
    """One row of :data:`METHODS`, or one that another distribution adds.

    Attributes:
        name: The one name of the method: its file in every layer, its card, its addon.
        kind: What the class plugs into.
        class_path: Dotted path of the class, as a config's ``class_path``.
        paper: Its source, as an arXiv id.
        summary: What it is for, in one line.
        addons: Further packaged addons that configure the same class. A metric has none: it is no part of a Trainer.
        relatives: Further public classes of the method, as bare names in the module of ``class_path``.
    """

    name: str
    kind: Kind
    class_path: str
    paper: str
    summary: str
    addons: tuple[str, ...] = ()
    relatives: tuple[str, ...] = ()

    @property
    def class_name(self) -> str:
        """The bare class name, unique among all loaded classes."""
        return self.class_path.rpartition(".")[2]


METHODS: tuple[Method, ...] = (
    Method(
        name="wsd",
        kind="callback",
        class_path="lightning_stable.callbacks.wsd.WarmupStableDecay",
        paper="2404.06395, 2410.05192",
        summary="Warmup-stable-decay learning rate, for one horizon, many budgets (WSD-S) or an open end",
        addons=("wsd_s",),
    ),
    Method(
        name="ema",
        kind="callback",
        class_path="lightning_stable.callbacks.ema.EMA",
        paper="2306.16817",
        summary="Exponential moving average of the weights, validated, checkpointed and resumed exactly",
    ),
    Method(
        name="balanced_ema",
        kind="callback",
        class_path="lightning_stable.callbacks.balanced_ema.BalancedEMA",
        paper="2410.10868",
        summary="Weight average whose coefficient balances stability and plasticity, for each tensor and step",
    ),
    Method(
        name="sam",
        kind="callback",
        class_path="lightning_stable.callbacks.sam.SAM",
        paper="2010.01412, 2102.11600, 2203.02714, 2203.08065",
        summary="Sharpness-aware minimisation (SAM, ASAM, LookSAM, GSAM), exact under automatic optimisation",
    ),
    Method(
        name="saf",
        kind="callback",
        class_path="lightning_stable.callbacks.saf.SAF",
        paper="2205.14083",
        summary="Sharpness-aware training for free: stay near each sample's predictions of some epochs ago",
    ),
    Method(
        name="mesa",
        kind="callback",
        class_path="lightning_stable.callbacks.mesa.MESA",
        paper="2205.14083",
        summary="Memory-efficient sharpness-aware training: stay near the predictions of averaged weights",
    ),
    Method(
        name="stable_spam",
        kind="callback",
        class_path="lightning_stable.callbacks.stable_spam.StableSPAM",
        paper="2502.17055",
        summary="Adaptive clipping of gradient entries and norms, and moment reset, in front of any optimizer",
    ),
    Method(
        name="spike_guard",
        kind="callback",
        class_path="lightning_stable.callbacks.spike_guard.SpikeGuard",
        paper="2504.02507, 2204.02311",
        summary="Skip or clip updates whose gradient norm or loss leaves a running robust band; rewind after several",
    ),
    Method(
        name="orthograd",
        kind="callback",
        class_path="lightning_stable.callbacks.orthograd.OrthoGrad",
        paper="2501.04697",
        summary="Remove the part of each gradient along its weight, against growth that only scales the logits",
    ),
    Method(
        name="softmax_collapse",
        kind="callback",
        class_path="lightning_stable.callbacks.softmax_collapse.SoftmaxCollapseMonitor",
        paper="2501.04697",
        summary="Watch how many samples have a loss of exactly zero in floating point, and hardly a gradient",
    ),
    Method(
        name="stability_gap",
        kind="callback",
        class_path="lightning_stable.callbacks.stability_gap.StabilityGap",
        paper="2205.13452",
        summary="Score every task seen so far inside training, and how deep each falls when the next begins",
    ),
    Method(
        name="stability_report",
        kind="callback",
        class_path="lightning_stable.callbacks.stability_report.StabilityReport",
        paper="2204.02311",
        summary="Record every optimizer step and write one page of the run: loss, spikes, rates, gradients, and more",
    ),
    Method(
        name="replay",
        kind="callback",
        class_path="lightning_stable.callbacks.replay.Replay",
        paper="1902.10486, 2401.10393",
        summary="Train on a few stored samples beside each new batch",
    ),
    Method(
        name="l2_anchor",
        kind="callback",
        class_path="lightning_stable.callbacks.l2_anchor.L2Anchor",
        paper="2203.17269",
        summary="Hold the weights near where the last task left them",
    ),
    Method(
        name="ewc",
        kind="callback",
        class_path="lightning_stable.callbacks.ewc.EWC",
        paper="1612.00796, 1805.06370",
        summary="Elastic weight consolidation: hold those weights near the last task's that the old tasks need",
    ),
    Method(
        name="lwf",
        kind="callback",
        class_path="lightning_stable.callbacks.lwf.LwF",
        paper="1606.09282, 2203.17269",
        summary="Learning without forgetting: distil from the weights that the last task ended with",
    ),
    Method(
        name="refresh_learning",
        kind="callback",
        class_path="lightning_stable.callbacks.refresh_learning.RefreshLearning",
        paper="2403.13249",
        summary="Unlearn each batch a little before it is learned, beside a method that remembers",
    ),
    Method(
        name="lae",
        kind="callback",
        class_path="lightning_stable.callbacks.lae.LAE",
        paper="2303.10070",
        summary="Adapters that learn task after task, a slow copy of them that remembers, and a prediction by both",
    ),
    Method(
        name="co2",
        kind="strategy",
        class_path="lightning_stable.strategies.co2.CO2Strategy",
        paper="2401.16265",
        summary="Local steps between workers, with the exchange of weights hidden behind the next round of steps",
    ),
    Method(
        name="local_sgd",
        kind="strategy",
        class_path="lightning_stable.strategies.local_sgd.LocalSGDStrategy",
        paper="1805.09767, 2507.06542",
        summary="Local steps between workers, their weights averaged every so many steps or once at the end",
    ),
    Method(
        name="slowmo",
        kind="strategy",
        class_path="lightning_stable.strategies.slowmo.SlowMoStrategy",
        paper="1910.00643",
        summary="Local steps between workers, with a slow momentum over the averaged movements",
    ),
    Method(
        name="diloco",
        kind="strategy",
        class_path="lightning_stable.strategies.diloco.DiLoCoStrategy",
        paper="2311.08105",
        summary="Many local steps between workers, with an outer Nesterov SGD over the averaged movements",
    ),
    Method(
        name="compressed_ddp",
        kind="strategy",
        class_path="lightning_stable.strategies.compressed_ddp.CompressedDDPStrategy",
        paper="2106.05203, 2311.05645, 1905.13727",
        summary="DDP that sends compressed gradients, with error feedback that is checkpointed for each process",
    ),
    Method(
        name="one_bit_adam",
        kind="strategy",
        class_path="lightning_stable.strategies.one_bit_adam.OneBitAdamStrategy",
        paper="2102.02888",
        summary="Adam that after a warm-up sends one bit for each entry of its momentum, in both directions",
    ),
    Method(
        name="robust_ddp",
        kind="strategy",
        class_path="lightning_stable.strategies.robust_ddp.RobustDDPStrategy",
        paper="2302.05865, 1803.01498, 1703.02757, 2302.01772",
        summary="DDP whose gradients are combined so that some faulty workers cannot spoil them",
    ),
    Method(
        name="simulated",
        kind="precision",
        class_path="lightning_stable.precision.simulated.SimulatedPrecision",
        paper="2405.18710, 2209.05433, 2310.10537, 2502.17055, 2505.11497, 2302.11812",
        summary="Low-bit training simulated on any machine: any number format for weights, activations and gradients",
    ),
    Method(
        name="float8",
        kind="precision",
        class_path="lightning_stable.precision.float8.Float8Precision",
        paper="2209.05433",
        summary="Matrix products in 8-bit floating point by torchao, emulated where the hardware has none",
    ),
    Method(
        name="int8",
        kind="precision",
        class_path="lightning_stable.precision.int8.Int8Precision",
        paper="2304.13013",
        summary="Matrix products in 8-bit integers by torchao, forward and backward, with weights in full precision",
    ),
    Method(
        name="numerics_monitor",
        kind="callback",
        class_path="lightning_stable.callbacks.numerics_monitor.NumericsMonitor",
        paper="2209.05433",
        summary="Show per layer what a number format does to weights, activations and gradients",
    ),
    Method(
        name="logit_sharpness",
        kind="callback",
        class_path="lightning_stable.callbacks.logit_sharpness.LogitSharpness",
        paper="2405.18710",
        summary="Log the worst rise of the loss in a small box around the logits at every validation",
    ),
    Method(
        name="precision_fallback",
        kind="callback",
        class_path="lightning_stable.callbacks.precision_fallback.PrecisionFallback",
        paper="2506.20752",
        summary="Back to high precision for a while on a loss spike, a rising value or saturation, with hysteresis",
    ),
    Method(
        name="continual",
        kind="metric",
        class_path="lightning_stable.metrics.continual.ContinualMetrics",
        paper="2205.13452",
        summary="Forgetting, transfer, worst case and stability gap of a model that learns one task after another",
        relatives=(
            "AverageAccuracy",
            "BackwardTransfer",
            "Forgetting",
            "ForwardTransfer",
            "GapDepth",
            "GapRecovered",
            "GapRecovery",
            "LearningCurveArea",
            "MinAccuracy",
            "WindowedForgetting",
            "WindowedPlasticity",
            "WorstCaseAccuracy",
        ),
    ),
    Method(
        name="adapters",
        kind="peft",
        class_path="lightning_stable.peft.adapters.Adapters",
        paper="2106.09685, 2404.02948, 2407.05000, 2410.07170",
        summary="Adapters in any module, started by PiSSA, LoRA-GA, EVA or OLoRA, in checkpoints of kilobytes",
        addons=("pissa", "lora_ga", "eva"),
    ),
    Method(
        name="loldu",
        kind="peft",
        class_path="lightning_stable.peft.loldu.LoLDUConfig",
        paper="2410.13618",
        summary="Trains the leading diagonal of each weight's LDU decomposition: some ten numbers a layer",
        relatives=("LoLDUModel",),
    ),
    Method(
        name="svfit",
        kind="peft",
        class_path="lightning_stable.peft.svfit.SVFitConfig",
        paper="2409.05926",
        summary="Trains the largest singular values of each weight: some ten numbers a layer",
        relatives=("SVFitModel",),
    ),
    Method(
        name="reorthogonalise_lora",
        kind="peft",
        class_path="lightning_stable.peft.reorthogonalise_lora.ReorthogonaliseLoRA",
        paper="2505.12805",
        summary="Brings LoRA's factors into the form of their SVD as training goes on, their product unchanged",
    ),
)


def nearest(name: str, candidates: list[str]) -> str:
    """Return ``"Did you mean 'x'?"`` for the near ones among ``candidates``, else the list of all of them."""
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    if near:
        return "Did you mean " + " or ".join(repr(candidate) for candidate in near) + "?"
    return "Known names: " + ", ".join(sorted(candidates)) + "."


def find_method(name: str) -> Method:
    """Return the row called ``name``.

    Raises:
        ValueError: If there is none; the message suggests the near ones.
    """
    for method in METHODS:
        if method.name == name:
            return method
    for method in methods():  # only then: it looks through what is installed
        if method.name == name:
            return method
    raise ValueError(f"Unknown method {name!r}. {nearest(name, [method.name for method in methods()])}")


def load_class(method: Method) -> Any:
    """Import and return the class of a row."""
    module, _, attribute = method.class_path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def methods() -> tuple[Method, ...]:
    """Return :data:`METHODS` and the rows that installed distributions add; nothing heavy is imported."""
    from lightning_stable._extensions import extensions

    return (*METHODS, *(method for extension in extensions() for method in extension.methods))


def addons_of(method: Method) -> tuple[str, ...]:
    """Return the names of a method's addons: its own, unless it is a metric, and those besides."""
    return method.addons if method.kind == "metric" else (method.name, *method.addons)
