"""Start adapters: the factors of each initialiser, written into the layers, and the base shifted where it has to be."""

import copy
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_stable.functional._factors import shift
from lightning_stable.functional.eva import eva_alpha, eva_factor
from lightning_stable.functional.lora_ga import lora_ga_pair
from lightning_stable.functional.olora import olora_pair
from lightning_stable.functional.pissa import pissa_pair, qpissa_pair
from lightning_stable.peft._config import SHIFTING_INITS
from lightning_stable.peft._data_pass import DataPass, mean_gradients
from lightning_stable.peft._features import Components, covariances, principal_components
from lightning_stable.peft._inject import ADAPTER, base_matrix, layer_seed, set_base
from lightning_stable.peft._options import residual_format
from lightning_stable.peft._quantized import quantize_base, rounded
from lightning_stable.peft._ranks import Ranks
from lightning_stable.peft._targets import Target, is_transposed

__all__ = ["Start", "apply_shift", "eva_config", "factors_of", "gather", "hold_bases", "start_layers"]


class Start(NamedTuple):
    """What was gathered from data before adapters were made.

    Attributes:
        factors: First factors ``a`` and ``b`` by layer, on the CPU: of LoRA-GA.
        first: First factor ``a`` by layer, beside which ``b`` is 0: of EVA.
        ranks: Ranks by layer: of EVA.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    first: dict[str, Tensor]
    ranks: dict[str, int]


def gather(
    init: str,
    data: DataPass,
    model: nn.Module,
    targets: dict[str, Target],
    config: Any,
    seed: int,
    options: dict[str, Any],
) -> Start:
    """Run the data through the untouched module, and return what the initialiser starts from."""
    if init == "lora_ga":
        return Start(_lora_ga(data, targets, seed, options), {}, {})
    if init == "eva":
        return _eva(data, targets, options)
    _corda(data, model, targets, config, options)  # leaves what it found on the layers, for peft
    return Start({}, {}, {})


def eva_config(config: Any, model: nn.Module, targets: dict[str, Target], ranks: dict[str, int]) -> None:
    """Write the ranks that EVA gave into a LoRA config: the layers that are left, and patterns of rank and alpha."""
    left = {name: rank for name, rank in ranks.items() if rank > 0}
    ends = tuple(f".{name}" for name in left)
    exact = all(name in left or not name.endswith(ends) for name, _ in model.named_modules())
    # peft takes a name for the end of others; an expression has to match the whole.
    config.target_modules = set(left) if exact else "|".join(map(re.escape, sorted(left)))
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern, config.alpha_pattern = {}, {}
    # For the same reason every layer is named, and the longer of two names comes first: peft takes the first that fits.
    for name in sorted(left, key=lambda each: (-len(each), each)):
        target, rank = targets[name], left[name]
        config.rank_pattern[name] = rank
        config.alpha_pattern[name] = eva_alpha(target.alpha, target.rank or rank, rank, config.use_rslora)


def start_layers(
    init: str, layers: dict[str, Any], start: Start, seed: int, options: dict[str, Any], ranks: Ranks
) -> dict[str, dict[str, Tensor]]:
    """Write the start of each layer, and return the factors that bases were shifted by, on the CPU.

    Factors are those of rank 0 on all processes.
    """
    shifts: dict[str, dict[str, Tensor]] = {}
    found = ranks.together(lambda: dict(_factors(init, layers, start, seed, options)) if ranks.rank == 0 else {})
    for name, layer in layers.items():
        held = factors_of(layer)
        if held is None:
            continue
        for place, tensor in enumerate(held):
            if name in found:
                tensor.data.copy_(found[name][place])
            tensor.data.copy_(ranks.of_first(tensor.data))
        if init in SHIFTING_INITS:
            a, b = (tensor.detach().cpu().clone() for tensor in held)
            apply_shift(layer, a, b)
            shifts[name] = {"a": a, "b": b}
    return shifts


def apply_shift(layer: Any, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> None:
    """Take the product of first factors out of the base of an adapted layer.

    Args:
        layer: The layer.
        a: Shape (rank, in).
        b: Shape (out, rank).
        dtype: That of the base when it was first shifted, if it may be another now: the result is rounded as then.
    """
    weight = base_matrix(layer)
    wanted = weight if dtype is None else weight.to(dtype)
    set_base(layer, shift(wanted, a.to(weight.device), b.to(weight.device), layer.scaling[ADAPTER]))


@torch.no_grad()
def hold_bases(layers: dict[str, Any], form: str, ranks: Ranks | None = None) -> tuple[dict[str, str], float]:
    """Hold the bases of layers in 4 bits from now on, with the codes of rank 0 where there are several processes.

    Args:
        layers: Adapted layers by name, their bases shifted already.
        form: The format.
        ranks: The processes, if they may have other bases than rank 0.

    Returns:
        What tells the codes from others, by layer, and the norm of what the bases lost.
    """
    marks, squares = dict[str, str](), 0.0
    for name, layer in layers.items():
        before = base_matrix(layer)
        held = quantize_base(layer, form)
        for part in (held.weight, held.scales) if ranks is not None else ():
            part.data.copy_(ranks.of_first(part.data))  # type: ignore[union-attr]  # there are some in this loop
        marks[name] = held.mark()
        squares += float(torch.linalg.vector_norm(before.float() - held.matrix().float())) ** 2
    return marks, squares**0.5


def factors_of(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Return the two factors of a LoRA layer as it holds them, ``None`` for a layer of another kind."""
    for kind in ("lora_A", "lora_embedding_A"):
        first = getattr(layer, kind, None)
        if first is not None and ADAPTER in first:
            pair = first[ADAPTER], getattr(layer, kind.replace("_A", "_B"))[ADAPTER]
            a, b = (part if isinstance(part, Tensor) else part.weight for part in pair)
            return a, b
    return None


