"""What simulating low-bit training costs: the step of quantized layers against fp32's and against torchao's.

Four linear layers of 1024 x 1024 with biases, 512 rows of random input, forward and backward pass with a random
gradient of the output; only times are measured. Ours are the layers that :mod:`lightning_stable.functional.simulated`
converts, the peers those that torchao's quantization-aware training prepares, ``QATConfig(step="prepare")``. All have
the same weights.

**All operands.** Weights, activations and gradients are quantized, in both backward products too; torchao's fake
quantizers leave gradients as they are. ``Scale`` is which entries share one. ``fp32 again`` is not quantized: how far
its ratio is from 1 is how far the others' may be off.

**Shared formats.** Both quantize the same operands, those that torchao covers: weights, and for some formats inputs.
Ours are set as close as they come to what torchao does. What is the same and what is not:

* Both multiply in fp32 with quantized values, and leave the gradients that arrive as they are.
* ``e4m3`` and ``e5m2``: the same values, other gradients. torchao's cast sends what flows back through 8 bits without a
  scale, where small gradients become zero.
* Symmetric integers: torchao has one code more below zero and a scale for half a code more on either side, so that the
  largest entries saturate, and they get no gradient. With ours none saturates.
* Asymmetric integers: torchao's codes begin at the lowest entry, ours have one for zero. Its zero point has to be set
  to a float, as its default cuts these zero points to integers, mostly zero. Its int8 inputs are the same as ours.
* ``mxfp8``, ``mxfp4``: the same values, with torchao's scale set to rounding down, as the standard has it (its own
  default rounds up). torchao packs the elements, unpacks them and multiplies by the scale; ours never leave fp32.
* ``nvfp4``: torchao prepares the layer, whose forward pass needs a kernel of a GPU.

``Outputs differ`` is the norm of the difference over the norm of torchao's output, and ``Cosine`` that of the first
layer's weight gradient to fp32's, torchao's before ours.

In each round a case takes a step of fp32, one of torchao's and one of ours right after one another, in an order that is
reversed from round to round; the ratio is that of the neighbours, and the table has the medians over the rounds. With
one thread times are processor time, which other load disturbs less; with as many as there are cores, the clock on the
wall, and the machine has to be at rest.

Targets: masked mantissas (``e8m7``, ``e8m5``, ``e8m3`` truncated, no scale) within 10 % of fp32; in every shared format
at least as fast as torchao.
"""

import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from _report import arguments, publish, table, verdict
from torch import Tensor, nn

from lightning_stable.functional.quantize import Quantizer
from lightning_stable.functional.simulated import convert

LAYERS, WIDTH, BATCH = 4, 1024, 512
ROUNDS = 15
MASK_TARGET, PEER_TARGET = 1.10, 1.0


class Case(NamedTuple):
    """What is quantized, and how.

    Attributes:
        format: As the table names it.
        scale: Which entries share a scale, as the table names it.
        operands: The quantizers of :func:`convert`.
        peer: Returns torchao's configurations of activations and weights; ``None`` if it has none.
        masks: Whether the first target is about it.
    """

    format: str
    scale: str
    operands: dict[str, Quantizer]
    peer: Callable[[], tuple[Any, Any]] | None = None
    masks: bool = False

    def __str__(self) -> str:
        return f"{self.format}, {self.scale}"


def _every(name: str, scaling: str = "none", rounding: str = "nearest", label: str = "", gradients: str = "") -> Case:
    """Return the case of all three operands."""
    quantizer = Quantizer(name, scaling, rounding)
    operands = {"weights": quantizer, "activations": quantizer}
    operands["gradients"] = Quantizer(gradients or name, scaling, rounding)
    how = {"truncate": " truncated", "stochastic": " stochastic"}.get(rounding, "")
    scale = {"mx": "block of 32", "nv": "block of 16"}.get(name[:2], scaling)
    masks = rounding == "truncate" and scaling == "none"
    return Case(f"{label or name}{how}", scale, operands, masks=masks)


