"""The state of online EWC over several tasks, and what is known in closed form."""

import pytest
import torch

from lightning_stable.functional.ewc import EWCState, init_ewc, update_ewc
from lightning_stable.functional.l2_anchor import anchor_penalty


def test_the_fisher_information_decays_and_the_anchor_is_replaced() -> None:
    state = init_ewc()
    expected = torch.zeros(3, dtype=torch.float64)
    for task in range(4):
        weights = {"w": torch.full((3,), float(task), dtype=torch.float64)}
        fisher = {"w": torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64) * (task + 1)}
        state = update_ewc(state, weights, fisher, decay=0.9)
        expected = 0.9 * expected + fisher["w"]
        torch.testing.assert_close(state.fisher["w"], expected)
        assert torch.equal(state.anchor["w"], weights["w"])


@pytest.mark.parametrize(("decay", "factor"), [(1.0, 3.0), (0.0, 1.0)])
def test_all_tasks_alike_or_the_last_one_alone(decay: float, factor: float) -> None:
    state = init_ewc()
    for _ in range(3):
        state = update_ewc(state, {"w": torch.ones(2)}, {"w": torch.ones(2)}, decay)
    assert torch.equal(state.fisher["w"], factor * torch.ones(2))


def test_with_one_task_it_is_the_quadratic_approximation_of_its_loss() -> None:
    """For a Gaussian with variance 1 the Fisher information is the Hessian: lam = 1/2 gives the loss back."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    best, noise = 0.8, torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    residual = noise  # at the best weight, y - best * x
    fisher = {"w": (residual * x).square().mean(0)}
    state = update_ewc(init_ewc(), {"w": torch.full((1,), best, dtype=torch.float64)}, fisher)
    moved = torch.full((1,), best + 0.3, dtype=torch.float64)
    rise = 0.5 * ((residual - 0.3 * x).square() - residual.square()).mean()
    penalty = anchor_penalty([moved], [state.anchor["w"]], 0.5, [state.fisher["w"]])
    assert float(penalty) == pytest.approx(float(rise), rel=0.1)


def test_the_old_state_and_the_weights_stay_as_they_are() -> None:
    weights, fisher = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    first = update_ewc(init_ewc(), weights, fisher)
    second = update_ewc(first, weights, fisher)
    weights["w"].add_(1)
    fisher["w"].add_(1)
    for state, factor in ((first, 1.0), (second, 2.0)):
        assert torch.equal(state.anchor["w"], torch.ones(2))
        assert torch.equal(state.fisher["w"], factor * torch.ones(2))


def test_tensors_that_are_new_gone_or_of_another_shape() -> None:
    before = EWCState({n: torch.zeros(2) for n in ("a", "b", "c")}, {n: torch.ones(2) for n in ("a", "b", "c")})
    weights = {"a": torch.ones(2), "b": torch.ones(3), "new": torch.ones(1)}
    state = update_ewc(before, weights, {name: torch.ones_like(value) for name, value in weights.items()})
    assert {name: value.tolist() for name, value in state.fisher.items()} == {
        "a": [2.0, 2.0],
        "b": [1.0, 1.0, 1.0],
        "new": [1.0],
    }


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), True, "1"])
def test_refuses_a_decay(decay: float) -> None:
    with pytest.raises(ValueError, match="decay="):
        update_ewc(init_ewc(), {}, {}, decay)


def test_refuses_fisher_information_of_other_weights() -> None:
    with pytest.raises(ValueError, match=r"of \['v'\] does not belong to the weights \['w'\]"):
        update_ewc(init_ewc(), {"w": torch.ones(2)}, {"v": torch.ones(2)})