def _factors(
    init: str, layers: dict[str, Any], start: Start, seed: int, options: dict[str, Any]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield the factors of each layer that the initialiser starts anew."""
    for name, layer in layers.items():
        held = factors_of(layer)
        if held is None or init == "mica" or (init == "default" and _is_variant(layer)):
            continue  # as peft has made it
        generator = torch.Generator().manual_seed(layer_seed(seed, name))
        try:
            yield name, _factors_of_one(init, name, layer, held, start, generator, options)
        except ValueError as error:
            raise ValueError(f"init={init!r}, layer {name!r}: {error}") from error


def _factors_of_one(
    init: str,
    name: str,
    layer: Any,
    held: tuple[Tensor, Tensor],
    start: Start,
    generator: torch.Generator,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    a, b = held
    if init == "lora_ga":
        return start.factors[name]
    if init == "eva":
        return start.first[name], torch.zeros_like(b)
    if init in ("orthogonal", "corda"):
        return _by_peft(init, layer, generator)
    if init in ("pissa", "olora"):
        weight, scaling = base_matrix(layer), layer.scaling[ADAPTER]
        if init == "olora":
            return olora_pair(weight, len(a), scaling)
        search = {name: value for name, value in options.items() if name in ("iterations", "oversampling")}
        if form := residual_format(options):
            rounds = options.get("rounds", 1)
            return qpissa_pair(
                weight, len(a), scaling, lambda res: rounded(res, form), rounds=rounds, generator=generator, **search
            )
        return pissa_pair(weight, len(a), scaling, generator=generator, **search)
    # Drawn on the CPU, to be the same on every device.
    first, second = torch.empty(a.shape), torch.empty(b.shape)
    if ADAPTER in getattr(layer, "lora_embedding_A", {}):
        return nn.init.zeros_(first), nn.init.normal_(second, generator=generator)
    if init == "gaussian":
        nn.init.normal_(first, std=1 / layer.r[ADAPTER], generator=generator)
    else:
        nn.init.kaiming_uniform_(first, a=5**0.5, generator=generator)
    return first, nn.init.zeros_(second)


def _by_peft(init: str, layer: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Let peft start a layer, and take its factors; the layer is afterwards as before."""
    base = layer.get_base_layer().weight
    parameters = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    values = [parameter.data for parameter in parameters]
    weight = base.data.clone() if init == "corda" else base.data
    with isolate_rng(), torch.no_grad():
        torch.manual_seed(generator.initial_seed())
        if init == "orthogonal":
            layer.orthogonal_init(ADAPTER)
        else:
            layer.corda_init(ADAPTER, init)
    base.data = weight
    found = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
    for linear, parameter, value in zip((layer.lora_A, layer.lora_B), parameters, values, strict=True):
        parameter.data = value
        linear[ADAPTER].weight = parameter
    return found


def _is_variant(layer: Any) -> bool:
    """Tell whether peft starts a layer in a way of its own: a variant of LoRA other than DoRA, or a bare parameter."""
    variants = getattr(layer, "lora_variant", {})
    return type(layer).__name__ == "ParamWrapper" or any("Dora" not in type(v).__name__ for v in variants.values())


def _lora_ga(
    data: DataPass, targets: dict[str, Target], seed: int, options: dict[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    weights = {name: target.layer.weight for name, target in targets.items()}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    failure: ValueError | None = None
    for name, gradient in mean_gradients(data, weights):  # type: ignore[arg-type]  # checked to be parameters
        target = targets[name]
        weight = base_matrix(target.layer)
        slope = (gradient.T if is_transposed(target.layer) else gradient).to(weight.device)
        if data.ranks.rank > 0 or failure is not None:
            continue  # rank 0 computes for all, and the others still have gradients to add up with it
        generator = torch.Generator().manual_seed(layer_seed(seed, name))
        try:
            a, b = lora_ga_pair(weight, slope, target.rank or 0, target.scaling, generator=generator, **options)
        except ValueError as error:
            failure = ValueError(f"{data.owner}: init='lora_ga', layer {name!r}: {error}")
            continue
        found[name] = a.cpu(), b.cpu()
    data.ranks.together(lambda: _fail(failure))
    return found


def _fail(failure: ValueError | None) -> None:
    if failure is not None:
        raise failure


def _eva(data: DataPass, targets: dict[str, Target], options: dict[str, Any]) -> Start:
    layers = {name: target.layer for name, target in targets.items()}
    components = Components(
        data.owner,
        layers,
        {name: target.rank or 0 for name, target in targets.items()},
        rho=options.get("rho", 2.0),
        tau=options.get("tau", 0.99),
        share_inputs=options.get("share_inputs", True),
    )
    states = principal_components(data, components, layers)
    ranks = data.ranks.every(components.given_ranks(states))[0]
    if not any(ranks.values()):
        raise ValueError(
            f"{data.owner}: init='eva' found no directions to start from: what goes into the layers does not vary over "
            f"{data.report.batches} batches. Look at the inputs, or give more init_batches."
        )
    leaders = components.leaders
    whiten = options.get("whiten", False)
    first = {name: eva_factor(states[leaders[name]], rank, whiten) for name, rank in ranks.items() if rank}
    return Start({}, first, ranks)


def _corda(data: DataPass, model: nn.Module, targets: dict[str, Target], config: Any, options: dict[str, Any]) -> None:
    """Gather covariances, and let peft decompose the weights by them."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    found = covariances(data, {name: target.layer for name, target in targets.items()})
    asked = copy.deepcopy(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "covariances.pt"
        torch.save(found, path)
        asked.corda_config = CordaConfig(covariance_file=str(path), corda_method=options.get("method", "ipm"))
        preprocess_corda(model, asked)
