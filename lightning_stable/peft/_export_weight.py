"""One weight with its adapter added, or with the first factors taken out of it."""

import torch
from torch import Tensor

from lightning_stable.functional._factors import shift
from lightning_stable.peft._export_lora import factors

__all__ = ["is_transposed", "merged_weight", "refuse_variants", "shifted_weight"]

# Variants of LoRA whose change of the weight is another one, or is none of a weight.
_VARIANTS = (
    *("target_parameters", "layer_replication", "alora_invocation_tokens", "trainable_token_indices", "arrow_config"),
    *("kasa_config", "velora_config", "monteclora_config", "use_qalora", "use_bdlora", "lora_bias"),
    "ensure_weight_tying",
)
# Families of transformers whose layers are Conv1D, which holds a weight as (in, out).
_CONV1D = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")


def refuse_variants(config: dict[str, object]) -> None:
    """Raise ``ValueError`` if an adapter of this config cannot be added to a weight."""
    if found := [name for name in _VARIANTS if config.get(name)]:
        raise ValueError(
            f"Adapters with {found[0]} are not merged here. Export with --as lora, load that folder by "
            "PeftModel.from_pretrained, and merge by its merge_and_unload."
        )


def is_transposed(
    shapes: dict[str, tuple[int, ...]], parts: dict[str, dict[str, Tensor]], model_type: str, fan_in_fan_out: bool
) -> dict[str, bool]:
    """Tell which weights are held as (in, out).

    The factors' shapes tell it of every weight that is not square, and one such weight of all, as a model has one kind
    of layers.

    Args:
        shapes: Of the weights, by layer.
        parts: The factors of LoRA, by layer.
        model_type: Of the model's config.
        fan_in_fan_out: What the config of the adapters says, which counts where all weights are square.
    """
    known, other = dict[str, bool](), dict[str, bool]()
    for layer, found in parts.items():
        down, up = factors(found)
        sides = (len(found[up]), found[down].shape[1])
        if len(shapes[layer]) != 2 or "embedding" in down:
            other[layer] = False
        elif sides[0] != sides[1]:
            known[layer] = shapes[layer] == sides[::-1]
    square = all(known.values()) if known else fan_in_fan_out or model_type in _CONV1D
    return {**dict.fromkeys(parts, square), **known, **other}


def shifted_weight(weight: Tensor, first: dict[str, Tensor], scaling: float, *, transposed: bool = False) -> Tensor:
    """Return the base as training had it: without the product of the first factors."""
    matrix = shift(weight.T if transposed else weight, first["a"], first["b"], scaling)
    return matrix.T if transposed else matrix


def merged_weight(weight: Tensor, parts: dict[str, Tensor], scaling: float, *, transposed: bool = False) -> Tensor:
    r"""Return a weight with its adapter added, :math:`W + s B A`, rounded once; with DoRA's length where it has one.

    Args:
        weight: Of a linear layer (out, in), or (in, out) if ``transposed``; of an embedding (tokens, size); of a
            convolution (out, in, ...).
        parts: The factors of LoRA.
        scaling: :math:`s`.
        transposed: How the weight is held.

    Raises:
        ValueError: If the factors do not fit.
    """
    down, up = factors(parts)
    a, b = parts[down].flatten(1), parts[up].flatten(1)
    a, b = (b.T, a.T) if down == "lora_embedding_A" else (a, b)
    matrix = weight.T if transposed else weight
    merged = shift(matrix.flatten(1), a, b, -scaling)
    length = parts.get("lora_magnitude_vector.weight")
    if length is not None:
        if down == "lora_embedding_A" or weight.ndim != 2:
            raise ValueError("DoRA is merged here for linear layers. Export with --as lora.")
        merged = (length.flatten() / torch.linalg.norm(merged.float(), dim=1)).unsqueeze(1).to(merged) * merged
    merged = merged.view_as(matrix)
    return merged.T if transposed else merged
