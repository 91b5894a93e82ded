"""What a precision of a sweep adds to the user's config, what it leaves out, and which there are."""

import itertools

import pytest
import yaml

from lightning_stable.cli._sweep_grid import Run, make_grid, run_config
from lightning_stable.cli._sweep_precision import left_out, precision_settings, trainer_parts
from lightning_stable.cli.locate import CommandError
from lightning_stable.functional.quantize import Quantizer, parse_format
from lightning_stable.precision._presets import PRESETS, PROJECTIONS
from lightning_stable.precision.simulated import SimulatedPrecision


def simulated(**settings):
    return [{"class_path": "lightning_stable.precision.simulated.SimulatedPrecision", "init_args": settings}]


def takes(weights, gradients, scaling):
    """Tell whether the quantizers of a run can be made, and the scaling changes one of them."""
    try:
        made = SimulatedPrecision(weights=weights, activations=weights, gradients=gradients, scaling=scaling)
    except ValueError:
        return False
    return scaling == "none" or any(quantizer.scaling == scaling for quantizer in made.recipe)


@pytest.mark.parametrize("scaling", ["none", "tensor", "channel", "row", "group:32", "shift:4"])
def test_a_scaling_is_taken_where_a_format_makes_something_of_it(scaling):
    formats = ["e4m3", "int4", "shift3", "mxfp4", "nvfp4", "mxfp8_e5m2", "binary", "ternary"]
    for both, gradients in itertools.product(formats, formats):
        for name in (f"{both}/{gradients}", *([both] if both == gradients else [])):
            if takes(both, gradients, scaling):
                assert make_grid([f"{name}:{scaling}"], [0.1], [0])
            else:
                with pytest.raises(CommandError, match=rf"--precision {name}:{scaling}: "):
                    make_grid([f"{name}:{scaling}"], [0.1], [0])


@pytest.mark.parametrize(
    ("callbacks", "left"),
    [
        ([], []),
        ([{"class_path": "a.NumericsMonitor"}], ["a.NumericsMonitor"]),
        (
            ["NumericsMonitor", {"class_path": "a.PrecisionFallback", "init_args": {"steps": 3}}],
            [None, "a.PrecisionFallback"],
        ),
        ([{"class_path": "a.NumericsMonitor", "init_args": {"format": None}}], ["a.NumericsMonitor"]),
        ([{"class_path": "a.NumericsMonitor", "init_args": {"format": "${vars.it}"}}, "EMA"], []),
    ],
)
def test_what_needs_a_simulated_format_is_left_out_where_there_is_none(callbacks, left, here):
    ema = {"class_path": "lightning_stable.callbacks.EMA"}
    (here / "a.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [*callbacks, ema]}}))
    given = trainer_parts("callbacks", ["a.yaml"])
    assert left_out("e4m3", given) == []
    found = left_out("32-true", given)
    assert [callback.get("class_path") if isinstance(callback, dict) else None for callback in found] == left
    for precision in ("e4m3", "bf16-mixed"):
        settings = run_config(Run(precision, 0.1, 0), here, ["a.yaml"], "val_loss")["trainer"]
        if precision == "e4m3" or not left:
            assert "callbacks" not in settings
            assert len(settings["callbacks+"]) == 1
        else:
            assert "callbacks+" not in settings
            assert settings["callbacks"][:-1] == [callback for callback in [*callbacks, ema] if callback not in found]
            assert settings["callbacks"][-1]["class_path"].endswith("SweepRecord")


def test_callbacks_of_several_configs_are_as_fit_has_them(here):
    for name, text in (("a", "callbacks: [A]"), ("b", "callbacks+: [B]"), ("c", "callbacks: C"), ("d", "max_steps: 3")):
        (here / f"{name}.yaml").write_text(f"trainer: {{{text}}}")
    (here / "e.yaml").write_text("# nothing\n")
    assert trainer_parts("callbacks", ["a.yaml", "b.yaml", "d.yaml", "e.yaml"]) == ["A", "B"]
    assert trainer_parts("callbacks", ["a.yaml", "c.yaml", "b.yaml"]) == ["C", "B"]


def test_the_formats_are_those_of_the_quantizer():
    known = [
        *(f"e{x}m{y}" for x in range(12) for y in range(13)),
        *(f"{k}{n}" for k in ("int", "shift") for n in range(12)),
    ]
    known += [
        "mxfp8",
        "mxfp8_e5m2",
        "mxfp6",
        "mxfp6_e2m3",
        "mxfp4",
        "mxfp4_e2m1",
        "nvfp4",
        "binary",
        "ternary",
        "fp8",
        "",
    ]
    for name in known:
        try:
            parse_format(name)
        except ValueError:
            with pytest.raises(CommandError, match=r"give a precision"):
                make_grid([name], [0.1], [0])
        else:
            assert make_grid([name], [0.1], [0])
    for scaling in ("none", "row", "group:32", "shift:4", "group:0", "group", "rows", "tensor:2"):
        try:
            Quantizer("int4", scaling=scaling)
        except ValueError:
            with pytest.raises(CommandError, match=r"give a precision"):
                make_grid([f"int4:{scaling}"], [0.1], [0])
        else:
            assert make_grid([f"int4/int8:{scaling}"], [0.1], [0])


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("32-true", {"precision": "32-true", "plugins": None}),
        ("bf16-mixed", {"precision": "bf16-mixed", "plugins": None}),
        ("e8m5", simulated(weights="e8m5", activations="e8m5", gradients="e8m5", scaling="none")),
        ("e4m3", simulated(weights="e4m3", activations="e4m3", gradients="e4m3")),
        ("e4m3/e5m2:row", simulated(weights="e4m3", activations="e4m3", gradients="e5m2", scaling="row")),
        ("int4:group:128", simulated(weights="int4", activations="int4", gradients="int4", scaling="group:128")),
        ("e8m5:tensor", simulated(weights="e8m5", activations="e8m5", gradients="e8m5", scaling="tensor")),
    ],
)
def test_what_a_precision_means(precision, expected, here):
    wanted = expected if isinstance(expected, dict) else {"precision": None, "plugins": expected}
    assert precision_settings(precision, ["mine.yaml"]) == wanted


