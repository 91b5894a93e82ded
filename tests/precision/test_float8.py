"""Float8Precision against torchao used by hand, and torchao's faults that it works around."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import torchao_checks
from contract.broken import row
from contract.torchao_checks import to_float8
from precision.torchao_runs import by_hand, train
from precision.torchao_samples import needs_torchao
from torch import nn

from lightning_stable.precision.float8 import Float8Precision
from lightning_stable.testing import contracts
from lightning_stable.testing.contracts import MOMENTS
from lightning_stable.testing.harness import assert_same
from lightning_stable.testing.workers import Pair

pytestmark = needs_torchao
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
each_recipe = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(scope="module")
def exact() -> list[float]:
    """The losses in float32."""
    return train(None).losses


@each_recipe
def test_it_is_torchao_by_hand_bit_for_bit(recipe: str) -> None:
    module, expected = train(Float8Precision(recipe)), by_hand(to_float8(recipe))
    assert_same(module.losses, expected.losses, f"losses of {recipe}")
    assert_same(dict(module.state_dict()), dict(expected.weights), f"weights of {recipe}")


@each_recipe
def test_it_follows_float32_and_is_not_float32(recipe: str, exact: list[float]) -> None:
    found = train(Float8Precision(recipe)).losses
    assert exact[-1] < 0.7 * exact[0], "the task is not learned"
    assert found[0] != exact[0]
    assert found == pytest.approx(exact, rel=0.05)


def test_recipes_differ_in_what_they_say_they_do() -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(32, 16), torch.randn(32, 16)
    plain = nn.Linear(16, 16)
    errors = {}
    for recipe in RECIPES:
        layer = to_float8(recipe)(nn.Sequential(nn.Linear(16, 16)))[0]
        layer.load_state_dict(plain.state_dict())
        (found,) = torch.autograd.grad(layer(x), layer.weight, gradient)
        (wanted,) = torch.autograd.grad(plain(x), plain.weight, gradient)
        errors[recipe] = float((found - wanted).norm() / wanted.norm())
    assert errors["rowwise_with_gw_hp"] < 1e-6 < 1e-3 < errors["rowwise"] < errors["tensorwise"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_it_resumes_bit_by_bit(moment: str, tmp_path: Path) -> None:
    contracts.check_resume(row(Float8Precision, make=torchao_checks.SETTINGS["float8"].make), tmp_path, moment=moment)


def test_it_resumes_within_the_first_steps(tmp_path: Path) -> None:
    settings = {**torchao_checks.FLOAT8, "first_steps_high_precision": 11}
    contracts.check_resume(row(Float8Precision, make=lambda: Float8Precision(**settings)), tmp_path)


@pytest.mark.parametrize("how", contracts.PRECISIONS)
def test_the_oracle_of_the_contracts(how: str, tmp_path: Path) -> None:
    of_row = replace(row(Float8Precision), settings=torchao_checks.SETTINGS["float8"])
    contracts.check_oracle(of_row, how, tmp_path)


@each_recipe
def test_two_processes_stay_alike(recipe: str, workers: Pair, exact: list[float]) -> None:
    ranks = workers.run("precision.torchao_runs:ddp_job", name="float8", recipe=recipe)
    assert_same(ranks[0]["weights"], ranks[1]["weights"], "rank 0 against rank 1")
    for rank in ranks:
        assert rank["during"] == ["Float8Linear"] * 6
        assert rank["after"] == ["Linear"] * 3
    means = [sum(losses) / 2 for losses in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert means == pytest.approx(exact[:6], rel=0.05)
    assert means != exact[:6]


# --------------------------------------------------------------------------------- faults of torchao


def test_torchao_cannot_take_rows_that_are_not_contiguous() -> None:
    """If this fails, torchao was mended: the plugin need not make inputs contiguous any more."""
    layer = to_float8("rowwise")(nn.Sequential(nn.Linear(16, 16)))
    x = torch.randn(2, 16, 4).transpose(1, 2)
    with pytest.raises(AssertionError, match="axiswise scaling is not supported yet"):
        layer(x)
    layer(x.contiguous())


def test_torchao_cannot_take_rows_in_inference_mode() -> None:
    """If this fails, torchao was mended: the plugin need not leave inference mode any more."""
    layer = to_float8("rowwise")(nn.Sequential(nn.Linear(16, 16)))
    with torch.inference_mode(), pytest.raises(AssertionError, match="axiswise scaling is not supported yet"):
        layer(torch.randn(4, 16))


def test_torchao_does_not_heed_autocast_on_the_cpu() -> None:
    """If this fails, torchao was mended: the plugin need not cast the input any more."""
    torch.manual_seed(0)
    layer, x = to_float8("tensorwise")(nn.Sequential(nn.Linear(16, 16))), torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(layer(x), layer(x.bfloat16()))


def test_torchao_cannot_take_an_empty_batch() -> None:
    """If this fails, torchao was mended: the plugin need not leave empty batches to the ordinary layer any more."""
    layer = to_float8("tensorwise")(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(RuntimeError):
        layer(torch.randn(0, 16))


# --------------------------------------------------------------------------------- settings


def test_settings_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe='blockwise' is unknown\. Choose one of 'tensorwise'"):
        Float8Precision("blockwise")
    cuda = torch.device("cuda", 0)
    with pytest.raises(ValueError, match="Float8Precision: width_multiple=8 is not a multiple of 16"):
        Float8Precision(width_multiple=8)._check_device(cuda)
    Float8Precision(width_multiple=8)._check_device(torch.device("cpu"))


def test_a_gpu_without_float8_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"capability 8\.9 or higher .* \(A100\) has 8\.0\. Use SimulatedPrecision"):
        Float8Precision()._check_device(cuda)
    Float8Precision(emulate=True)._check_device(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    Float8Precision()._check_device(cuda)
    with pytest.raises(ValueError, match=r"trains on mps\. Use SimulatedPrecision"):
        Float8Precision()._check_device(torch.device("mps"))


@pytest.mark.parametrize("emulate", [None, False])
def test_emulation_is_what_the_config_says(emulate: bool | None) -> None:
    layer = nn.Sequential(nn.Linear(16, 16))
    for device, expected in (("cpu", emulate is None), ("cuda", False)):
        sample = Float8Precision(emulate=emulate)._convert_sample(layer, torch.device(device))
        assert sample.attributes["config"].emulate is expected
        assert sample.attributes["row_multiple"] == (1 if expected else 16)
        # And nothing else than the recipe.
        recipe = type(sample.attributes["config"])
        assert replace(sample.attributes["config"], emulate=False) == recipe.from_recipe_name("tensorwise")


def test_the_benchmark_refuses_a_machine_without_float8(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import float8_gpu

    monkeypatch.setattr(sys, "argv", ["float8_gpu.py"])
    for there, message in ((False, "there is no CUDA device"), (True, "A100 has compute capability 8.0")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        with pytest.raises(SystemExit) as caught:
            float8_gpu.main()
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
