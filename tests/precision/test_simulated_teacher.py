"""Teacher Intervention over a fit: what is put in, for how long, gradients by hand, and its company."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from precision.simulated_runs import SHORT
from precision.simulated_runs import taught as plugin
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable._glue.quiet import QuietPass, is_quiet, own_loss, run_training_step
from lightning_stable.callbacks import SAM
from lightning_stable.functional.quantize import Quantizer
from lightning_stable.functional.simulated import convert
from lightning_stable.testing.harness import Net, SaveAt, Stream, assert_same, differences, fit
from lightning_stable.testing.workers import Pair

pytestmark = [pytest.mark.filterwarnings(each) for each in SHORT]


class Notes(Net):
    """Notes what the first layer gives to the next one, in each step that counts and each validation."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.trained, self.validated, self.passes = [], [], 0

    def forward(self, x):
        hidden = self.body[0](x)
        if not is_quiet(self):
            (self.trained if self.training else self.validated).append(hidden.detach().clone())
        self.passes += 1
        return self.head(self.body[1:](hidden)).sum(1, keepdim=True)


def exact(weights, batch):
    """Return what the first layer gives to the next one without quantization."""
    return nn.functional.linear(Stream().batch(batch)[0], weights["body.0.weight"], weights["body.0.bias"])


def by_hand(module, replaced, gradients):
    """Return the loss and the gradients of a first step, with one module's outputs those without quantization."""
    x, y = Stream().batch(0)
    teacher, student, kept = copy.deepcopy(module), copy.deepcopy(module), []
    quantizer = Quantizer("int3", scaling="row")
    convert(student, weights=quantizer, activations=quantizer)
    teacher.get_submodule(replaced).register_forward_hook(lambda part, args, output: kept.append(output.detach()))
    teacher(x)

    def put_in(part, args, output):
        return kept[0] if gradients == "stop" else output + (kept[0] - output).detach()

    student.get_submodule(replaced).register_forward_hook(put_in)
    loss = nn.functional.mse_loss(student(x), y)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


# ----------------------------------------------------------------------------- what is put in, and for how long


@pytest.mark.parametrize("replaced", ["body.0", "body", "head"])
@pytest.mark.parametrize("gradients", ["through", "stop"])
def test_a_step_is_that_by_hand(replaced, gradients):
    if (replaced, gradients) == ("head", "stop"):
        with pytest.raises(ValueError, match="teacher_gradients='stop' leaves nothing that the loss could train"):
            fit([plugin((replaced,), teacher_gradients=gradients)], max_steps=1)
        return
    module = Net(norm=False)
    loss, expected = by_hand(copy.deepcopy(module), replaced, gradients)
    run = fit([plugin((replaced,), teacher_gradients=gradients)], module=module, max_steps=1)
    assert run.logged[0][1]["train_loss"] == pytest.approx(loss, rel=1e-5)
    found = {name: gradient for name, gradient in run.steps[0].gradients.items() if name in expected}
    assert_same(found, expected, "gradients by hand", 1e-5)
    assert ("body.0.weight" in expected) is (gradients == "through")
    others = {name: gradient for name, gradient in run.steps[0].gradients.items() if name not in expected}
    assert not any(gradient.any() for gradient in others.values())