ALL_OPERANDS = (
    Case("fp32 again", "none", {}),
    *(_every(f"e8m{bits}", rounding=rounding) for rounding in ("truncate", "nearest") for bits in (7, 5, 3)),
    _every("e8m3", rounding="stochastic"),
    _every("e4m3", "tensor", label="e4m3/e5m2", gradients="e5m2"),
    _every("e4m3", "tensor", "stochastic", label="e4m3/e5m2", gradients="e5m2"),
    *(_every(name, scaling) for name in ("int8", "int4") for scaling in ("channel", "group:128")),
    _every("int4", "group:128", "stochastic"),
    *(_every(name) for name in ("mxfp8", "mxfp4", "nvfp4")),
    _every("nvfp4", rounding="stochastic"),
)


def _integer(dtype: str, tokens: bool = False, **settings: Any) -> Callable[[], tuple[Any, Any]]:
    """Return what makes torchao's configurations of integer weights, and of int8 activations for each token."""

    def build() -> tuple[Any, Any]:
        from torchao.quantization.qat import IntxFakeQuantizeConfig
        from torchao.quantization.quant_primitives import ZeroPointDomain

        activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if tokens else None
        floating = {"zero_point_domain": ZeroPointDomain.FLOAT, "zero_point_precision": torch.float32}
        more = floating if settings.get("is_symmetric") is False else {}
        return activations, IntxFakeQuantizeConfig(getattr(torch, dtype), **settings, **more)

    return build


def _float8(dtype: torch.dtype, granularity: str) -> Callable[[], tuple[Any, Any]]:
    def build() -> tuple[Any, Any]:
        from torchao.quantization import granularity as granularities
        from torchao.quantization.qat import Float8FakeQuantizeConfig

        both = Float8FakeQuantizeConfig(dtype, getattr(granularities, granularity)())
        return both, both

    return build


def _microscaling(dtype: torch.dtype) -> Callable[[], tuple[Any, Any]]:
    def build() -> tuple[Any, Any]:
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.qat import MXFakeQuantizeConfig

        both = MXFakeQuantizeConfig(dtype, scaling_mode=ScaleCalculationMode.FLOOR)
        return both, both

    return build


def _nvfp4() -> tuple[Any, Any]:
    from torchao.prototype.qat import NVFP4FakeQuantizeConfig

    return NVFP4FakeQuantizeConfig(), NVFP4FakeQuantizeConfig(use_swizzled_scales=True)


def _shared(name: str, scaling: str, peer: Callable[[], tuple[Any, Any]], tokens: bool = False, **more: Any) -> Case:
    """Return a case of the weights and, for float formats or with ``tokens``, the activations."""
    operands = {"weights": Quantizer(name, scaling, **more)}
    label = f"{name}, asymmetric" if more.get("asymmetric") else name
    if tokens:
        operands["activations"] = Quantizer("int8", "row", asymmetric=True)
        label += ", int8 inputs"
    elif not name.startswith("int"):
        operands["activations"] = operands["weights"]
    scale = {"mx": "block of 32", "nv": "block of 16"}.get(name[:2], scaling)
    return Case(label, scale, operands, peer)


SHARED = (
    _shared("int8", "channel", _integer("int8", granularity="per_channel")),
    _shared("int8", "group:128", _integer("int8", group_size=128)),
    _shared("int4", "channel", _integer("int4", granularity="per_channel")),
    _shared("int4", "group:128", _integer("int4", group_size=128)),
    _shared("int4", "group:128", _integer("int4", group_size=128, is_symmetric=False), asymmetric=True),
    _shared("int4", "group:32", _integer("int4", tokens=True, group_size=32), tokens=True),
    _shared("e4m3", "tensor", _float8(torch.float8_e4m3fn, "PerTensor")),
    _shared("e4m3", "row", _float8(torch.float8_e4m3fn, "PerRow")),
    _shared("e5m2", "tensor", _float8(torch.float8_e5m2, "PerTensor")),
    _shared("mxfp8", "none", _microscaling(torch.float8_e4m3fn)),
    _shared("mxfp8_e5m2", "none", _microscaling(torch.float8_e5m2)),
    _shared("mxfp4", "none", _microscaling(torch.float4_e2m1fn_x2)),
    _shared("nvfp4", "none", _nvfp4),
)


