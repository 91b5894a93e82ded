"""PiSSA and OLoRA: the function is preserved, the parts are those of full decompositions, bad weights are refused."""

import peft
import pytest
import torch
from oracles import adapter_init_twin as twin
from oracles import four_bit_twin
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_stable.functional._factors import shift
from lightning_stable.functional.olora import olora_factors
from lightning_stable.functional.pissa import pissa_factors, pissa_pair, qpissa_pair

DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)]
SHAPES = [(48, 80), (80, 48), (64, 64), (8, 200)]


def matrix(out_features=48, in_features=80, decay=0.6, seed=0, dtype=torch.float32):
    """Return a matrix with singular values i^-decay."""
    generator = torch.Generator().manual_seed(seed)
    small = min(out_features, in_features)
    left = torch.linalg.qr(torch.randn(out_features, small, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(in_features, small, generator=generator, dtype=torch.float64)).Q
    values = (1.0 + torch.arange(small, dtype=torch.float64)) ** -decay
    return (left * values @ right.T).to(dtype)


def split(init, weight, rank, scaling, **settings):
    return (pissa_factors if init == "pissa" else olora_factors)(weight, rank, scaling, **settings)


# ----------------------------------------------------------------------------- the function


@pytest.mark.parametrize("scaling", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_function_is_preserved(init, dtype, tolerance, shape, scaling):
    weight = matrix(*shape, dtype=dtype)
    kept = weight.clone()
    factors = split(init, weight, 8, scaling)
    assert torch.equal(weight, kept)
    assert factors.residual.dtype == dtype
    assert {factors.a.dtype, factors.b.dtype} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert (factors.a.shape, factors.b.shape) == ((8, shape[1]), (shape[0], 8))
    inputs = torch.randn(16, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = inputs.to(factors.a.dtype)
    found = (inputs @ factors.residual.T).to(wide.dtype) + scaling * wide @ factors.a.T @ factors.b.T
    assert twin.relative(found, inputs @ weight.T) < tolerance
    assert twin.relative(twin.rebuilt(factors, scaling), weight) < tolerance
    # Most of the weight has moved into the adapter, so a residual that is the weight itself would not pass.
    assert twin.relative(factors.residual, weight) > 0.3


# ----------------------------------------------------------------------------- PiSSA


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", [0.5, 3.0])
def test_pissa_is_the_principal_part(shape, scaling):
    weight = matrix(*shape)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    for iterations, tolerance in ((None, 1e-5), (12, 1e-4)):
        a, b, residual = pissa_factors(weight, 5, scaling, iterations=iterations)
        assert torch.allclose((scaling * a.norm(dim=1).square()).double(), values[:5], rtol=10 * tolerance)
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)
        # Of the two signs of a component, one is always taken.
        assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
        assert twin.widest_angle(a / a.norm(dim=1, keepdim=True), right[:5]) < tolerance * 10
        assert twin.widest_angle((b / b.norm(dim=0)).T, left[:, :5].T) < tolerance * 10
        assert float(residual.double().norm()) == pytest.approx(float(values[5:].square().sum() ** 0.5), rel=tolerance)


def test_full_pissa_is_pefts():
    weight = matrix(40, 24)
    layer = nn.Linear(24, 40, bias=False)
    layer.weight.data = weight.clone()
    config = peft.LoraConfig(r=6, lora_alpha=9, init_lora_weights="pissa", target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0]
    ours = pissa_factors(weight, 6, 1.5, iterations=None)
    assert torch.allclose(ours.residual, theirs.base_layer.weight, atol=1e-6)
    expected = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert torch.allclose(ours.b @ ours.a, expected, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_search_leaves_less_than_pefts_of_as_many_iterations(decay):
    generator = torch.Generator().manual_seed(5)
    flat = 0.02 * torch.randn(256, 256, generator=generator)
    weight = flat if decay == 0 else matrix(256, 256, decay)
    best = twin.tail(weight, 8)
    ours = float(pissa_factors(weight, 8, 2.0, generator=generator).residual.double().norm())
    theirs = []
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layer = nn.Linear(256, 256, bias=False)
            layer.weight.data = weight.clone()
            config = peft.LoraConfig(r=8, lora_alpha=16, init_lora_weights="pissa_niter_4", target_modules=["0"])
            injected = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0]
        theirs.append(float(injected.base_layer.weight.detach().double().norm()))
    assert best * (1 - 1e-6) <= ours < min(theirs)


def test_search_is_seeded_and_leaves_the_global_generator_alone():
    weight = matrix(128, 128, 0.1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = pissa_factors(weight, 4, 1.0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = pissa_factors(weight, 4, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pissa_factors(weight, 4, 1.0).a, first.a)
    seeded = [pissa_factors(weight, 4, 1.0, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(seeded[0].a, seeded[1].a)
    assert not torch.equal(seeded[0].a, first.a)


def test_oversampling_and_iterations_find_more():
    weight = matrix(128, 128, 0.1)
    left = [
        float(pissa_factors(weight, 4, 1.0, iterations=iterations, oversampling=further).residual.norm())
        for iterations, further in ((0, 0), (2, 0), (2, 16), (8, 16))
    ]
    assert left == sorted(left, reverse=True)
    assert left[0] > 1.001 * left[-1]


@pytest.mark.parametrize("rank", [1, 24])
def test_pissa_takes_all_ranks_up_to_the_smaller_side(rank):
    weight = matrix(40, 24)
    factors = pissa_factors(weight, rank, 1.0)
    assert twin.relative(twin.rebuilt(factors, 1.0), weight) < 1e-5
    if rank == 24:
        assert float(factors.residual.norm()) < 1e-5


# ----------------------------------------------------------------------------- QPiSSA


def off_by(weight, a, b, scaling, form="nf4"):
    """Return how far the start is from the weight."""
    base = four_bit_twin.rounded(shift(weight, a, b, scaling), form)
    return twin.relative(base.double() + scaling * b.double() @ a.double(), weight)


@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_quantised_residual_is_nearer_than_a_quantised_weight_and_rounds_bring_it_nearer(shape, form):
    # In float64: a code that falls the other way changes the rounds that follow.
    weight, scaling = matrix(*shape, dtype=torch.float64), 0.5

    def held(residual):
        return four_bit_twin.rounded(residual, form)

    errors = []
    for rounds in (1, 2, 5):
        a, b = qpissa_pair(weight, 4, scaling, held, rounds=rounds, iterations=None)
        errors.append(off_by(weight, a, b, scaling, form))
        starts = four_bit_twin.starts(weight, 4, form, rounds)
        product, base = min(starts, key=lambda start: twin.relative(start[0] + start[1], weight))
        assert twin.relative(scaling * b.double() @ a.double(), product) < 1e-9, rounds
        assert errors[-1] == pytest.approx(twin.relative(product + base, weight), rel=1e-9)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[0] < twin.relative(held(weight), weight)


def test_one_round_gives_the_factors_of_pissa():
    weight = matrix(dtype=torch.bfloat16)
    kept = weight.clone()
    found = qpissa_pair(weight, 4, 2.0, four_bit_twin.rounded)
    assert all(torch.equal(one, other) for one, other in zip(found, pissa_pair(weight, 4, 2.0), strict=True))
    assert torch.equal(weight, kept)


def test_a_later_round_is_not_taken_if_it_is_worse():
    weight, calls = matrix(), []

    def worse(residual):
        calls.append(residual)
        return residual * (1 - 0.1 * len(calls))

    found = qpissa_pair(weight, 4, 2.0, worse, rounds=3)
    assert len(calls) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, pissa_pair(weight, 4, 2.0), strict=True))
    with pytest.raises(ValueError, match="rounds=0"):
        qpissa_pair(weight, 4, 2.0, worse, rounds=0)


# ----------------------------------------------------------------------------- OLoRA


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_olora_is_pefts(shape):
    weight = matrix(*shape)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data = weight.clone()
    config = peft.LoraConfig(r=6, lora_alpha=9, init_lora_weights="olora", target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(layer))[0]
    a, b, residual = olora_factors(weight, 6, 1.5)
    assert torch.allclose(b.T @ b, torch.eye(6), atol=1e-6)
    assert torch.allclose(b @ a, theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight, atol=1e-6)
    assert torch.allclose(residual, theirs.base_layer.weight, atol=1e-6)


def test_pefts_olora_changes_the_function_of_a_conv1d():
    # Why there is a file of ours. Once this fails, peft has put it right.
    layer = Conv1D(32, 32)
    layer.weight.data = matrix(32, 32)
    inputs = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    before = layer(inputs).detach()
    model = nn.Sequential(layer)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="olora", target_modules=["0"], fan_in_fan_out=True)
    assert twin.relative(peft.inject_adapter_in_model(config, model)(inputs).detach(), before) > 0.1
    ours = olora_factors(matrix(32, 32).T, 4, 2.0)
    assert twin.relative(inputs.double() @ twin.rebuilt(ours, 2.0).T, before) < 1e-5


# ----------------------------------------------------------------------------- shift


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shift_is_the_same_whatever_the_settings_of_products(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 9000, generator=generator).to(dtype)
    a, b = torch.randn(4, 9000, generator=generator), torch.randn(70, 4, generator=generator)
    kept = weight.clone()
    found = shift(weight, a, b, 0.7)
    assert found.dtype == dtype
    assert torch.equal(found, (weight.double() - 0.7 * b.double() @ a.double()).to(dtype))
    assert torch.equal(weight, kept)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(shift(weight, a, b, 0.7), found)
    weight.requires_grad_()
    assert not shift(nn.Parameter(weight), nn.Parameter(a), nn.Parameter(b), 0.7).requires_grad
    # More rows than stand in one block, and the last block shorter than the rest.
    parts = torch.cat([shift(weight[start : start + 11], a, b[start : start + 11], 0.7) for start in range(0, 70, 11)])
    assert torch.equal(parts, found)


def test_shift_back_gives_the_weight():
    weight = matrix()
    factors = pissa_factors(weight, 4, 2.0)
    back = shift(factors.residual, factors.a, factors.b, -2.0)
    assert twin.relative(back, weight) < 1e-6
    wide = weight.double()
    kept = wide.clone()
    shift(wide, factors.a.double(), factors.b.double(), 2.0)
    assert torch.equal(wide, kept)


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.zeros(4), r"weight has shape \(4,\)"),
        (torch.zeros(4, 4, 3, 3), r"weight has shape \(4, 4, 3, 3\)"),
        (torch.zeros(0, 4), r"weight has shape \(0, 4\)"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"weight is torch.uint8.*Dequantise"),
        (torch.zeros(4, 4, device="meta"), "meta device"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "not finite"),
        (torch.tensor([[1.0, float("-inf")], [0.0, 1.0]]), "not finite"),
    ],
)
def test_weights_without_a_split_are_refused(init, weight, words):
    with pytest.raises(ValueError, match=words):
        split(init, weight, 1, 1.0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    ("rank", "scaling", "words"),
    [
        (25, 1.0, r"rank=25 is above 24, the smaller side.*\(40, 24\).*at most 24"),
        (0, 1.0, "rank=0 is not a whole number"),
        (2.0, 1.0, "rank=2.0 is not a whole number"),
        (4, 0.0, "scaling=0.0"),
        (4, float("inf"), "scaling=inf"),
    ],
)
def test_settings_out_of_range_are_refused(init, rank, scaling, words):
    with pytest.raises(ValueError, match=words):
        split(init, matrix(40, 24), rank, scaling)


