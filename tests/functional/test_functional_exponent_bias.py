"""The search of exponent biases: by the operand's own error and by that of the product, over batches."""

import math

import pytest
import torch
from torch import nn

from lightning_stable.functional.exponent_bias import (
    BiasTable,
    add_output_errors,
    bias_candidates,
    bias_errors,
    new_table,
)
from lightning_stable.functional.quantize import Quantizer, quantize, search_exponent_bias
from lightning_stable.functional.simulated import convert


def low(x, bias):
    return quantize(x, Quantizer("e2m1", exponent_bias=bias))


def operands(seed=0):
    torch.manual_seed(seed)
    return torch.randn(5, 6), torch.randn(7, 6) * torch.tensor([1, 1, 1, 8, 1, 0.1])


def by_turns(weight, x, candidates, rounds=3):
    """Search both biases in the plainest way, from the largest values on."""
    exact = x @ weight.t()
    best = [1 - math.log2(float(operand.abs().max()) / 6) for operand in (weight, x)]
    for _ in range(rounds):
        for which in (0, 1):
            errors = []
            for bias in candidates[which]:
                tried = [bias if which == 0 else best[0], bias if which == 1 else best[1]]
                errors.append(float((low(x, tried[1]) @ low(weight, tried[0]).t() - exact).double().square().sum()))
            best[which] = candidates[which][errors.index(min(errors))]
    return best


def product_of(weight, x):
    def product(weight_bias, input_bias):
        left = x if input_bias is None else low(x, input_bias)
        return left @ (weight if weight_bias is None else low(weight, weight_bias)).t()

    return product


@pytest.mark.parametrize("seed", range(4))
def test_one_batch_is_searched_by_turns(seed):
    weight, x = operands(seed)
    tables = [new_table(operand, "e2m1", 20) for operand in (weight, x)]
    found = add_output_errors(product_of(weight, x), *tables)
    assert [table.best for table in found] == pytest.approx(by_turns(weight, x, [table.biases for table in tables]))


def test_the_product_is_nearer_than_by_the_operands_own_errors():
    wins = []
    for seed in range(4):
        weight, x = operands(seed)
        exact = x @ weight.t()
        found = add_output_errors(product_of(weight, x), new_table(weight, "e2m1"), new_table(x, "e2m1"))
        by_output = product_of(weight, x)(*(table.best for table in found))
        by_tensor = product_of(weight, x)(*(search_exponent_bias(operand, "e2m1") for operand in (weight, x)))
        wins.append(float((by_output - exact).norm() / (by_tensor - exact).norm()))
    assert max(wins) <= 1.0
    assert min(wins) < 0.97


def test_one_operand_alone_is_searched_once():
    weight, x = operands()
    calls = []

    def product(*biases):
        calls.append(biases)
        return product_of(weight, x)(*biases)

    nothing, found = add_output_errors(product, None, new_table(x, "e2m1", 10))
    assert nothing is None
    assert len(calls) == 11
    assert all(bias is None for bias, _ in calls)
    errors = [float((low(x, bias) @ weight.t() - x @ weight.t()).double().square().sum()) for bias in found.biases]
    assert found.errors == pytest.approx(errors)


def test_errors_of_batches_add_up_beside_the_biases_so_far():
    weight, first = operands(0)
    second = operands(1)[1] * 3
    start = [new_table(weight, "e2m1", 20), new_table(first, "e2m1", 20)]
    once = add_output_errors(product_of(weight, first), *start)
    twice = add_output_errors(product_of(weight, second), *once)
    best = twice[0].best
    exact = second @ weight.t()
    more = [float((low(second, b) @ low(weight, best).t() - exact).double().square().sum()) for b in once[1].biases]
    assert twice[1].biases == start[1].biases
    assert twice[1].errors == pytest.approx([a + b for a, b in zip(once[1].errors, more, strict=True)], rel=1e-5)


def test_the_operands_own_error_is_that_of_search_exponent_bias():
    x = operands()[1]
    table = new_table(x, "e3m2")
    table = table.plus(bias_errors(x, "e3m2", table.biases))
    assert table.best == search_exponent_bias(x, "e3m2")
    assert table.biases == bias_candidates(x, "e3m2")
    expected = [float((quantize(x, Quantizer("e3m2", exponent_bias=b)) - x).square().sum()) for b in table.biases]
    assert table.errors == pytest.approx(expected, rel=1e-4)


def test_candidates_run_from_a_hundredth_to_more_than_the_largest():
    biases = bias_candidates(torch.tensor([-12.0, 3.0]), "e2m1")
    assert len(biases) == 100
    tops = [6 * 2 ** (1 - bias) for bias in biases]
    assert tops == pytest.approx([12 * (0.01 + 1.19 * i / 99) for i in range(100)])
    assert new_table(torch.tensor([-12.0]), "e2m1").first == pytest.approx(0.0)
    assert bias_candidates(torch.zeros(3), "e4m3") == [7.0]


def test_errors_that_are_not_numbers_are_not_the_least():
    table = BiasTable([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], 1.0).plus(torch.tensor([math.nan, 5.0, 4.0]))
    assert table.best == 3.0
    assert table._replace(errors=[math.nan] * 3).best == 1.0


def test_what_has_no_bias_is_refused():
    with pytest.raises(ValueError, match="format='int8' has no exponent bias"):
        bias_candidates(torch.ones(2), "int8")


# ----------------------------------------------------------------------------- what layers lend to it


def test_a_layer_gives_its_product_without_a_trace():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(7, 6)
    convert(layer, weights=Quantizer("int4", scaling="row"), gradients=Quantizer("int4", scaling="row"))
    seen = []
    layer.quantization.observers.append(lambda *args: seen.append(args))
    coarse = Quantizer("e2m1")
    weight, inputs = (layer.rounded(which, x, coarse) for which in ("weights", "activations"))
    assert torch.equal(layer.rounded("activations", x, None), x)
    found = layer.product(x, weight)
    assert not found.requires_grad
    assert not seen
    torch.testing.assert_close(found, x @ quantize(layer.weight, coarse).t())
    torch.testing.assert_close(layer.product(inputs, layer.weight), quantize(x, coarse) @ layer.weight.t())


def test_samples_are_rows_of_features_or_images():
    linear, convolution = nn.Linear(6, 5), nn.Conv2d(3, 2, 1)
    for layer in (linear, convolution):
        convert(layer)
    x = torch.arange(60.0).reshape(10, 6)
    assert torch.equal(linear.samples(x, 4), x[::3])
    assert torch.equal(linear.samples(x.reshape(2, 5, 6), 4), x[::3])
    assert torch.equal(linear.samples(x, 10), x)
    assert linear.samples(x[0], 4).shape == (1, 6)
    images = torch.randn(40, 3, 4, 4)
    assert torch.equal(convolution.samples(images, 320), images[::2])
    assert torch.equal(convolution.samples(images, 5), images[::5])  # eight at least
    assert convolution.samples(images[0], 5).shape == (3, 4, 4)
