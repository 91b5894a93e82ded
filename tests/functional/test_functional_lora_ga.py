"""LoRA-GA: the first step is the best of its rank, the factors are the reference's, and peft's fall short."""

import peft
import pytest
import torch
from oracles import adapter_init_twin as twin
from torch import nn

from lightning_stable.functional.lora_ga import DIRECTIONS, SCALES, lora_ga_factors

SHAPES = [(40, 64), (64, 40)]


def pair(out_features=40, in_features=64, seed=0, scale=1e-3):
    """Return a weight, and the gradient of a small regression by it, averaged over two batches."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    total = torch.zeros_like(weight)
    for _ in range(2):
        inputs = torch.randn(96, in_features, generator=generator) * torch.linspace(2, 0.1, in_features)
        errors = torch.randn(96, out_features, generator=generator) * torch.linspace(0.1, 3, out_features)
        total += scale * errors.T @ inputs / 96
    return weight, total / 2


# ----------------------------------------------------------------------------- the first step


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_first_step_is_the_best_that_twice_the_rank_can_do(shape, direction, scale):
    weight, gradient = pair(*shape)
    for rank in (1, 4):
        a, b, _ = lora_ga_factors(weight, gradient, rank, 2.0, direction=direction, scale=scale, exact=True)
        bound = twin.tail(gradient, 2 * rank)
        found = twin.shortfall(twin.first_step(gradient, a, b, 2.0), gradient)
        assert (1 - 1e-6) * bound <= found <= (1 + 1e-3) * bound
        # Far below what rank r could do, so the bound says something.
        assert found < 0.97 * twin.tail(gradient, rank)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_randomised_search_comes_near_the_bound(direction):
    weight, gradient = pair()
    a, b, _ = lora_ga_factors(weight, gradient, 4, 2.0, direction=direction)
    found = twin.shortfall(twin.first_step(gradient, a, b, 2.0), gradient)
    assert found < 1.01 * twin.tail(gradient, 8)


def test_the_bound_holds_for_other_starts():
    gradient, generator = pair()[1], torch.Generator().manual_seed(1)
    for _ in range(20):
        a, b = torch.randn(4, 64, generator=generator), torch.randn(40, 4, generator=generator)
        assert twin.shortfall(twin.first_step(gradient, a, b, 1.0), gradient) > twin.tail(gradient, 8)


@pytest.mark.parametrize("scale", ["stable", "unit"])
@pytest.mark.parametrize("direction", ["ArB2r", "ArBr", "A2rBr"])
def test_pefts_is_at_best_at_the_bound_of_its_own_rank(direction, scale):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 40, bias=False)
    layer.weight.data = torch.randn(40, 64, generator=generator) / 8
    batches = [(torch.randn(96, 64, generator=generator), torch.randn(96, 40, generator=generator)) for _ in range(2)]
    model = nn.Sequential(layer)

    def loss(inputs, targets):
        # peft's backward hooks warn where the inputs need no gradient.
        return 1e-2 * (model(inputs.requires_grad_()) - targets * torch.linspace(0.1, 3, 40)).square().mean()

    gradient = sum(torch.autograd.grad(loss(*batch), layer.weight)[0] for batch in batches) / 2
    weight = layer.weight.detach().clone()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction=direction, scale=scale),
    )
    with torch.random.fork_rng():
        peft.preprocess_loraga(model, config, lambda: [loss(*batch).backward() for batch in batches])
        assert torch.allclose(layer._peft_loraga_grad, gradient, rtol=1e-5, atol=1e-9)
        injected = peft.inject_adapter_in_model(config, model)[0]
    a, b = injected.lora_A["default"].weight.detach(), injected.lora_B["default"].weight.detach()
    theirs = twin.shortfall(twin.first_step(gradient, a, b, 2.0), gradient)
    ours = lora_ga_factors(weight, gradient, 4, 2.0, direction=direction, scale=scale, exact=True)
    mine = twin.shortfall(twin.first_step(gradient, ours.a, ours.b, 2.0), gradient)
    assert theirs > 0.999 * twin.tail(gradient, 4) > 1.05 * mine
    if direction == "ArB2r":
        assert theirs < 1.001 * twin.tail(gradient, 4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_first_step_of_autograd_moves_the_product_by_m(direction):
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(40, 64, generator=generator) / 8).double()
    inputs = torch.randn(96, 64, generator=generator, dtype=torch.float64)
    targets = torch.randn(96, 40, generator=generator, dtype=torch.float64)

    def loss(matrix):
        return (inputs @ matrix.T - targets).square().mean()

    whole = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(whole), whole)
    factors = lora_ga_factors(weight, gradient, 4, 2.0, direction=direction, exact=True)
    a, b = factors.a.clone().requires_grad_(), factors.b.clone().requires_grad_()
    assert loss(factors.residual + 2 * b @ a).item() == pytest.approx(loss(weight).item(), rel=1e-12)
    by_a, by_b = torch.autograd.grad(loss(factors.residual + 2 * b @ a), (a, b))
    rate = 1e-5
    moved = 2 * ((b - rate * by_b) @ (a - rate * by_a) - b @ a).detach()
    assert twin.relative(moved, -rate * twin.first_step(gradient, a.detach(), b.detach(), 2.0)) < 1e-4
    assert loss(factors.residual + 2 * (b - rate * by_b) @ (a - rate * by_a)) < loss(weight)


# ----------------------------------------------------------------------------- the factors


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_the_twins(shape, direction, scale):
    weight, gradient = pair(*shape)
    a, b, _ = lora_ga_factors(weight, gradient, 3, 0.5, direction=direction, scale=scale, gamma=9.0, exact=True)
    expected_a, expected_b = twin.lora_ga(weight, gradient, 3, 0.5, direction, scale, 9.0)
    signs_a = (a.double() * expected_a).sum(1, keepdim=True).sign()
    signs_b = (b.double() * expected_b).sum(0).sign()
    assert twin.relative(a * signs_a, expected_a) < 1e-4
    assert twin.relative(b * signs_b, expected_b) < 1e-4


def test_stable_scale_by_hand():
    weight, gradient = pair(16, 64)
    a, b, _ = lora_ga_factors(weight, gradient, 2, 3.0, gamma=4.0)
    # 16^(1/4) / sqrt(4) = 1 whatever the scaling is, for both factors.
    assert torch.allclose(a @ a.T, torch.eye(2), atol=1e-5)
    assert torch.allclose(b.T @ b, torch.eye(2), atol=1e-5)


def test_random_splits_all_directions_and_follows_the_generator():
    weight, gradient = pair()
    left, _, right = torch.linalg.svd(gradient.double())
    splits = set()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        a, b, _ = lora_ga_factors(
            weight, gradient, 3, 1.0, direction="random", scale="unit", exact=True, generator=generator
        )
        rows = (a.double() @ right[:6].T).abs().round().argmax(1).tolist()
        columns = (left[:, :6].T @ b.double()).abs().round().argmax(0).tolist()
        assert sorted(rows + columns) == [*range(6)]
        splits.add(tuple(rows))
    assert len(splits) > 2


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_search_is_seeded_and_leaves_the_global_generator_alone(direction):
    weight, gradient = pair(80, 96)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(lora_ga_factors(weight, gradient, 2, 1.0, direction=direction, scale="weightS"))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_length_of_the_gradient_is_of_no_effect(size):
    weight, gradient = pair()
    expected = lora_ga_factors(weight, gradient, 3, 1.0, exact=True)
    found = lora_ga_factors(weight, gradient.double() * size, 3, 1.0, exact=True)
    assert torch.allclose(found.a, expected.a, atol=1e-4)
    assert torch.allclose(found.b, expected.b, atol=1e-4)


def test_gradient_of_few_directions_still_gives_orthonormal_factors():
    weight, gradient = pair()
    few = gradient[:, :2] @ torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    for exact in (False, True):
        a, b, _ = lora_ga_factors(weight, few, 3, 1.0, direction="A2rBr", scale="unit", exact=exact)
        assert torch.allclose(a @ a.T, torch.eye(3), atol=1e-4)
        assert twin.widest_angle(b.T, torch.linalg.svd(few)[0][:, :2].T) < 1e-3


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_function_is_preserved(dtype, tolerance, scale):
    weight, gradient = (tensor.to(dtype) for tensor in pair(256, 320))
    kept = (weight.clone(), gradient.clone())
    factors = lora_ga_factors(weight, gradient, 8, 2.0, scale=scale, gamma=64.0)
    assert torch.equal(weight, kept[0])
    assert torch.equal(gradient, kept[1])
    assert factors.residual.dtype == dtype
    assert {factors.a.dtype, factors.b.dtype} == {torch.float64 if dtype == torch.float64 else torch.float32}
    inputs = torch.randn(16, 320, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = inputs.to(factors.a.dtype)
    found = (inputs @ factors.residual.T).to(wide.dtype) + 2 * wide @ factors.a.T @ factors.b.T
    assert twin.relative(found, inputs @ weight.T) < tolerance
    assert twin.relative(factors.residual, weight) > 1e-2


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient": torch.zeros(40, 64)}, "gradient is 0 throughout"),
        ({"gradient": torch.ones(64, 40)}, r"gradient of shape \(64, 40\).*does not fit"),
        ({"gradient": torch.full((40, 64), float("nan"))}, "gradient holds values that are not finite"),
        ({"weight": torch.full((40, 64), float("inf"))}, "weight holds values that are not finite"),
        ({"gradient": torch.ones(40)}, r"gradient has shape \(40,\)"),
        ({"rank": 21}, r"rank=21 takes 42 pairs of singular vectors, which is above 40.*at most 20"),
        ({"rank": 0}, "rank=0"),
        ({"scaling": -1.0}, "scaling=-1.0"),
        ({"direction": "ArB"}, "direction='ArB' is unknown.*'ArB2r'"),
        ({"scale": "gd_scale"}, "scale='gd_scale' is unknown.*'weightS'"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"iterations": -2}, "iterations=-2"),
        ({"weight": torch.zeros(40, 64), "scale": "weightS"}, "the weight, which is 0 throughout"),
    ],
)
def test_bad_input_is_refused(change, words):
    weight, gradient = pair()
    settings = {"weight": weight, "gradient": gradient, "rank": 4, "scaling": 1.0, **change}
    with pytest.raises(ValueError, match=words):
        lora_ga_factors(**settings)
