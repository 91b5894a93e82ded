"""ReorthogonaliseLoRA: the function stays, the factors take their form, the optimizer goes on, runs resume."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from peft import LoraConfig, inject_adapter_in_model
from reorthogonalise_jobs import RANK, AdaptedNet, Batches, Look, factors, loader, product, trainer
from torch import Tensor, nn

from lightning_stable.callbacks import EMA, SpikeGuard
from lightning_stable.peft.reorthogonalise_lora import ReorthogonaliseLoRA
from lightning_stable.testing.harness import SaveAt
from lightning_stable.testing.workers import Pair


def run(
    every: int = 2,
    moments: str = "rotate",
    module: LightningModule | None = None,
    steps: int = 4,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> tuple[LightningModule, Look, Look]:
    module = AdaptedNet() if module is None else module
    before, after = Look(), Look()
    host = trainer([before, ReorthogonaliseLoRA(every, moments), after], max_steps=steps, **settings)
    host.fit(module, loader(dtype))
    return module, before, after


@torch.no_grad()
def assert_form(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a @ a.T, torch.eye(len(a), dtype=a.dtype), rtol=0.0, atol=tolerance)
    squares = b.T @ b
    assert float((squares - torch.diag(squares.diagonal())).abs().max()) < tolerance * max(1.0, float(squares.max()))


# ---------------------------------------------------------------------------------------------------- the factors


@pytest.mark.parametrize("freeze_a", [False, True])
def test_the_product_stays_and_the_factors_take_their_form_at_their_steps(freeze_a: bool) -> None:
    module, before, after = run(module=AdaptedNet(freeze_a=freeze_a), every=2, steps=5)
    for step in range(5):
        for (a, b), (new_a, new_b) in zip(before.seen[step], after.seen[step], strict=True):
            torch.testing.assert_close(new_b @ new_a, b @ a)
            if step % 2 == 1:
                assert_form(new_a, new_b)
                sigma = np.linalg.svd((b @ a).numpy(), compute_uv=False)[:RANK]
                torch.testing.assert_close(new_b.norm(dim=0), torch.from_numpy(sigma))
                assert not torch.equal(a, new_a)
            else:
                assert torch.equal(a, new_a)
                assert torch.equal(b, new_b)
    trains = {name: p.requires_grad for name, p in module.named_parameters() if "lora_" in name}
    assert {name: not ("lora_A" in name and freeze_a) for name in trains} == trains


def test_a_frozen_factor_moves_only_when_it_is_brought_into_form() -> None:
    _, before, after = run(module=AdaptedNet(freeze_a=True), every=2, steps=4)
    for layer in range(2):
        assert torch.equal(after.seen[1][layer][0], before.seen[3][layer][0])
        assert not torch.equal(before.seen[1][layer][0], after.seen[1][layer][0])


def test_steps_are_counted_and_not_batches() -> None:
    _, before, after = run(every=2, steps=3, accumulate_grad_batches=3)
    changed = [not torch.equal(old[0][0], new[0][0]) for old, new in zip(before.seen, after.seen, strict=True)]
    assert changed == [False] * 5 + [True] + [False] * 3


def test_a_gradient_that_is_still_being_accumulated_follows() -> None:
    class Manual(AdaptedNet):
        """Steps after each second batch, and keeps the gradient of a batch across its first one's end."""

        def __init__(self) -> None:
            super().__init__("sgd")
            self.automatic_optimization = False
            self.gradients: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            if batch_idx == 0:
                optimizer.step()  # nothing to step with: only the count moves
                self.manual_backward(nn.functional.mse_loss(self.model(batch[0]), batch[1]))
                self.batch = batch

        def on_train_batch_end(self, *args: Any) -> None:
            self.gradients = [p.grad.clone() for p in self.parameters() if p.requires_grad]

    module, *_ = run(every=1, module=Manual(), steps=1, limit_train_batches=1)
    trained = [p for p in module.parameters() if p.requires_grad]
    expected = torch.autograd.grad(nn.functional.mse_loss(module.model(module.batch[0]), module.batch[1]), trained)
    for found, there in zip(module.gradients, expected, strict=True):
        torch.testing.assert_close(found, there)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    settings = {"precision": "bf16-true"} if dtype == torch.bfloat16 else {}
    _, before, after = run(module=AdaptedNet(dtype=dtype), every=1, steps=2, dtype=dtype, **settings)
    for (a, b), (new_a, new_b) in zip(before.seen[-1], after.seen[-1], strict=True):
        assert new_a.dtype == dtype
        rest = new_b.float() @ new_a.float() - b.float() @ a.float()
        assert float(rest.norm() / (b.float() @ a.float()).norm()) < tolerance


