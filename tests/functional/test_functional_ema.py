"""The moving average of weights against a slow twin, torch's own averaging function and timm's warm-up formula."""

import pytest
import torch
from oracles import averaging_twin
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_stable.functional.ema import EMAState, check_decay, ema_decay, init_ema, update_ema

SIZES = ((3, 4), (5,), (1,), (), (2, 3, 2))


def history(steps, dtype=torch.float32, seed=0):
    """Weights after each of ``steps`` steps, the starting ones first."""
    generator = torch.Generator().manual_seed(seed)
    models = []
    for _ in range(steps + 1):
        models.append([torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in SIZES])
    return models


def as_lists(tensors):
    return [tensor.double().flatten().tolist() for tensor in tensors]


def averaged(models, decay, warmup=None, **where):
    state = init_ema(models[0], **where)
    for model in models[1:]:
        state = update_ema(state, model, decay, warmup)
    return state


def assert_same(tensors, lists, tolerance):
    for tensor, values in zip(tensors, lists, strict=True):
        assert tensor.double().flatten().tolist() == pytest.approx(values, rel=tolerance, abs=tolerance)


# ----------------------------------------------------------------------------- decay


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_without_warmup_the_decay_is_the_given_one(decay):
    assert [ema_decay(decay, updates, None) for updates in (0, 1, 10_000)] == [decay] * 3


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_the_power_warmup_is_timms(decay):
    def timm(t, gamma=1.0, power=2 / 3):
        return max(0.0, min(decay, 1 - (1 + t / gamma) ** -power))

    values = [ema_decay(decay, updates, "power") for updates in range(2000)]
    assert values == pytest.approx([timm(t) for t in range(2000)], rel=1e-12)
    assert values[:100] == pytest.approx([averaging_twin.ema_decay(decay, t, "power") for t in range(100)], rel=1e-12)


def test_the_power_warmup_starts_as_a_copy_rises_and_stops_at_the_decay():
    assert ema_decay(0.9, 0, "power") == 0.0
    assert ema_decay(0.9, 7, "power") == pytest.approx(0.75)
    assert ema_decay(0.9, 26, "power") == pytest.approx(1 - 1 / 9)
    assert ema_decay(0.9, 1000, "power") == 0.9
    assert ema_decay(0.5, 26, "power") == 0.5


def test_an_unknown_warmup_is_named_with_the_allowed_one():
    with pytest.raises(ValueError, match="linear") as caught:
        ema_decay(0.9, 0, "linear")
    assert "power" in str(caught.value)


@pytest.mark.parametrize("decay", [0, 0.0, 0.5, 0.99999])
def test_a_decay_from_zero_up_to_one_is_accepted(decay):
    check_decay("decay", decay)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.0, 1.5, float("nan"), True, False, "0.9"])
def test_any_other_decay_is_refused_and_named(decay):
    with pytest.raises(ValueError, match="fallback_decay") as caught:
        check_decay("fallback_decay", decay)
    assert str(decay) in str(caught.value)


# ----------------------------------------------------------------------------- start


def test_the_shadow_starts_as_a_detached_copy():
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    before = [weight.detach().clone() for weight in weights]
    state = init_ema(weights)
    assert isinstance(state, EMAState)
    assert state.updates == 0
    assert isinstance(state.shadow, list)
    with torch.no_grad():
        for weight in weights:
            weight.add_(1.0)
    for shadow, weight, value in zip(state.shadow, weights, before, strict=True):
        assert not shadow.requires_grad
        assert shadow.grad_fn is None
        assert shadow.data_ptr() != weight.data_ptr()
        assert shadow.dtype == weight.dtype
        assert torch.equal(shadow, value)


def test_asking_for_the_dtype_they_have_still_copies():
    weights = [torch.randn(3)]
    state = init_ema(weights, device=torch.device("cpu"), dtype=torch.float32)
    assert state.shadow[0].data_ptr() != weights[0].data_ptr()


def test_the_shadow_takes_the_asked_dtype():
    weights = [torch.randn(3, dtype=torch.bfloat16), torch.randn(2, dtype=torch.bfloat16)]
    state = init_ema(weights, dtype=torch.float32)
    assert [shadow.dtype for shadow in state.shadow] == [torch.float32] * 2
    assert torch.equal(state.shadow[0], weights[0].float())


def test_no_tensors_are_no_trouble():
    state = update_ema(init_ema([]), [], 0.9)
    assert state.shadow == []
    assert state.updates == 1


# ----------------------------------------------------------------------------- updates


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("warmup", [None, "power"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_same_as_the_twin(decay, warmup, dtype, tolerance):
    models = history(25, dtype)
    state = averaged(models, decay, warmup)
    expected = averaging_twin.ema([as_lists(model) for model in models], decay, warmup)
    assert_same(state.shadow, expected, tolerance)
    assert all(shadow.dtype == dtype for shadow in state.shadow)
    assert state.updates == 25


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float16])
def test_a_float32_shadow_of_low_precision_weights_keeps_float32_precision(weights_dtype):
    models = history(200, weights_dtype)
    state = averaged(models, 0.99, dtype=torch.float32)
    assert_same(state.shadow, averaging_twin.ema([as_lists(model) for model in models], 0.99), 2e-6)
    assert all(shadow.dtype == torch.float32 for shadow in state.shadow)


