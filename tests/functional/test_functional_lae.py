"""LAE's maths: the slow copy against a loop by hand, the ensemble against probabilities taken one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_stable.functional.lae import accumulate, ensemble_logits, init_offline


def test_the_copy_follows() -> None:
    online = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    offline = init_offline(online)
    expected = [value.double() for value in online]
    for step in range(5):
        for value in online:
            value += 0.1 * (step + 1)
        accumulate(offline, online, 0.75)
        expected = [0.75 * old + 0.25 * new.double() for old, new in zip(expected, online, strict=True)]
    for value, other in zip(offline, expected, strict=True):
        torch.testing.assert_close(value.double(), other, rtol=1e-6, atol=0)


def test_what_does_not_move_is_not_moved_by_averaging() -> None:
    online = [torch.randn(100)]
    offline = init_offline(online)
    accumulate(offline, online, 0.9999)
    assert torch.equal(offline[0], online[0])


def test_half_precision_has_a_wide_copy() -> None:
    online = [torch.ones(3, dtype=torch.bfloat16)]
    offline = init_offline(online)
    assert offline[0].dtype == torch.float32
    online[0] += 1
    accumulate(offline, online, 0.9999)
    assert offline[0].tolist() == pytest.approx([1.0001] * 3)
    assert init_offline([torch.ones(1, dtype=torch.float64)])[0].dtype == torch.float64


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 1.0, 50.0]), classes=st.integers(2, 5))
def test_the_larger_probability_of_each_class(seed: int, scale: float, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    online, offline = (scale * torch.randn(4, 2, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    found = ensemble_logits(online, offline)
    rows = (value.reshape(-1, classes) for value in (found, online, offline))
    for row, one, other in zip(*rows, strict=True):
        scores = []
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            scores.append(max(1 / sum((x - a).exp() for x in one), 1 / sum((x - b).exp() for x in other)))
        torch.testing.assert_close(row.exp(), torch.stack(scores), rtol=1e-9, atol=0)
        assert int(row.argmax()) == int(torch.stack(scores).argmax())


def test_the_surer_of_both_wins() -> None:
    unsure, sure = torch.tensor([[0.5, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 9.0]])
    assert ensemble_logits(unsure, sure).argmax(-1).item() == 2
    assert ensemble_logits(sure, unsure).argmax(-1).item() == 2
    torch.testing.assert_close(ensemble_logits(sure, sure).softmax(-1), sure.softmax(-1))


def test_excluded_classes_stay_excluded_and_precision_stays() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 200.0]], dtype=torch.float16)
    found = ensemble_logits(logits, logits + 1)
    assert found.dtype == torch.float16
    assert found[0, 1] == -torch.inf
    assert not found.isnan().any()