def test_dora_rslora_and_other_adapters_of_the_module() -> None:
    module = AdaptedNet(use_dora=True, use_rslora=True)
    model = module.model
    model[0].update_layer("asleep", 2, lora_alpha=2, config=LoraConfig(r=2))
    module.double()
    asleep = [p.detach().clone() for name, p in module.named_parameters() if "asleep" in name]
    assert asleep
    x = torch.randn(4, 8, dtype=torch.float64)
    answers: list[Tensor] = []

    class Ask(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            answers.append(pl_module.model(x).detach())

    trainer([Ask(), ReorthogonaliseLoRA(1), Ask()], max_steps=1).fit(module, loader())
    torch.testing.assert_close(answers[0], answers[1])
    assert_form(*factors(module)[0])
    after = [p for name, p in module.named_parameters() if "asleep" in name]
    assert all(torch.equal(old, new) for old, new in zip(asleep, after, strict=True))


def test_embeddings_and_convolutions() -> None:
    class Mixed(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"tokens": nn.Embedding(9, 8), "conv": nn.Conv1d(8, 5, 3)})
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["tokens", "conv"]), self.model)
            for name, parameter in self.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model["conv"](self.model["tokens"](tokens).transpose(1, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.0)

    module = Mixed()
    tokens = torch.arange(8).view(1, 8)
    expected = module(tokens).detach()
    trainer([ReorthogonaliseLoRA(1)], max_steps=1).fit(module, Batches([tokens]))
    torch.testing.assert_close(module(tokens), expected, rtol=1e-4, atol=1e-4)
    a = module.model["conv"].lora_A["default"].weight.flatten(1)
    assert_form(a, module.model["conv"].lora_B["default"].weight.flatten(1), 1e-5)
    embedding = module.model["tokens"]
    assert_form(embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"], 1e-5)


# ---------------------------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_rotated_averages_are_those_of_the_gradients_in_the_new_coordinates(optimizer: str) -> None:
    """Against what is known of the change of coordinates: P from B' = B P, without any decomposition."""
    _, before, after = run(module=AdaptedNet(optimizer), every=3, steps=3)
    for layer in range(2):
        (a, b), (new_a, new_b) = before.seen[-1][layer], after.seen[-1][layer]
        change = torch.linalg.lstsq(b, new_b).solution  # P
        torch.testing.assert_close(change @ new_a, a)
        for number, turn_left, turn_right in (
            (2 * layer, change.T, None),
            (2 * layer + 1, None, torch.linalg.inv(change).T),
        ):
            old, new = before.states[-1][number], after.states[-1][number]
            for entry in old:
                if not isinstance(old[entry], Tensor) or old[entry].dim() == 0:
                    assert old[entry] == new[entry]
                    continue
                squares = entry in ("exp_avg_sq", "square_avg")
                turn = turn_left if turn_right is None else turn_right
                turn = turn**2 if squares else turn
                expected = turn @ old[entry] if turn_right is None else old[entry] @ turn
                torch.testing.assert_close(new[entry], expected)
                assert not torch.equal(new[entry], old[entry])


def test_momentum_goes_on_to_the_same_function_as_a_twin_in_the_new_coordinates() -> None:
    """SGD with momentum: a step after the change is that of a loop that moves everything by hand."""
    module, _, after = run(module=AdaptedNet("sgd"), every=2, steps=3)
    twin = AdaptedNet("sgd")
    optimizer = twin.configure_optimizers()
    for step, batch in zip(range(3), loader(), strict=False):
        optimizer.zero_grad()
        nn.functional.mse_loss(twin.model(batch[0]), batch[1]).backward()
        optimizer.step()
        if step == 1:
            for layer, (a, b) in enumerate(factors(twin)):
                u, sigma, vt = np.linalg.svd((b @ a).numpy())
                signs = np.sign((vt[:RANK] * after.seen[1][layer][0].numpy()).sum(1))
                new_a = torch.from_numpy(signs[:, None] * vt[:RANK])
                new_b = torch.from_numpy(u[:, :RANK] * sigma[:RANK] * signs)
                change = a @ new_a.T  # A = P A', and the rows of A' are orthonormal
                parameters = [p for p in twin.parameters() if p.requires_grad][2 * layer : 2 * layer + 2]
                moments = [optimizer.state[p]["momentum_buffer"] for p in parameters]
                moments[0].copy_(change.T @ moments[0])
                moments[1].copy_(moments[1] @ torch.linalg.inv(change).T)
                parameters[0].data.copy_(new_a)
                parameters[1].data.copy_(new_b)
    for found, expected in zip(product(module), product(twin), strict=True):
        torch.testing.assert_close(found, expected)


def test_reset_begins_the_optimizer_anew_for_the_factors_alone() -> None:
    _, before, after = run(moments="reset", every=2, steps=2, module=AdaptedNet(modules_to_save=None))
    assert before.states[1].keys() == {0, 1, 2, 3}
    assert after.states[1] == {}
    _, _, going_on = run(moments="reset", every=2, steps=3)
    assert all(int(state["step"]) == 1 for state in going_on.states[2].values())


def test_an_unknown_state_asks_for_reset() -> None:
    with pytest.raises(ValueError, match=r"does not know what 'exp_inf' in the state of Adamax .*moments='reset'"):
        run(module=AdaptedNet("adamax"))
    run(module=AdaptedNet("adamax"), moments="reset")


# ---------------------------------------------------------------------------------------------------- the host


@pytest.mark.parametrize("moments", ["rotate", "reset"])
@pytest.mark.parametrize("freeze_a", [False, True])
def test_a_resumed_run_is_the_run_that_went_on(moments: str, freeze_a: bool, tmp_path: Path) -> None:
    def go(steps: int, *others: Callback, path: str | None = None) -> tuple[AdaptedNet, Trainer]:
        module = AdaptedNet(freeze_a=freeze_a)
        host = trainer([ReorthogonaliseLoRA(3, moments), *others], max_steps=steps)
        host.fit(module, loader(), ckpt_path=path)
        return module, host

    path = str(tmp_path / "half.ckpt")
    whole, host = go(8, SaveAt(4, path))
    state = torch.load(path, weights_only=True)["callbacks"]
    assert [value for name, value in state.items() if "ReorthogonaliseLoRA" in name] == [{"steps": 1}]
    resumed, again = go(8, path=path)
    for expected, found in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, found)
    old, new = host.optimizers[0].state_dict()["state"], again.optimizers[0].state_dict()["state"]
    assert all(torch.equal(old[n][e], new[n][e]) for n in old for e in old[n])


def test_a_second_fit_counts_anew() -> None:
    callback, look = ReorthogonaliseLoRA(3), Look()
    for _ in range(2):
        look.seen.clear()
        trainer([callback, look], max_steps=2).fit(AdaptedNet(), loader())
        assert callback.state_dict() == {"steps": 2}


def test_never_within_a_run_changes_nothing() -> None:
    plain = AdaptedNet()
    trainer([], max_steps=4).fit(plain, loader())
    module, *_ = run(every=100)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), module.state_dict().values(), strict=True)
    )