def test_a_float32_shadow_sees_steps_that_bfloat16_would_lose():
    weights = [torch.ones(8, dtype=torch.bfloat16)]
    state = init_ema(weights, dtype=torch.float32)
    moved = [torch.full((8,), 1.0078125, dtype=torch.bfloat16)]  # the next bfloat16 number
    for _ in range(100):
        state = update_ema(state, moved, 0.999)
    expected = 1.0078125 - 0.0078125 * 0.999**100
    assert state.shadow[0].tolist() == pytest.approx([expected] * 8, rel=1e-6)


def test_a_bfloat16_shadow_stays_near_the_twin():
    models = history(10, torch.bfloat16)
    state = averaged(models, 0.5)
    assert all(shadow.dtype == torch.bfloat16 for shadow in state.shadow)
    assert_same(state.shadow, averaging_twin.ema([as_lists(model) for model in models], 0.5), 3e-2)


def test_a_float64_shadow_of_float32_weights():
    models = history(50, torch.float32)
    state = averaged(models, 0.9, "power", dtype=torch.float64)
    assert_same(state.shadow, averaging_twin.ema([as_lists(model) for model in models], 0.9, "power"), 1e-8)


def test_a_mixture_of_dtypes_in_one_model():
    models = [
        [tensor.to(dtype) for tensor, dtype in zip(model, (torch.float32, torch.bfloat16) * 3, strict=False)]
        for model in history(20, torch.float64)
    ]
    state = averaged(models, 0.9, dtype=torch.float32)
    assert_same(state.shadow, averaging_twin.ema([as_lists(model) for model in models], 0.9), 2e-6)
    kept = averaged(models, 0.9)
    assert [shadow.dtype for shadow in kept.shadow] == [tensor.dtype for tensor in models[0]]
    assert_same(kept.shadow, averaging_twin.ema([as_lists(model) for model in models], 0.9), 5e-2)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_same_as_torchs_averaging_function(decay):
    models = history(30)
    state = averaged(models, decay)
    theirs = [tensor.clone() for tensor in models[0]]
    update = get_ema_multi_avg_fn(decay)
    for model in models[1:]:
        update(theirs, model, None)
    for mine, expected in zip(state.shadow, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_decay_zero_makes_the_shadow_the_live_weights_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        models = history(5, dtype)
        state = init_ema(models[0])
        for model in models[1:]:
            state = update_ema(state, model, 0.0)
            assert all(torch.equal(shadow, live) for shadow, live in zip(state.shadow, model, strict=True))


def test_the_first_update_under_the_power_warmup_copies():
    models = history(1)
    state = averaged(models, 0.999, "power")
    assert all(torch.equal(shadow, live) for shadow, live in zip(state.shadow, models[1], strict=True))


def test_decay_one_leaves_the_shadow_alone():
    models = history(5)
    state = averaged(models, 1.0)
    assert all(torch.equal(shadow, start) for shadow, start in zip(state.shadow, models[0], strict=True))


def test_equal_weights_are_a_fixed_point():
    models = [history(0)[0]] * 50
    state = averaged(models, 0.9)
    for shadow, weight in zip(state.shadow, models[0], strict=True):
        torch.testing.assert_close(shadow, weight, rtol=1e-6, atol=0)


def test_the_update_is_in_place_counts_and_leaves_the_live_weights_alone():
    weights = [torch.nn.Parameter(tensor) for tensor in history(0)[0]]
    before = [weight.detach().clone() for weight in weights]
    state = init_ema([weight * 2 for weight in weights])
    storages = [shadow.data_ptr() for shadow in state.shadow]
    for updates in (1, 2, 3):
        state = update_ema(state, weights, 0.5, "power")
        assert state.updates == updates
    assert [shadow.data_ptr() for shadow in state.shadow] == storages
    assert not any(shadow.requires_grad for shadow in state.shadow)
    for weight, value in zip(weights, before, strict=True):
        assert torch.equal(weight, value)
        assert weight.requires_grad
        assert weight.grad is None


def test_the_warmup_goes_on_from_a_restored_count():
    models = history(30)
    whole = averaged(models, 0.95, "power")
    half = averaged(models[:16], 0.95, "power")
    restored = EMAState([shadow.clone() for shadow in half.shadow], half.updates)
    for model in models[16:]:
        restored = update_ema(restored, model, 0.95, "power")
    assert restored.updates == whole.updates
    assert all(torch.equal(a, b) for a, b in zip(restored.shadow, whole.shadow, strict=True))


def test_views_and_strided_weights_are_averaged_by_value():
    base = torch.arange(12.0).reshape(3, 4)
    state = update_ema(init_ema([torch.zeros(4, 3), torch.zeros(3)]), [base.t(), base[:, 1]], 0.75)
    torch.testing.assert_close(state.shadow[0], base.t() * 0.25)
    torch.testing.assert_close(state.shadow[1], base[:, 1] * 0.25)


def test_a_different_number_of_tensors_is_an_error():
    state = init_ema([torch.zeros(2), torch.zeros(3)])
    with pytest.raises((ValueError, RuntimeError)):
        update_ema(state, [torch.zeros(2)], 0.9)
    wide = init_ema([torch.zeros(2), torch.zeros(3)], dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError)):
        update_ema(wide, [torch.zeros(2)], 0.9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_shadow_on_another_device():
    models = [[tensor.cuda() for tensor in model] for model in history(10)]
    state = averaged(models, 0.9, device="cpu")
    assert all(shadow.device.type == "cpu" for shadow in state.shadow)
    assert_same(state.shadow, averaging_twin.ema([as_lists(model) for model in models], 0.9), 2e-6)
