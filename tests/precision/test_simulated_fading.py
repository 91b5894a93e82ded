"""The fading low-rank helper over a fit: its phases against the twin, resuming, its end, and its settings."""

import pickle

import pytest
import torch
from lightning.pytorch import Trainer
from oracles.fading_helper_twin import helper, phases, weight_of
from oracles.simulated_twin import quantized
from precision.simulated_runs import INT8, SHORT, told_of_fit
from torch.utils.data import DataLoader, IterableDataset

from lightning_stable.functional.fading_helper import helper_matrix
from lightning_stable.functional.simulated import quantized_layers
from lightning_stable.precision.simulated import SimulatedPrecision
from lightning_stable.testing.harness import QUIET, Net, SaveAt, Stream, assert_same, differences, fit
from lightning_stable.testing.workers import Pair

pytestmark = [pytest.mark.filterwarnings(each) for each in SHORT]

INT4 = {**INT8, "weights": "int4", "activations": None, "gradients": None}


class Helped(Net):
    """Notes the weight of its first layer and the helper beside it, in each step and validation."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.noted, self.validated = [], []

    def note(self):
        state, layer = quantized_layers(self)["body.0"], self.body[0]
        matrix = None if state.helper is None else helper_matrix(state.helper, layer.weight)
        return layer.weight.detach().clone(), matrix

    def training_step(self, batch, batch_idx):
        self.noted.append(self.note())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.note()[1])
        super().validation_step(batch, batch_idx)


def plugin(**settings):
    return SimulatedPrecision(**INT4, check_gradients=False, **settings)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_phases_are_those_of_the_twin(accumulated):
    module, rank, length = Helped(), 5, 4
    fit(
        [plugin(helper_rank=rank, helper_phase_steps=length)],
        module=module,
        max_steps=14,
        accumulate_grad_batches=accumulated,
    )
    assert len(module.noted) == 14 * accumulated
    start = None
    for batch, (weight, found) in enumerate(module.noted):
        phase, within = divmod(batch // accumulated, length)
        if phase >= len(phases(rank)):
            assert found is None
            continue
        if batch % (length * accumulated) == 0:
            start = weight - quantized(weight, ("int4", "row"))
        expected = helper(start, phases(rank)[phase], within / length)
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)


def test_it_is_part_of_training_and_at_full_rank_makes_up_for_all():
    plain = fit([], max_steps=1)
    helped = fit([plugin(helper_rank=32, helper_phase_steps=100)], max_steps=1)
    low = fit([plugin()], max_steps=1)
    assert_same(helped.steps[0].gradients, plain.steps[0].gradients, "at the start of a full rank", 1e-5)
    assert differences(low.steps[0].gradients, plain.steps[0].gradients, tolerance=1e-3)


def test_without_a_number_the_fit_is_divided_and_its_end_has_no_helper():
    module = Helped()
    run = fit([plugin(helper_rank=4)], module=module, validation=Stream(1), val_check_interval=1, max_steps=9)
    assert [found is not None for _, found in module.noted] == [True] * 9
    ranks = [int(torch.linalg.matrix_rank(found, atol=1e-6)) for _, found in module.noted]
    assert ranks == [4] * 3 + [2] * 3 + [1] * 3
    # Told after each optimizer step at once: what is validated is what comes next, in the end no helper.
    assert [found is None for found in module.validated] == [False] * 8 + [True]
    assert torch.equal(module.validated[2], module.noted[3][1])
    assert run.plugins[0].state_dict() == {"helper": {"phase": 3, "phase_steps": 3, "alphas": [], "factors": {}}}


def test_what_it_stands_for_fades_with_the_singular_values():
    module = Helped()
    fit([plugin(helper_rank=2, helper_phase_steps=4)], module=module, max_steps=4)
    left, values, right = torch.linalg.svd(module.noted[0][1])
    for step, (_, found) in enumerate(module.noted):
        for component in (0, 1):
            kept = left[:, component] @ found @ right[component]
            torch.testing.assert_close(kept, values[component] * weight_of(component, 2, step / 4))


@pytest.mark.parametrize("saved", [2, 3, 7])
def test_a_run_resumes_bit_by_bit_within_a_phase_at_its_start_and_after_the_last(saved, tmp_path):
    path = str(tmp_path / "saved.ckpt")

    def run(*others, **settings):
        plugins = [plugin(helper_rank=2, helper_phase_steps=3), *others]
        return fit(plugins, validation=Stream(2, seed=5), val_check_interval=2, max_steps=9, **settings)

    whole = run(SaveAt(saved, path))
    state = torch.load(path, weights_only=True)["SimulatedPrecision"]["helper"]
    assert set(state["factors"]) == ({"body.0", "head"} if saved < 6 else set())
    resumed = run(ckpt_path=path)
    assert_same(resumed.snapshot()["weights"], whole.snapshot()["weights"], "the resumed run")
    assert resumed.logged == whole.logged[-len(resumed.logged) :]


def test_an_evaluation_has_the_helper_of_its_checkpoint(tmp_path):
    path, module = str(tmp_path / "saved.ckpt"), Helped()
    own = plugin(helper_rank=4, helper_phase_steps=3)
    run = fit([own, SaveAt(4, path)], module=module, max_steps=4)
    assert quantized_layers(module) == {}
    trainer = Trainer(**QUIET, plugins=[own])
    trainer.validate(module, Stream(1), verbose=False)
    fresh = Helped()
    Trainer(**QUIET, plugins=[plugin(helper_rank=4)]).validate(fresh, Stream(1), ckpt_path=path, verbose=False)
    assert module.validated[0] is not None
    assert torch.equal(fresh.validated[0], module.validated[0])
    assert run.plugins[0].state_dict()["helper"]["phase"] == 1


def test_a_second_fit_begins_anew():
    own, first, second = plugin(helper_rank=2, helper_phase_steps=2), Helped(), Helped()
    for module in (first, second):
        fit([own], module=module, max_steps=6)
    assert [found is None for _, found in second.noted] == [False] * 4 + [True] * 2
    assert torch.equal(first.noted[0][1], second.noted[0][1])


FLOATS = {"weights": "e2m1", "activations": None, "gradients": None, "scaling": "none", "exclude": ()}


def evaluated(own, module, **settings):
    """Validate; return the helper and the bias of the first layer."""
    found = []

    def look(batch, batch_idx):
        state = quantized_layers(module)["body.0"]
        found.append((state.helper, state.weights.exponent_bias))

    module.validation_step = look
    Trainer(**QUIET, plugins=[own]).validate(module, Stream(1), verbose=False, **settings)
    return found[-1]


def test_another_module_has_nothing_of_the_first_one(tmp_path):
    settings = {"helper_rank": 2, "helper_phase_steps": 9, "search_bias": True, "check_gradients": False}
    own, first, path = SimulatedPrecision(**FLOATS, **settings), Net(), str(tmp_path / "saved.ckpt")
    fit([own, SaveAt(2, path)], module=first, max_steps=2)
    helper, bias = evaluated(own, first)
    assert helper is not None
    assert bias is not None
    assert evaluated(own, Net()) == (None, None)
    # From a checkpoint it has what is in there.
    loaded, loaded_bias = evaluated(own, Net(), ckpt_path=path)
    assert torch.equal(loaded.left, helper.left)
    assert loaded_bias == bias
    pickle.dumps(own)


def test_a_checkpoint_without_a_state_leaves_nothing_of_the_fit(tmp_path):
    own, module, path = SimulatedPrecision(**FLOATS, search_bias=True, helper_rank=2), Net(), str(tmp_path / "a.ckpt")
    fit([SaveAt(1, path)], max_steps=1)
    fit([own], module=module, max_steps=2)
    assert evaluated(own, module)[1] is not None
    assert evaluated(own, module, ckpt_path=path) == (None, None)


@pytest.mark.parametrize(("rank", "length", "warned"), [(4, 3, ""), (4, 4, "of rank 1"), (4, 100, "of rank 4")])
def test_a_helper_that_outlasts_the_fit_is_warned_about(rank, length, warned):
    lines, warnings = told_of_fit(plugins=[plugin(helper_rank=rank, helper_phase_steps=length)], max_steps=9)
    found = [each for each in warnings if "fades over" in each]
    assert len(found) == bool(warned)
    for each in found:
        assert f"3 phases of {length} optimizer steps, {3 * length} in all, and training is over after 9." in each
        assert f"still a helper {warned}" in each
        assert "Take helper_phase_steps=3 or less" in each
    assert f"has 3 phases of {length} steps, of rank 4, 2, 1." in lines[0]


def test_a_rank_that_is_no_smaller_than_a_side_is_warned_about():
    sides = {name: min(layer.weight.shape) for name, layer in (("body.0", Net().body[0]), ("head", Net().head))}
    for rank in (min(sides.values()) - 1, max(sides.values())):
        _, warnings = told_of_fit(plugins=[plugin(helper_rank=rank)], max_steps=9)
        found = [each for each in warnings if each.startswith(f"helper_rank={rank} of SimulatedPrecision is cut")]
        assert len(found) == (rank >= min(sides.values()))
        assert all(str(side) in each and name in each for each in found for name, side in sides.items())


def test_without_a_rank_there_is_none():
    module = Helped()
    run = fit([plugin()], module=module, max_steps=1)
    assert module.noted[0][1] is None
    assert run.plugins[0].state_dict() == {}


def test_ranks_have_the_same_and_resume(workers: Pair, tmp_path):
    first, second = workers.run("precision.simulated_runs:helper_job", folder=str(tmp_path))
    assert first["whole"]["phase"] == 1
    assert_same(second["whole"], first["whole"], "the helper of rank 1")
    for rank in (first, second):
        assert_same(rank["resumed"], rank["whole"], "the helper of the resumed run")


def test_bfloat16_weights_are_helped_too():
    module = Helped()
    fit([plugin(helper_rank=8, helper_phase_steps=4, compute="bf16-true")], module=module, max_steps=2)
    assert module.noted[0][1].dtype is torch.float32
    assert module.noted[0][1].any()


def test_biases_are_searched_before_what_they_leave_is_made_up_for():
    floats = {"weights": "e2m1", "activations": None, "gradients": None, "scaling": "none", "exclude": ()}
    searched = SimulatedPrecision(**floats, search_bias=True, helper_rank=32, helper_phase_steps=9)
    plain = fit([], max_steps=1)
    helped = fit([searched], max_steps=1)
    assert_same(helped.steps[0].gradients, plain.steps[0].gradients, "with a bias and a helper of full rank", 1e-5)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(4, 6), torch.ones(4, 1)


def test_an_end_that_is_unknown_or_too_near_is_an_error():
    with pytest.raises(ValueError, match=r"helper_rank of SimulatedPrecision .* end is not known. Give helper_phase"):
        fit([plugin(helper_rank=4)], train=DataLoader(Endless(), batch_size=None), max_epochs=-1)
    with pytest.raises(ValueError, match=r"helper_rank=4 of SimulatedPrecision has 3 phases.* after 2 optimizer steps"):
        fit([plugin(helper_rank=4)], max_steps=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"helper_rank": 0}, "helper_rank=0"),
        ({"helper_rank": 4, "helper_phase_steps": 0}, "helper_phase_steps=0"),
        ({"helper_phase_steps": 4}, "has no helper. Give helper_rank"),
        ({"helper_rank": 4, "weights": None}, "Give weights a format"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        SimulatedPrecision(**settings)