@pytest.mark.parametrize(("setting", "value"), [("iterations", -1), ("iterations", 1.5), ("oversampling", -1)])
def test_settings_of_the_search_are_checked(setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        pissa_factors(matrix(), 4, 1.0, **{setting: value})


@pytest.mark.parametrize(("alive", "iterations"), [(0, 4), (3, 4), (3, None)])
def test_components_that_could_never_train_are_refused(alive, iterations):
    weight = matrix(40, 24)[:, :alive] @ matrix(40, 24)[:alive, :] if alive else torch.zeros(40, 24)
    with pytest.raises(ValueError, match=f"{alive} singular values that are not 0, fewer than rank=4"):
        pissa_factors(weight, 4, 1.0, iterations=iterations)
    if alive:
        assert twin.relative(twin.rebuilt(pissa_factors(weight, alive, 1.0), 1.0), weight) < 1e-5


@pytest.mark.parametrize(
    ("a", "b", "scaling"), [((3, 4), (5, 3), 1.0), ((3, 6), (5, 2), 1.0), ((3, 6), (5, 3), float("nan"))]
)
def test_shift_refuses_what_does_not_fit(a, b, scaling):
    with pytest.raises(ValueError, match=r"do not fit|scaling=nan"):
        shift(torch.zeros(5, 6), torch.zeros(a), torch.zeros(b), scaling)