class Bench:
    """The layers, their input, and how long a step takes."""

    def __init__(self, width: int, batch: int, threads: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.plain = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
        for layer in self.plain:
            nn.init.normal_(layer.weight, std=width**-0.5, generator=generator)
        self.x = torch.randn(batch, width, generator=generator)
        self.gradient = torch.randn(batch, width, generator=generator) / (batch * width)
        self.clock = time.process_time if threads == 1 else time.perf_counter

    def twin(self) -> nn.Sequential:
        """Return other layers with the same parameters."""
        layers = []
        for layer in self.plain:
            layers.append(nn.Linear(layer.in_features, layer.out_features, device="meta"))
            layers[-1].weight, layers[-1].bias = layer.weight, layer.bias
        return nn.Sequential(*layers)

    def ours(self, case: Case) -> nn.Sequential:
        """Return layers that are converted."""
        layers = self.twin()
        if case.operands:
            convert(layers, **case.operands)
        return layers

    def peer(self, case: Case) -> nn.Sequential | str | None:
        """Return the layers that torchao prepares, or why they do not run here; ``None`` if there are none."""
        if case.peer is None or _torchao() is None:
            return None
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        layers = self.twin()
        activations, weights = case.peer()
        quantize_(layers, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
        try:
            self.step(layers)
        except Exception as error:
            # Whatever keeps it from running here.
            return f"{type(error).__name__}: {error}"
        return layers

    def step(self, layers: nn.Module) -> float:
        """Take a step and return its seconds; the gradients stay."""
        self.plain.zero_grad()
        began = self.clock()
        layers(self.x).backward(self.gradient)
        return self.clock() - began

    def result(self, layers: nn.Module) -> tuple[Tensor, Tensor]:
        """Return the output, and the gradient of the first weight."""
        self.step(layers)
        gradient = self.plain[0].weight.grad
        with torch.no_grad():
            return layers(self.x), gradient.clone()

    def agreement(self, ours: nn.Module, peer: nn.Module) -> dict[str, float]:
        """Return how far the outputs differ, and the cosines of the gradients to fp32's."""
        (own, own_gradient), (other, other_gradient) = self.result(ours), self.result(peer)
        exact = self.result(self.plain)[1]
        cosines = [
            nn.functional.cosine_similarity(g.flatten(), exact.flatten(), 0) for g in (other_gradient, own_gradient)
        ]
        difference = float((own - other).norm() / other.norm())
        return {"outputs_differ": difference, "peer_cosine": float(cosines[0]), "cosine": float(cosines[1])}


def measure(cases: tuple[Case, ...], rounds: int, width: int, batch: int, threads: int) -> list[dict[str, Any]]:
    """Return the numbers of each case."""
    torch.set_num_threads(threads)
    bench = Bench(width, batch, threads)
    entries = []
    for case in cases:
        ours, peer = bench.ours(case), bench.peer(case)
        runs = {"fp32": bench.plain, "peer": peer, "ours": ours}
        runs = {name: layers for name, layers in runs.items() if isinstance(layers, nn.Module)}
        entries.append((case, peer, runs, {name: [] for name in runs}))
    for index in range(-1, rounds):
        # The first round warms up.
        for _, _, runs, times in entries[:: 1 if index % 2 else -1]:
            for name in list(runs)[:: 1 if index % 2 else -1]:
                seconds = bench.step(runs[name])
                if index >= 0:
                    times[name].append(seconds)
        print(f"{_threads(threads)}, round {index + 1} of {rounds}: done", flush=True)
    results = []
    for case, peer, runs, times in entries:
        found = {"case": str(case), "threads": threads, "peer_failed": peer if isinstance(peer, str) else None}
        found |= {f"{name}_ms": statistics.median(values) * 1e3 for name, values in times.items()}
        for base in ("fp32", "peer"):
            if base in times:
                ratios = [own / other for own, other in zip(times["ours"], times[base], strict=True)]
                found[f"to_{base}"] = statistics.median(ratios)
                found[f"to_{base}_quartiles"] = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else None
        if "peer" in runs:
            found |= bench.agreement(runs["ours"], runs["peer"])
        results.append(found | {"raw_seconds": times})
    return results


def all_operands(results: dict[int, list[dict[str, Any]]]) -> str:
    """Return the table of the cases without a peer, the ratios for each number of threads."""
    rows = []
    for index, case in enumerate(ALL_OPERANDS):
        found = [results[threads][index] for threads in results]
        cells = [cell for f in found for cell in (f"{f['fp32_ms']:.0f}", f"{f['ours_ms']:.0f}", _ratio(f, "to_fp32"))]
        rows.append([case.format, case.scale, *cells])
    head = [f"{name}, {_threads(threads)}" for threads in results for name in ("fp32, ms", "Ours, ms", "Ours / fp32")]
    return table(["Format", "Scale", *head], rows)


def shared(results: list[dict[str, Any]]) -> str:
    """Return the table of the cases with a peer, for one number of threads."""
    rows = []
    for case, found in zip(SHARED, results, strict=True):
        peer = f"{found['peer_ms']:.0f}" if "peer_ms" in found else "fails" if found["peer_failed"] else ""
        same = ["", ""]
        if "cosine" in found:
            same = [f"{found['outputs_differ']:.0e}" if found["outputs_differ"] else "equal"]
            same += [f"{found['peer_cosine']:.3f} {found['cosine']:.3f}"]
        cells = [f"{found['fp32_ms']:.0f}", peer, f"{found['ours_ms']:.0f}"]
        rows.append([case.format, case.scale, *same, *cells, _ratio(found, "to_fp32"), _ratio(found, "to_peer")])
    names = ("fp32, ms", "torchao, ms", "Ours, ms", "Ours / fp32", "Ours / torchao")
    return table(["Format", "Scale", "Outputs differ", "Cosine, torchao's, ours", *names], rows)


def _ratio(found: dict[str, Any], name: str) -> str:
    if name not in found:
        return ""
    quartiles = found[f"{name}_quartiles"]
    return f"{found[name]:.2f}" + (f" ({quartiles[0]:.2f} to {quartiles[1]:.2f})" if quartiles else "")


def _threads(threads: int) -> str:
    return "one thread" if threads == 1 else f"{threads} threads"


def compare(rounds: int, width: int, batch: int, threads: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """Return the report and the result."""
    peer = _torchao()
    every = {count: measure(ALL_OPERANDS + SHARED, rounds, width, batch, count) for count in threads}
    count = len(ALL_OPERANDS)
    first = {n: found[:count] for n, found in every.items()}
    second = {n: found[count:] for n, found in every.items()}
    masks = [
        found["to_fp32"] for n in threads for case, found in zip(ALL_OPERANDS, first[n], strict=True) if case.masks
    ]
    ratios = {f"{f['case']}, {_threads(n)}": f["to_peer"] for n in threads for f in second[n] if "to_peer" in f}
    slower = [name for name, ratio in ratios.items() if ratio > PEER_TARGET]
    masked, ahead = max(masks) <= MASK_TARGET, bool(ratios) and not slower
    lines = [
        f"{LAYERS} layers of {width} x {width}, {batch} rows, medians of {rounds} rounds; ratios with their quartiles",
        "",
        "Weights, activations and gradients quantized",
        "",
        all_operands(first),
        "",
        *(
            f"The operands that torchao ({peer or 'not installed'}) covers, {_threads(n)}\n\n{shared(second[n])}\n"
            for n in threads
        ),
        f"Masked mantissas within {MASK_TARGET - 1:.0%} of fp32: {verdict(masked)} (at most {max(masks):.2f}). "
        + (f"At least as fast as torchao in every shared format: {verdict(ahead)}" if ratios else "Without torchao")
        + (f" (slower: {'; '.join(slower)})." if slower else "."),
    ]
    result = {
        "settings": {
            "layers": LAYERS,
            "width": width,
            "batch": batch,
            "rounds": rounds,
            "threads": list(threads),
            "torchao": peer,
        },
        "all_operands": [f for n in threads for f in first[n]],
        "shared": [f for n in threads for f in second[n]],
        "targets": {"masked_mantissas": masked, "not_slower_than_torchao": ahead if ratios else None},
    }
    return "\n".join(lines), result


def _torchao() -> str | None:
    """Return the version of torchao, if it is there, and keep its import from speaking of GPUs."""
    warnings.filterwarnings("ignore")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return version("torchao")
    except PackageNotFoundError:
        return None


def main() -> None:
    options = arguments(__doc__)
    cores = os.cpu_count() or 1
    plan = (1, 128, 32, (1,)) if options.quick else (ROUNDS, WIDTH, BATCH, tuple(dict.fromkeys((1, cores))))
    publish("simulation_cost", *compare(*plan), quick=options.quick)


if __name__ == "__main__":
    main()
