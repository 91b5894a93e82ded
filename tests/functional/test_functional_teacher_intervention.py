"""A teacher's outputs in the place of a module's own."""

import pytest
import torch

from lightning_stable.functional.teacher_intervention import inject, keep, outermost


@pytest.mark.parametrize("gradients", ["through", "stop"])
def test_values_are_exactly_the_teachers(gradients):
    output, teacher = torch.randn(4, 3) * 1e4, torch.randn(4, 3)
    found = inject(output, keep(teacher), gradients)
    assert torch.equal(found, teacher)
    assert not torch.equal(output + (teacher - output), teacher)  # which is why it is not done so


def test_the_gradient_passes_or_stops():
    for gradients in ("through", "stop"):
        output = torch.randn(4, 3, requires_grad=True)
        other = torch.ones(4, 3, requires_grad=True)
        (inject(output * 2, keep(torch.full((4, 3), 5.0)), gradients).square() * other).sum().backward()
        assert torch.equal(other.grad, torch.full((4, 3), 25.0))
        if gradients == "stop":
            assert output.grad is None
        else:
            assert torch.equal(output.grad, torch.full((4, 3), 20.0))  # 2 * 2 * 5, at the teacher's value


def test_containers_and_what_is_no_number_of_theirs_stay():
    ids, mark = torch.arange(3), object()
    output = (torch.zeros(2), {"more": [torch.zeros(1), ids], "mark": mark}, None)
    kept = keep((torch.ones(2), {"more": [torch.full((1,), 2.0), ids + 1], "mark": None}, None))
    first, rest, nothing = inject(output, kept)
    assert torch.equal(first, torch.ones(2))
    assert torch.equal(rest["more"][0], torch.full((1,), 2.0))
    assert rest["more"][1] is ids
    assert rest["mark"] is mark
    assert nothing is None


@pytest.mark.parametrize("gradients", ["through", "stop"])
def test_what_is_kept_is_nobody_elses(gradients):
    teacher = torch.ones(3)
    kept = keep(teacher)
    teacher.zero_()
    inject(torch.zeros(3), kept, gradients).zero_()
    assert torch.equal(inject(torch.zeros(3), kept, gradients), torch.ones(3))


def test_the_dtype_is_that_of_the_output():
    assert inject(torch.zeros(2, dtype=torch.bfloat16), keep(torch.ones(2))).dtype is torch.bfloat16


@pytest.mark.parametrize("teacher", [torch.ones(3), (torch.ones(2), torch.ones(2)), torch.ones(2, dtype=torch.int64)])
def test_outputs_that_are_not_alike_are_an_error(teacher):
    with pytest.raises(ValueError, match=r"teacher's output has tensors of shape .*here they are \[\(2,\)\]"):
        inject(torch.zeros(2), keep(teacher))


def test_the_outermost_of_names_are_those_within_no_other():
    names = ["layers.0", "layers.0.attention", "layers.0.attention.out", "layers.10", "head.out"]
    assert outermost(names) == ["layers.0", "layers.10", "head.out"]