class Left(Callback):
    """Notes, after each batch, the hooks on the first layer and whether the step is wrapped."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.found.append((len(pl_module.body[0]._forward_hooks), "training_step" in vars(pl_module)))


def test_it_ends_after_its_steps_and_leaves_nothing(tmp_path):
    module, left = Notes(), Left()
    settings = {"validation": Stream(1), "val_check_interval": 1, "accumulate_grad_batches": 2}
    run = fit([plugin(steps=2), left], module=module, max_steps=3, **settings)
    assert left.found == [(1, True)] * 3 + [(0, False)] * 3
    assert module.passes == 2 * 4 + 2 + len(module.validated)
    start = run.steps[0].before
    assert [torch.equal(found, exact(start, batch)) for batch, found in enumerate(module.trained)] == [True] * 4 + [
        False
    ] * 2
    assert run.plugins[0].state_dict() == {}
    # Validation has the module's own outputs.
    assert not torch.allclose(module.validated[0], exact(start, 0))


def test_the_teacher_has_the_weights_of_the_start_or_the_present_ones():
    for teacher in ("start", "present"):
        module = Notes()
        run = fit([plugin(teacher_weights=teacher)], module=module, max_steps=3)
        for step in range(3):
            weights = run.steps[0 if teacher == "start" else step].before
            assert torch.equal(module.trained[step], exact(weights, step))
        assert ("teacher" in run.plugins[0].state_dict()) is (teacher == "start")


def test_the_outermost_of_modules_that_match_is_replaced():
    module, left = Notes(), Left()
    fit([plugin(("body*",)), left], module=module, max_steps=1)
    assert left.found == [(0, True)]
    assert not module.body._forward_hooks


def test_the_pass_draws_the_same_random_numbers_and_takes_none():
    def run(steps):
        torch.manual_seed(3)
        fine = {"weights": None, "activations": "e8m10", "scaling": "none", "teacher_weights": "present"}
        return fit([plugin(("head",), steps, **fine)], module=Net(dropout=0.4), max_steps=3), torch.rand(3)

    # Were a mask of dropout another one in the teacher's pass, the loss would differ in the first digit.
    (taught, random), (plain, expected) = run(3), run(1)
    assert torch.equal(random, expected)
    for (_, one), (_, other) in zip(taught.logged, plain.logged, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)


def test_in_training_weights_are_where_they_were():
    class Places(Net):
        def training_step(self, batch, batch_idx):
            self.places = [*getattr(self, "places", []), self.head.weight.data_ptr()]
            return super().training_step(batch, batch_idx)

    module = Places()
    place = module.head.weight.data_ptr()
    fit([plugin()], module=module, max_steps=3)
    assert module.places[1::2] == [place] * 3
    assert place not in module.places[::2]  # the teacher's
    assert module.head.weight.data_ptr() == place


def test_several_calls_and_containers_are_put_in_one_by_one():
    class Boxed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return {"hidden": self.layer(x), "index": 3}

    class Twice(Net):
        def __init__(self):
            super().__init__()
            self.pair, self.seen = Boxed(), []

        def forward(self, x):
            first = self.pair(x)["hidden"]
            second = self.pair(first)["hidden"]
            self.seen.append((first.detach(), second.detach()))
            return super().forward(second)

    module = Twice()
    layer = copy.deepcopy(module.pair.layer)
    fit([plugin(("pair",))], module=module, max_steps=1)
    first = layer(Stream().batch(0)[0])
    for found in module.seen:
        torch.testing.assert_close(found, (first, layer(first)))


# ----------------------------------------------------------------------------- company


@pytest.mark.parametrize(("steps", "teacher"), [(5, "start"), (5, "present"), (2, "start")])
def test_a_run_resumes_bit_by_bit(steps, teacher, tmp_path):
    path = str(tmp_path / "saved.ckpt")

    def run(*others, **settings):
        return fit([plugin(steps=steps, teacher_weights=teacher), *others], max_steps=8, **settings)

    whole = run(SaveAt(2, path))
    saved = torch.load(path, weights_only=True)
    assert ("SimulatedPrecision" in saved) is (steps == 5 and teacher == "start")
    resumed = run(ckpt_path=path)
    assert_same(resumed.snapshot()["weights"], whole.snapshot()["weights"], "the resumed run")
    assert resumed.logged == whole.logged[-len(resumed.logged) :]
    assert differences(fit([plugin(steps=1)], max_steps=8).module.state_dict(), whole.module.state_dict())


def test_ranks_end_alike_and_resume(workers: Pair, tmp_path):
    first, second = workers.run("precision.simulated_runs:teacher_job", folder=str(tmp_path))
    assert_same(second["weights"], first["weights"], "rank 1")


@pytest.mark.parametrize("where", ["teacher", "student"])
def test_nothing_is_left_after_a_failure(where):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if is_quiet(self) is (where == "teacher") and self.trainer.global_step == 1:
                raise RuntimeError("deliberate failure")
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(RuntimeError, match="deliberate failure"):
        fit([plugin()], module=module, max_steps=4)
    assert not module.body[0]._forward_hooks
    assert type(module.body[0]) is nn.Linear
    assert not {"training_step", "log"} & set(vars(module))
    before = module.steps[0].before["head.weight"]
    assert not torch.equal(module.head.weight, before)  # its own, not the teacher's
    assert torch.equal(module.head.weight, module.steps[0].weights["head.weight"])


def test_autocast_keeps_no_weights_of_the_teachers_pass():
    class Multiplies(Net):
        checked = 0

        def forward(self, x):
            hidden = self.body(x)
            found = self.head(hidden)
            if not is_quiet(self):
                assert torch.equal(found, nn.functional.linear(hidden, self.head.weight, self.head.bias))
                self.checked += 1
            return found.sum(1, keepdim=True)

    # The head is not quantized, so that autocast casts its weight itself, in both passes.
    module = Multiplies(norm=False)
    run = fit([plugin(compute="bf16-mixed", exclude=("head",))], module=module, max_steps=3)
    assert module.checked == 3
    assert all(gradient.any() for step in run.steps for gradient in step.gradients.values())


def test_each_pass_of_a_step_with_several_has_the_teachers_outputs():
    module = Notes()
    run = fit([plugin(), SAM(rho=0.5)], module=module, max_steps=2)
    assert module.passes >= 2 * 4
    assert torch.equal(module.trained[0], exact(run.steps[0].before, 0))
    plain = fit([plugin(steps=1), SAM(rho=0.5)], module=Notes(), max_steps=2)
    assert differences(plain.module.state_dict(), module.state_dict())


def quiet_loss(pl_module, batch, run):
    with QuietPass()(pl_module), torch.no_grad():
        return float(run(pl_module, batch))


class AsksAfterwards(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(quiet_loss(pl_module, batch, run_training_step))


class AsksWithin(Callback):
    """Wraps the step before the precision does."""

    def __init__(self):
        self.losses = []

    def setup(self, trainer, pl_module, stage):
        def around(original, batch, batch_idx):
            output = original(batch, batch_idx)
            if not is_quiet(pl_module):
                self.losses.append(quiet_loss(pl_module, batch, own_loss))
            return output

        self.wrap = MethodWrap(pl_module, "training_step", around)

    def teardown(self, trainer, pl_module, stage):
        self.wrap.undo()


@pytest.mark.parametrize("asks", [AsksAfterwards, AsksWithin])
def test_passes_of_others_have_the_modules_own_outputs(asks):
    class Still(Notes):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    taught, plain = (
        fit([plugin(**settings), asks()], module=Still(norm=False), max_steps=3)
        for settings in ({}, {"modules": (), "teacher_steps": None})
    )
    assert taught.plugins[1].losses == plain.plugins[1].losses
    assert [entry["train_loss"] for _, entry in taught.logged] != [entry["train_loss"] for _, entry in plain.logged]


# Of torch's own compiler, on every autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_a_compiled_part_has_them_too():
    class Compiled(Net):
        def __init__(self, compiled):
            super().__init__(norm=False)
            self.fast = [torch.compile(self.body, backend="eager") if compiled else self.body]

        def forward(self, x):
            return self.head(self.fast[0](x)).sum(1, keepdim=True)

    found, expected = (
        fit([plugin(steps=2, check_gradients=True)], module=Compiled(each), max_steps=3) for each in (True, False)
    )
    assert_same(found.module.state_dict(), expected.module.state_dict(), "the compiled body", 1e-6)


class Recomputed(Net):
    """Computes its body anew in the backward pass."""

    def __init__(self, how, times=1):
        super().__init__(norm=False)
        self.how, self.times = how, times

    def forward(self, x):
        x = x.clone().requires_grad_()
        found = [checkpoint(self.body, x, use_reentrant=self.how) if self.how is not None else self.body(x)]
        found += [checkpoint(self.body, -x, use_reentrant=self.how) for _ in range(self.times - 1)]
        return self.head(torch.stack(found).sum(0)).sum(1, keepdim=True)


# The teacher's pass needs no gradient, of which torch's first way to compute anew warns.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_has_them_again(reentrant):
    found, expected = (fit([plugin()], module=Recomputed(how), max_steps=3) for how in (reentrant, None))
    assert_same(found.module.state_dict(), expected.module.state_dict(), "with checkpointing")
    with pytest.raises(RuntimeError, match=r"'body.0' runs several times in a step, and is computed again"):
        fit([plugin()], module=Recomputed(reentrant, times=2), max_steps=1)