def test_plugins_of_the_config_stay_and_its_precision_gives_way(here):
    io = {"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}
    own = {"class_path": "pkg.SimulatedPrecision", "init_args": {"weights": "int8", "scaling": "row", "exclude": ["a"]}}
    other = {"class_path": "lightning.pytorch.plugins.HalfPrecision"}
    (here / "a.yaml").write_text(yaml.safe_dump({"trainer": {"plugins": [io, other]}}))
    (here / "b.yaml").write_text(yaml.safe_dump({"trainer": {"plugins+": own}}))
    assert precision_settings("32-true", ["a.yaml", "b.yaml"])["plugins"] == [io]
    settings = {"weights": "e8m5", "scaling": "row", "exclude": ["a"], "activations": "e8m5", "gradients": "e8m5"}
    assert precision_settings("e8m5", ["a.yaml", "b.yaml"])["plugins"] == [io, *simulated(**settings)]
    (here / "c.yaml").write_text("trainer: {plugins: null}")
    assert precision_settings("32-true", ["a.yaml", "b.yaml", "c.yaml"])["plugins"] is None


OWN_SCALINGS = {"weight_scaling": "row", "activation_scaling": "group:32", "gradient_scaling": "tensor"}


def settings_of(precision, here, **own):
    (here / "own.yaml").write_text(yaml.safe_dump({"trainer": {"plugins": simulated(**own)}}))
    (plugin,) = precision_settings(precision, ["own.yaml"])["plugins"]
    SimulatedPrecision(**plugin["init_args"])  # takes them
    return plugin["init_args"]


@pytest.mark.parametrize(
    ("precision", "left"),
    [
        ("int4", ["weight", "activation", "gradient"]),
        ("int4:group:128", []),
        ("e8m5:none", []),
        ("mxfp4", []),
        ("nvfp4", []),
        ("mxfp8_e5m2/int8", ["gradient"]),
        ("int8/mxfp6_e2m3", ["weight", "activation"]),
    ],
)
def test_scalings_of_the_config_stay_where_nothing_else_is_asked_for(precision, left, here):
    found = settings_of(precision, here, scaling="channel", **OWN_SCALINGS)
    expected = {f"{operand}_scaling": OWN_SCALINGS[f"{operand}_scaling"] for operand in left}
    assert {name: value for name, value in found.items() if name.endswith("_scaling")} == expected
    assert found["scaling"] == (precision.partition(":")[2] or "channel")


@pytest.mark.parametrize("own", [{}, {"include": ["*"]}, {"include": ["blocks.*"]}, {"exclude": ["*down*"]}])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_layers_that_a_preset_chooses_stay(preset, own, here):
    own = {"preset": preset, **own}
    found = settings_of("e8m5", here, **own)
    assert ("blocks.*" in own.get("include", [])) is (found["include"] != list(PROJECTIONS))
    before, after = SimulatedPrecision(**own).settings, SimulatedPrecision(**found).settings
    assert [after[name] for name in ("include", "exclude")] == [before[name] for name in ("include", "exclude")]
    assert (after["preset"], after["weights"], after["keep_outliers"]) == (None, "e8m5", 0)


@pytest.mark.parametrize("own", [{}, {"preset": None}])
def test_without_a_preset_all_layers_stay(own, here):
    assert "include" not in settings_of("e8m5", here, **own)