def test_adapters_that_another_callback_makes_in_setup_are_seen() -> None:
    class Inject(Callback):
        def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), pl_module.model)

    class Bare(AdaptedNet):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(8, 5))

    module = Bare().float()
    trainer([ReorthogonaliseLoRA(1), Inject()], max_steps=2).fit(module, loader(torch.float32))
    assert_form(*factors(module)[0], 1e-5)


class Plain(AdaptedNet):
    """Without adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 5)).double()


def shared() -> AdaptedNet:
    module = AdaptedNet(target_modules=["0"])
    module.model.append(nn.Linear(5, 6))
    module.model.append(copy.deepcopy(module.model[0]))
    module.model[-1].lora_A = module.model[0].lora_A
    return module


def large_rank() -> AdaptedNet:
    return AdaptedNet(r=7)


def block_form() -> AdaptedNet:
    module = AdaptedNet()
    module.model[2].r["default"] = 2
    return module


@pytest.mark.parametrize(
    ("make", "others", "words"),
    [
        (Plain, [], "Plain has no layer with an active adapter of peft's LoRA"),
        (shared, [], "layer 'model.4' shares a factor"),
        (large_rank, [], "layer 'model.0' has rank 7, above its smaller side 6"),
        (block_form, [], "layer 'model.2' with Linear is not a product of two factors of rank 2"),
        (AdaptedNet, [EMA()], "ReorthogonaliseLoRA and EMA are both"),
        (AdaptedNet, [StochasticWeightAveraging(0.1)], "ReorthogonaliseLoRA and StochasticWeightAveraging are both"),
        (lambda: AdaptedNet(freeze_a=True), [SpikeGuard(rewind_after=3)], "SpikeGuard with rewind_after"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, others: list[Callback], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer([ReorthogonaliseLoRA(2), *others], max_epochs=2, limit_train_batches=2).fit(make(), loader())


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"every_n_steps": 0}, "every_n_steps=0"), ({"moments": "keep"}, "moments='keep' is unknown")],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReorthogonaliseLoRA(**settings)


# ---------------------------------------------------------------------------------------------------- processes


def assert_equal(left: Any, right: Any) -> None:
    for (a, b), (c, d) in zip(left, right, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_two_processes_have_the_same_factors(workers: Pair) -> None:
    first, second = workers.run("reorthogonalise_jobs:fit_under", strategy="ddp", freeze_a=False, every=2)
    for left, right in zip(first["after"], second["after"], strict=True):
        assert_equal(left, right)
    assert_form(*first["end"][0])


@pytest.mark.parametrize("freeze_a", [True, False])
def test_with_local_steps_it_waits_for_the_end_of_a_round(workers: Pair, freeze_a: bool) -> None:
    first, second = workers.run("reorthogonalise_jobs:fit_under", strategy="local_sgd", freeze_a=freeze_a, steps=7)
    for step, (mine, theirs) in enumerate(zip(first["after"], second["after"], strict=True)):
        before = first["before"][step]
        if step in (2, 5):
            assert_equal(mine, theirs)
            for (a, b), (new_a, new_b) in zip(before, mine, strict=True):
                assert_form(new_a, new_b)
                torch.testing.assert_close(new_b @ new_a, b @ a)
        else:
            assert_equal(before, mine)
            assert not torch.equal(mine[0][1], theirs[0][1])
            if freeze_a:
                assert torch.equal(mine[0][0], theirs[0][0])
    # The round after starts from the new factors: its mean is that of where the workers went.
    if freeze_a:
        mean = [(x[1] + y[1]) / 2 for x, y in zip(first["end"], second["end"], strict=True)]
        for end, expected in zip(first["end"], mean, strict=True):
            torch.testing.assert_close(end[1], expected)


@pytest.mark.parametrize("settings", [{"delayed": True}, {"comm_dtype": "bfloat16"}])
def test_an_exchange_that_is_no_plain_mean_is_refused(workers: Pair, settings: dict[str, Any]) -> None:
    told = workers.run("reorthogonalise_jobs:refusal_under", strategy="local_sgd", **settings)
    assert all("needs rounds that end in a plain mean of the weights at once" in text for text in told)
