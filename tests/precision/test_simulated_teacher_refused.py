"""What Teacher Intervention by the simulated precision refuses."""

import pytest
from precision.simulated_runs import SHORT, told_of_fit
from precision.simulated_runs import taught as plugin
from torch import nn

from lightning_stable._glue.quiet import is_quiet
from lightning_stable.precision.simulated import SimulatedPrecision
from lightning_stable.testing.harness import ManualNet, Net, fit

pytestmark = [pytest.mark.filterwarnings(each) for each in SHORT]


def test_modules_that_are_not_there_are_named():
    module = Net()
    with pytest.raises(ValueError, match=r"'layers.\*' matches no module of Net. Its modules are body, body.{0..3}"):
        fit([plugin(("body.0", "layers.*"))], module=module, max_steps=1)
    assert not module.body[0]._forward_hooks
    assert type(module.body[0]) is nn.Linear


def test_manual_optimisation_is_refused():
    with pytest.raises(ValueError, match=r"teacher_modules of SimulatedPrecision needs a.*ManualNet"):
        fit([plugin()], module=ManualNet(), max_steps=1)


def test_a_module_that_runs_otherwise_in_both_passes_is_an_error():
    class Differs(Net):
        more = False

        def forward(self, x):
            if is_quiet(self) is self.more:
                self.body[0](x)
            return super().forward(x)

    for more, message in (
        (True, "ran 2 times in the teacher's pass .* and 1 times"),
        (False, "ran 1 times .* and 2 ti"),
    ):
        module = Differs()
        module.more = more
        with pytest.raises(ValueError, match=f"teacher_modules of SimulatedPrecision: 'body.0' {message}"):
            fit([plugin()], module=module, max_steps=1)


def test_outputs_that_differ_in_shape_are_an_error():
    class Grows(Net):
        def training_step(self, batch, batch_idx):
            rows = 1 if is_quiet(self) else 2
            return super().training_step((batch[0][:rows], batch[1][:rows]), batch_idx)

    with pytest.raises(ValueError, match=r"teacher_modules of SimulatedPrecision, 'body.0': The teacher's output has"):
        fit([plugin()], module=Grows(norm=False), max_steps=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_modules": "body"}, r"teacher_modules='body' is one string.*\['body'\]"),
        ({"teacher_modules": ["body"]}, r"teacher_modules=\['body'\] and teacher_steps=None .* go together"),
        ({"teacher_steps": 4}, r"teacher_modules=\[\] and teacher_steps=4 .* go together"),
        ({"teacher_modules": ["body"], "teacher_steps": 0}, "teacher_steps=0"),
        ({"teacher_weights": "old"}, "teacher_weights='old'.*'start', 'present'"),
        ({"teacher_gradients": "pass"}, "teacher_gradients='pass'.*'through', 'stop'"),
        (
            {"teacher_modules": ["body"], "teacher_steps": 1, "weights": None, "activations": None, "gradients": None},
            "nothing to teach",
        ),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        SimulatedPrecision(**settings)


@pytest.mark.parametrize(("steps", "warned"), [(4, 0), (5, 1), (400, 1)])
def test_a_teacher_that_outlasts_the_fit_is_warned_about(steps, warned):
    lines, warnings = told_of_fit(plugins=[plugin(steps=steps)], max_steps=5)
    found = [each for each in warnings if each.startswith(f"teacher_steps={steps} of SimulatedPrecision")]
    assert len(found) == warned
    assert all("over after 5 optimizer steps" in each for each in found)
    assert f"Until optimizer step {steps} the outputs of 'body.0' are those of a teacher" in lines[0]
