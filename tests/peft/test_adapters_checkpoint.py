"""Checkpoints of adapters: small, and exact on the untouched base, in another process, in a run and without one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import INITS, Net, adapters, fit, loader, outputs
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_stable.callbacks.ema import EMA
from lightning_stable.peft import load_adapters, load_from_checkpoint, merge_adapters
from lightning_stable.peft._record import KEY, find_record, fingerprint
from lightning_stable.testing.harness import QUIET, SaveAt

TESTS = Path(__file__).resolve().parent


def trained(init: str, kind: str = "mlp", steps: int = 10, path: str = "last.ckpt", **settings: Any) -> Net:
    """Return a module that was trained, of which a checkpoint was saved."""
    module = Net(kind)
    trainer = fit(module, adapters(init, kind, **settings), steps=steps)
    trainer.save_checkpoint(path)
    return module


def test_every_init_is_loaded_bit_by_bit_in_a_fresh_process(tmp_path: Path) -> None:
    jobs, expected = [], {}
    for init in INITS:
        for kind in ("gpt2", "mlp") if init in ("pissa", "lora_ga", "eva") else ("gpt2",):
            path = str(tmp_path / f"{init}-{kind}.ckpt")
            module = trained(init, kind, path=path, trainable=["head.*"] if kind == "mlp" else [])
            jobs.append({"kind": kind, "path": path})
            expected[path] = outputs(module, kind)
            assert not torch.equal(expected[path], outputs(Net(kind), kind))
    for form, kind, save in (("nf4", "mlp", "adapter"), ("fp4", "llama", "adapter"), ("nf4", "llama", "full")):
        path = str(tmp_path / f"{form}-{kind}.ckpt")
        module = trained("pissa", kind, path=path, save=save, init_options={"quantize_residual": form, "rounds": 2})
        jobs.append({"kind": kind, "path": path})
        expected[path] = outputs(module, kind)
        assert not torch.equal(expected[path], outputs(Net(kind), kind))
    code = f"import adapter_runs; adapter_runs.load_all({jobs!r}, {str(tmp_path)!r})"
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "other codes" not in done.stderr
    assert "kernels-community" not in done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for path, wanted in expected.items():
        for value in found[path]:
            assert torch.equal(value, wanted), path


def test_a_checkpoint_holds_what_trains_buffers_and_the_record() -> None:
    module = trained("pissa", trainable=["head.*"])
    checkpoint = torch.load("last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {
        "model.first.lora_A.default.weight",
        "model.first.lora_B.default.weight",
        "model.second.lora_A.default.weight",
        "model.second.lora_B.default.weight",
        "model.norm.running_mean",
        "model.norm.running_var",
        "model.norm.num_batches_tracked",
        "head.weight",
        "head.bias",
    }
    assert checkpoint["state_dict"]["model.norm.num_batches_tracked"] == 10
    record = checkpoint[KEY]
    assert {name: record[name] for name in ("format", "model", "init", "save", "trainable")} == {
        "format": 1,
        "model": "model",
        "init": "pissa",
        "save": "adapter",
        "trainable": ["head.*"],
    }
    assert record["config"]["peft_type"] == "LORA"
    assert record["config"]["r"] == 4
    assert record["config"]["init_lora_weights"] is True
    assert record["scaling"] == {"first": 2.0, "second": 2.0}
    assert {name: tuple(value.shape) for name, value in record["shift"]["first"].items()} == {
        "a": (4, 12),
        "b": (20, 4),
    }
    assert record["base"]["first"] == fingerprint(Net().model.first.weight)
    assert record["trained"] == [name for name in checkpoint["state_dict"] if "norm" not in name]
    del module


def test_it_is_kilobytes() -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(5)
                self.model = nn.Sequential()
                self.model.first = nn.Linear(12, 1024)
                self.model.second = nn.Linear(1024, 16)

    for init in ("pissa", "eva"):
        trainer = fit(Wide(), adapters(init), steps=1)
        sizes = {}
        for save in ("adapter", "full"):
            trainer.callbacks[0].save = save
            trainer.save_checkpoint(f"{save}.ckpt", weights_only=False)
            sizes[save] = Path(f"{save}.ckpt").stat().st_size
        checkpoint = torch.load("adapter.ckpt", weights_only=True)
        held = sum(value.numel() for value in checkpoint["state_dict"].values())
        assert held < 0.35 * sum(parameter.numel() for parameter in Wide().parameters())
        assert sizes["adapter"] < sizes["full"] - 4 * 1024 * 27


@pytest.mark.parametrize(
    ("init", "save"),
    [
        *((init, "adapter") for init in ("default", "mica", "pissa", "lora_ga", "eva", "loldu", "svfit")),
        ("pissa", "full"),
        ("eva", "full"),
    ],
)
def test_a_run_resumes_bit_by_bit(init: str, save: str) -> None:
    settings = {"trainable": ["head.*"], "save": save, "init_options": {"rho": 1.5} if init == "eva" else {}}
    whole, resumed = without_dropout(), without_dropout()
    data = loader(shuffle=False)
    fit(whole, adapters(init, **settings), SaveAt(5, "five.ckpt"), steps=10, data=data)
    fit(resumed, adapters(init, **settings), steps=10, data=Rest(5), seed=99, ckpt_path="five.ckpt")
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def without_dropout() -> Net:
    """Return a module that draws no random numbers, of which a checkpoint would not hold the state."""
    module = Net()
    module.model.drop.p = 0.0
    return module


class Rest:
    """The batches of an unshuffled loader from one on."""

    def __init__(self, start: int) -> None:
        self.batches = list(loader(shuffle=False))[start:]

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_no_data_pass_runs_on_a_resume_and_ranks_of_eva_survive() -> None:
    module = trained("eva", config={"r": 6}, steps=5)
    ranks = {name: getattr(module.model, name).r["default"] for name in ("first", "second")}
    assert len(set(ranks.values())) == 2
    resumed, callback = Net(), adapters("eva", config={"r": 6}, init_loss="test_adapters_checkpoint.never")
    fit(resumed, callback, steps=7, ckpt_path="last.ckpt")
    assert {name: getattr(resumed.model, name).r["default"] for name in ranks} == ranks
    assert resumed.model.first.scaling == {"default": pytest.approx(8 / 6)}


def never(_module: Any, _batch: Any) -> Tensor:
    raise AssertionError("a data pass ran")


def test_other_stages_take_a_checkpoint_of_adapters() -> None:
    module = trained("pissa")
    expected = outputs(module, "mlp")
    data = loader(shuffle=False)
    for stage in ("validate", "test", "predict"):
        fresh = Net()
        trainer = Trainer(callbacks=[adapters("pissa")], **QUIET)
        settings = {} if stage == "predict" else {"verbose": False}
        getattr(trainer, stage)(fresh, data, ckpt_path="last.ckpt", **settings)
        assert torch.equal(outputs(fresh, "mlp"), expected)
        # And the same module again, which has adapters by now.
        getattr(trainer, stage)(fresh, data, ckpt_path="last.ckpt", **settings)
        assert torch.equal(outputs(fresh, "mlp"), expected)


def test_the_best_checkpoint_of_a_run_is_tested(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="train_loss", save_top_k=1, save_weights_only=True)
    module = Net()
    trainer = fit(module, adapters("lora_ga"), keep, steps=12, enable_checkpointing=True, max_epochs=1)
    checkpoint = torch.load(keep.best_model_path, weights_only=True)
    assert KEY in checkpoint
    assert not any("base_layer" in name for name in checkpoint["state_dict"])
    trainer.test(module, loader(shuffle=False), ckpt_path="best", verbose=False)
    assert torch.equal(outputs(load_adapters(Net(), keep.best_model_path), "mlp"), outputs(module, "mlp"))


@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_a_bare_model_is_loaded_and_what_trained_trains(init: str) -> None:
    module = trained(init, "llama")
    bare = load_adapters(Net("llama").model, "last.ckpt")
    assert torch.equal(outputs(bare, "llama"), outputs(module, "llama"))
    loaded = load_adapters(Net("llama"), torch.load("last.ckpt", weights_only=True))
    for each in (loaded, module):
        train = [name for name, parameter in each.named_parameters() if parameter.requires_grad]
        assert train
        assert all("lora_" in name for name in train)
    merged = merge_adapters(bare)
    assert merged.state_dict().keys() == Net("llama").model.state_dict().keys()
    assert torch.allclose(outputs(merged, "llama"), outputs(module, "llama"), atol=1e-5)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_full_checkpoints_are_loaded_onto_any_base() -> None:
    module = trained("pissa", save="full")
    other = Net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    assert torch.equal(outputs(load_adapters(other, "last.ckpt"), "mlp"), outputs(module, "mlp"))


def test_a_trained_head_is_kept_and_a_missing_weight_is_still_an_error() -> None:
    module = trained("lora_ga", trainable=["head.*"])
    loaded = load_from_checkpoint(Net, "last.ckpt")
    assert torch.equal(loaded.head.weight, module.head.weight)
    assert not torch.equal(loaded.head.weight, Net().head.weight)
    for name in ("head.bias", "model.first.lora_A.default.weight", "model.norm.running_var"):
        checkpoint = torch.load("last.ckpt", weights_only=True)
        del checkpoint["state_dict"][name]
        with pytest.raises(RuntimeError, match=name):
            load_adapters(Net(), checkpoint)
        torch.save(checkpoint, "broken.ckpt")
        with pytest.raises(RuntimeError, match=name):
            load_from_checkpoint(Net, "broken.ckpt")
        with pytest.raises(RuntimeError, match=name):
            fit(Net(), adapters("lora_ga", trainable=["head.*"]), ckpt_path="broken.ckpt")


def test_loading_leaves_the_class_and_checkpoints_without_adapters_alone() -> None:
    class Hooked(Net):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.names = set(checkpoint["state_dict"])

    trained("pissa")
    before = vars(Hooked)["on_load_checkpoint"]
    loaded = load_from_checkpoint(Hooked, "last.ckpt")
    assert loaded.names == set(loaded.state_dict())  # it sees the weights complete
    assert vars(Hooked)["on_load_checkpoint"] is before
    assert "on_load_checkpoint" not in vars(Net)
    plain = Net()
    fit(plain, steps=2).save_checkpoint("plain.ckpt")
    assert torch.equal(outputs(load_from_checkpoint(Net, "plain.ckpt"), "mlp"), outputs(plain, "mlp"))


def test_the_precision_of_the_run_is_found_again() -> None:
    module, callback = Net(), adapters("pissa")
    trainer = fit(module, callback, steps=6, precision="bf16-true")
    trainer.save_checkpoint("half.ckpt")
    expected = outputs_in_half(module)
    assert torch.equal(outputs_in_half(load_adapters(Net().bfloat16(), "half.ckpt")), expected)
    # A float32 base holds the same values, only wider.
    wide = load_adapters(Net(), "half.ckpt")
    assert wide.model.first.base_layer.weight.dtype == torch.float32
    assert torch.equal(wide.model.first.base_layer.weight.bfloat16(), module.model.first.base_layer.weight)
    fresh = Net()
    fit(fresh, adapters("pissa"), steps=6, precision="bf16-true", ckpt_path="half.ckpt")
    assert torch.equal(outputs_in_half(fresh), expected)


@torch.no_grad()
def outputs_in_half(module: Net) -> Tensor:
    training = module.training
    found = module.eval()(torch.linspace(-1, 1, 36).view(3, 12).bfloat16())
    module.train(training)
    return found


def test_ema_goes_with_it_and_resumes() -> None:
    whole, resumed = without_dropout(), without_dropout()
    data = loader(shuffle=False)
    fit(whole, adapters("pissa"), EMA(decay=0.8), SaveAt(5, "five.ckpt"), steps=10, data=data)
    fit(resumed, adapters("pissa"), EMA(decay=0.8), steps=10, data=Rest(5), ckpt_path="five.ckpt")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    checkpoint = torch.load("five.ckpt", weights_only=True)
    assert not any("base_layer" in name for name in checkpoint["state_dict"])
    average = checkpoint["callbacks"]["EMA"]["shadow"]["model.first.lora_A.default.weight"]
    assert torch.equal(checkpoint["state_dict"]["model.first.lora_A.default.weight"], average)


def test_a_checkpoint_of_an_exception_and_of_a_parameter_that_was_frozen_again_are_whole() -> None:
    class Freezes(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Net, *args: Any) -> None:
            if trainer.global_step == 3:
                pl_module.head.weight.requires_grad_(False)
            if trainer.global_step == 5:
                raise RuntimeError("stop here")

        def on_exception(self, trainer: Trainer, *args: Any) -> None:
            trainer.save_checkpoint("failed.ckpt")

    module = Net()
    with pytest.raises(RuntimeError, match="stop here"):
        fit(module, adapters("pissa", trainable=["head.*"]), Freezes(), steps=9)
    loaded = load_adapters(Net(), "failed.ckpt")
    assert torch.equal(outputs(loaded, "mlp"), outputs(module, "mlp"))


def test_fingerprints_tell_weights_apart_and_not_devices_or_layouts() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    marks = [fingerprint(weight), fingerprint(weight.T.contiguous().T), fingerprint(nn.Parameter(weight.clone()))]
    assert len(set(marks)) == 1
    for row in (0, 7, 299):
        other = weight.clone()
        other[row, 3] = torch.nextafter(other[row, 3], torch.tensor(9.0))
        assert fingerprint(other) != marks[0]
    assert fingerprint(weight.bfloat16()) != marks[0]
    assert fingerprint(weight.T) != marks[0]


def test_a_record_is_found_on_the_adapted_part_only() -> None:
    module = trained("default")
    found = find_record(module)
    assert found is not None
    assert found[0] == "model"
    merge_adapters(module)
    assert find_record(module) is None
    fit(module, steps=1).save_checkpoint("plain.ckpt")
    assert KEY not in torch.load("plain.ckpt", weights_only=True)


def test_an_adapter_checkpoint_after_a_full_one_of_another_base_is_of_that_base() -> None:
    def other() -> Net:
        module = Net()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        return module

    fit(other(), adapters("default", save="full"), steps=3).save_checkpoint("full.ckpt")
    module = Net()
    fit(module, adapters("default"), steps=1)
    trainer = fit(module, adapters("default"), steps=6, ckpt_path="full.ckpt")
    trainer.save_checkpoint("small.ckpt")
    assert torch.equal(outputs(load_adapters(other(), "small.ckpt"), "mlp"), outputs(module, "mlp"))
    with pytest.raises(ValueError, match="is not the one that the checkpoint's"):
        load_adapters(Net(), "small.ckpt")


@pytest.mark.parametrize("most", [256, 1])
def test_another_frozen_head_is_refused(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_stable.peft._beside._MOST", most)
    trained("pissa")
    other = Net()
    other.head.weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"beside the adapted layers" if most == 1 else r"'head.weight', which lies"):
        load_adapters(other, "last.ckpt")
    load_adapters(Net(), "last.ckpt")
    old = torch.load("last.ckpt", weights_only=True)
    del old[KEY]["rest"]
    load_adapters(other, old)  # of a version that did not note it
    trained("pissa", trainable=["head.*"])
    load_adapters(other := Net(), "last.ckpt")


def test_a_checkpoint_of_weights_alone_that_a_later_callback_saves_on_an_exception_is_whole(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("stop here")

    module, names = Net(), set(vars(Net()))
    keep = ModelCheckpoint(tmp_path, save_weights_only=True, save_on_exception=True)
    with pytest.raises(RuntimeError, match="stop here"):
        fit(module, adapters("pissa"), Fails(), keep, steps=9, enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    assert torch.equal(outputs(load_adapters(Net(), path), "mlp"), outputs(module, "mlp"))
    assert not {"on_load_checkpoint", "on_save_checkpoint"} & (set(vars(module)) - names)
