"""The proof that each contract bites: a plugin that breaks it fails it, and one that breaks nothing passes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from contract import broken, broken_passes, settings
from contract.broken import row
from oracles.replay import Replay

from lightning_stable import registry
from lightning_stable.registry import Method
from lightning_stable.testing import contracts
from lightning_stable.testing.contracts import FAILURES, HEADINGS, MOMENTS, PRECISIONS, STEPS, Row
from lightning_stable.testing.harness import Net, Stream, assert_same, fit
from lightning_stable.testing.workers import Pair

BITES = AssertionError
HONEST = row(broken.Honest, identities=(lambda: broken.Honest(1.0),))


def addon(tmp_path: Path, plugin: type, **arguments: Any) -> Path:
    path = tmp_path / f"{plugin.__name__}.yaml"
    entry = {"class_path": f"contract.broken.{plugin.__name__}", "init_args": arguments}
    path.write_text(yaml.safe_dump({"trainer": {"callbacks+": [entry]}}))
    return path


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_harness_itself_resumes_exactly(moment: str, tmp_path: Path) -> None:
    """Without any effect of a plugin the host resumes bit by bit here, so a difference is the plugin's."""
    contracts.check_resume(row(broken.DoesNothing), tmp_path, moment=moment)
    contracts.check_resume(HONEST, tmp_path, moment=moment)


def test_the_harness_itself_repeats_exactly() -> None:
    one = fit([], validation=Stream(2, seed=5), max_steps=4)
    two = fit([], module=Net(), validation=Stream(2, seed=5), max_steps=4)
    assert_same(one.snapshot(), two.snapshot(), "two runs of nothing")


def test_the_stream_repeats_resumes_and_leaves_the_random_numbers_alone() -> None:
    stream, before = Stream(), torch.get_rng_state()
    first, second = list(stream), list(stream)
    assert_same(first, second, "two epochs")
    assert_same([tuple(batch) for batch in first], [stream.batch(index) for index in range(6)], "batches by number")
    assert torch.equal(torch.get_rng_state(), before)
    # The host stops at the last batch without seeing the end.
    for _ in zip(range(4), stream, strict=False):
        pass
    resumed = Stream()
    resumed.load_state_dict(stream.state_dict())
    assert_same(list(resumed), first[4:], "the rest of the epoch")


def test_the_stream_draws_from_the_batch_sampler_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(3)
    monkeypatch.setitem(vars(stream), "batch_sampler", [[5, 1], [2]])
    assert_same([x for x, _ in stream], [stream.dataset[[5, 1]][0], stream.dataset[[2]][0]], "samples")


def test_processes_share_each_batch_and_exchange_samples_from_epoch_to_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        order = Stream(2).order
        seen[rank] = [list(order) for _ in range(3)]
    assert seen[0][0] == [[0, 2, 4, 6], [8, 10, 12, 14]]
    assert seen[1][0] == [[1, 3, 5, 7], [9, 11, 13, 15]]
    assert (seen[0][1], seen[1][1]) == (seen[1][0], seen[0][0])
    assert (seen[0][2], seen[1][2]) == (seen[0][0], seen[1][0])


@pytest.mark.parametrize("how", PRECISIONS)
def test_the_replay_gives_the_gradients_and_buffers_of_the_run(how: str) -> None:
    run = fit([], validation=Stream(2, seed=5), max_steps=STEPS, **PRECISIONS[how])
    replay = Replay(run)
    for replayed in replay:
        assert_same(replayed.gradients(), replayed.step.gradients, f"gradients of step {replayed.number}", 1e-6)
        logged = [e["train_loss"] for number, e in run.logged if number == replayed.number and "train_loss" in e]
        assert replayed.losses()[-1] == pytest.approx(logged[-1], rel=1e-6), "the last micro-batch's loss is logged"
    assert_same(dict(replay.module.named_buffers()), dict(run.module.named_buffers()), "buffers", 1e-6)


@pytest.mark.parametrize("plugin", [broken.ForgetsItsState, broken.LogsItsMemory])
def test_01_resume_bites(plugin: type, tmp_path: Path) -> None:
    with pytest.raises(BITES, match="resumed run against uninterrupted run"):
        contracts.check_resume(row(plugin), tmp_path)


def test_01_resume_bites_on_what_saving_changes(tmp_path: Path) -> None:
    with pytest.raises(BITES, match="saving a checkpoint changed training"):
        contracts.check_resume(row(broken.MovesWhatIsSaved), tmp_path)


def test_01_resume_bites_at_a_validation(tmp_path: Path) -> None:
    contracts.check_resume(row(broken.LaysItsCountAside), tmp_path)
    with pytest.raises(BITES, match="resumed run against uninterrupted run"):
        contracts.check_resume(row(broken.LaysItsCountAside), tmp_path, moment="validation end")


def test_01_resume_bites_on_a_used_object(tmp_path: Path) -> None:
    with pytest.raises(BITES, match="resumed with used objects"):
        contracts.check_resume(row(broken.KeepsCounting), tmp_path)


def test_02_yaml_bites(tmp_path: Path) -> None:
    contracts.check_yaml(dataclasses.replace(HONEST, addons=(addon(tmp_path, broken.Honest, factor=0.25),)), tmp_path)
    with pytest.raises(BITES, match="has no addon"):
        contracts.check_yaml(HONEST, tmp_path)
    with pytest.raises(Exception, match="function"):
        contracts.check_yaml(
            dataclasses.replace(row(broken.NeedsAnObject), addons=(addon(tmp_path, broken.NeedsAnObject),)), tmp_path
        )
    with pytest.raises(BITES, match="from the saved config"):
        contracts.check_yaml(
            dataclasses.replace(row(broken.LosesItsArgument), addons=(addon(tmp_path, broken.LosesItsArgument),)),
            tmp_path,
        )
    replacing = addon(tmp_path, broken.Honest)
    replacing.write_text(replacing.read_text().replace("callbacks+", "callbacks"))
    with pytest.raises(BITES, match="replaced the user's own callbacks"):
        contracts.check_yaml(dataclasses.replace(HONEST, addons=(replacing,)), tmp_path)


@pytest.mark.parametrize("plugin", [broken.DrawsRandomNumbers, broken.LeavesEvalMode, broken.Honest])
def test_03_inert_bites(plugin: type, tmp_path: Path) -> None:
    contracts.check_inert(HONEST, tmp_path)
    with pytest.raises(BITES, match="at its identity against nothing"):
        contracts.check_inert(row(plugin), tmp_path)
    both = row(broken.Honest, identities=(lambda: broken.Honest(1.0), plugin))
    with pytest.raises(BITES, match="number 1"):
        contracts.check_inert(both, tmp_path)


def test_04_two_processes_bites(workers: Pair) -> None:
    contracts.check_two_processes(HONEST, workers)
    with pytest.raises(BITES, match="rank 1 against rank 0"):
        contracts.check_two_processes(row(broken.DiffersByRank), workers)
    with pytest.raises(BITES, match="two processes against one"):
        contracts.check_two_processes(row(broken.DependsOnWorldSize), workers)
    with pytest.raises(BITES, match="failed in"):
        workers.run("contract.broken:_no_oracle")
    assert contracts.check_two_processes(HONEST, workers) is None


def test_05_oracle_bites(tmp_path: Path) -> None:
    counts = row(broken.CountsBatches, broken._counts_steps)
    contracts.check_oracle(counts, "fp32", tmp_path)
    with pytest.raises(BITES):
        contracts.check_oracle(counts, "accumulation", tmp_path)
    looks = row(broken.LooksAfterClipping, broken._sees_gradients)
    contracts.check_oracle(looks, "fp32", tmp_path)
    with pytest.raises(BITES):
        contracts.check_oracle(looks, "clipping", tmp_path)


@pytest.mark.parametrize(
    ("plugin", "where", "message"),
    [
        (broken.LeavesAWrap, "train", "wrapped methods"),
        (broken.LeavesAHook, "train", "hooks are left"),
        (broken.LeavesOtherWeights, "validate", "weights after the exception"),
        (broken.RemembersAFailure, "train", "saw a failure"),
        (broken.RemembersAFailure, "validate", "saw a failure"),
    ],
)
def test_06_exception_bites(plugin: type, where: str, message: str, tmp_path: Path) -> None:
    contracts.check_exception(HONEST, where, tmp_path)
    with pytest.raises(BITES, match=message):
        contracts.check_exception(row(plugin), where, tmp_path)


@pytest.mark.parametrize("where", FAILURES)
def test_06_exception_passes_an_honest_plugin(where: str, tmp_path: Path) -> None:
    contracts.check_exception(HONEST, where, tmp_path)


@pytest.mark.parametrize(
    ("plugin", "unseen", "where", "message"),
    [
        (broken_passes.LeavesItsOwnPoint, "train", "train, last call", "weights after the exception"),
        (
            broken_passes.LeavesItsOwnPointOfValidation,
            "validate",
            "validate, last call",
            "weights after the exception",
        ),
        (broken_passes.LeavesAWrapOfItsSecondPass, "train", "train, last call", r"wrapped methods: \['log'\]"),
        (broken_passes.LeavesThePointOfItsBackward, "train, last call", "backward", "weights after the exception"),
        (broken_passes.TakesAnUpdateBack, "backward", "batch end", "weights after the exception"),
    ],
)
def test_06_exception_bites_in_each_pass(plugin: type, unseen: str, where: str, message: str, tmp_path: Path) -> None:
    contracts.check_exception(row(plugin), unseen, tmp_path)
    with pytest.raises(BITES, match=message):
        contracts.check_exception(row(plugin), where, tmp_path)


def test_06_exception_bites_on_what_was_asked(tmp_path: Path) -> None:
    contracts.check_exception(row(broken.RemembersWhatWasAsked), "train", tmp_path)
    asked = row(broken.RemembersWhatWasAsked, ask=lambda plugin: plugin.ask())
    with pytest.raises(BITES, match="saw a failure"):
        contracts.check_exception(asked, "train", tmp_path)


def test_06_exception_in_a_test_bites(tmp_path: Path) -> None:
    contracts.check_failing_test(HONEST, tmp_path)
    with pytest.raises(BITES, match="weights after a failing test in the same Trainer"):
        contracts.check_failing_test(row(broken.ExchangesWeightsOnException), tmp_path)
    with pytest.raises(BITES, match="saw a failing test"):
        contracts.check_failing_test(row(broken.RemembersAFailure), tmp_path)


@pytest.mark.parametrize("plugin", [broken.DiscardsASecondFit, broken.BreaksOnReuse, broken.RemembersAValidation])
def test_07_reuse_bites(plugin: type, tmp_path: Path) -> None:
    with pytest.raises(BITES, match=r"discarded|set up twice|far from|validated a checkpoint"):
        contracts.check_reuse(row(plugin), tmp_path)


def test_07_reuse_passes_an_honest_plugin(tmp_path: Path) -> None:
    contracts.check_reuse(HONEST, tmp_path)


def test_08_any_module_bites(tmp_path: Path) -> None:
    contracts.check_any_module(HONEST, "dict", tmp_path)
    with pytest.raises(BITES, match="had no effect"):
        contracts.check_any_module(row(broken.DoesNothing), "dict", tmp_path)
    with pytest.raises(BITES, match="more than a loss"):
        contracts.check_any_module(row(broken.NeedsATensorLoss), "dict", tmp_path)
    unclear = row(broken.RefusesUnclearly, refused_modules={"manual": "does not work"})
    with pytest.raises(BITES, match="does not name RefusesUnclearly"):
        contracts.check_any_module(unclear, "manual", tmp_path)
    with pytest.raises(ValueError, match="this does not work"):
        contracts.check_any_module(row(broken.RefusesUnclearly), "manual", tmp_path)


def test_08_any_module_bites_on_an_observer(tmp_path: Path) -> None:
    for kind in ("dict", "boring", "manual", "two optimizers"):
        contracts.check_any_module(row(broken.LogsItsMemory, observer=True), kind, tmp_path)
    with pytest.raises(BITES, match="which only reports, against nothing"):
        contracts.check_any_module(row(broken.Honest, observer=True), "dict", tmp_path)
    with pytest.raises(BITES, match="reported nothing"):
        contracts.check_any_module(row(broken.DoesNothing, observer=True), "dict", tmp_path)


def test_09_safe_load_bites(tmp_path: Path) -> None:
    contracts.check_safe_load(HONEST, tmp_path)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        contracts.check_safe_load(row(broken.SavesAnObject), tmp_path)


def test_10_company_bites(tmp_path: Path) -> None:
    contracts.check_resume(row(broken.BreaksInCompany), tmp_path)
    with pytest.raises(BITES, match="resumed run against uninterrupted run"):
        contracts.check_company(row(broken.BreaksInCompany), row(broken.LogsItsMemory), tmp_path)
    with pytest.raises(BITES, match="saving a checkpoint changed training"):
        contracts.check_company(row(broken.MovesWhatIsSaved), HONEST, tmp_path)
    for plugin in (broken.LeavesAWrap, broken_passes.LeavesAWrapOfItsSecondPass):
        with pytest.raises(BITES, match="wrapped methods"):
            contracts.check_company(row(plugin), HONEST, tmp_path)
    names_one = row(broken.NamesOnlyItself, conflicts={"honest": "does not go"})
    with pytest.raises(BITES, match="does not name Honest"):
        contracts.check_company(names_one, HONEST, tmp_path)


EXAMPLE = """```python
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
Trainer(max_steps=1, enable_model_summary=False, **quiet).fit(BoringModel())
```
```yaml
trainer: {gradient_clip_val: 0.5}
```
```bash
lightning-stable fit --config mine.yaml \\
    --trainer.max_epochs 3  # and a comment
```
"""


def test_11_card_bites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = tmp_path / "honest.md"
    under = dataclasses.replace(HONEST, card=card, class_path="contract.broken.Honest")

    def refuse(damaged: str, message: str) -> None:
        card.write_text(damaged)
        with pytest.raises(BITES, match=message):
            contracts.check_card(under, tmp_path, monkeypatch)

    whole = "# Honest\n" + "".join(f"## {heading}\n" for heading in HEADINGS) + "`factor`\n```python\nx = 1\n```\n"
    card.write_text(whole)
    contracts.check_card(under, tmp_path, monkeypatch)
    for damaged, message in (
        (whole.replace("## Cost\n", ""), "has the headings"),
        (whole.replace("`factor`", ""), "does not name the settings"),
        (whole.replace("```python", "```text"), "no Python example"),
        (whole.replace("x = 1", "assert False, 'code of the card'"), "code of the card"),
    ):
        refuse(damaged, message)
    whole = whole.replace("```python\nx = 1\n```\n", EXAMPLE)
    card.write_text(whole)
    contracts.check_card(under, tmp_path, monkeypatch)
    for damaged, message in (
        (
            whole.replace("{gradient_clip_val: 0.5}", "3"),
            "(?s)the config.*ends with exit code 2.*trainer is 3. Give it settings",
        ),
        (whole.replace("clip_val", "clip_vale"), "(?s)the config.*ends with exit code 2.*gradient_clip_vale"),
        (whole.replace("max_epochs", "max_epochz"), "(?s)the command.*ends with exit code 2.*max_epochz"),
        (whole.replace("fit --config mine.yaml", "validate -c mine.yaml --speed 1 > file"), "(?s)the command.*--speed"),
        (whole.replace(".fit(BoringModel())", ""), "it fits none"),
    ):
        refuse(damaged, message)
    failing = dataclasses.replace(HONEST.settings, expected_failures={"resume": "it draws lots"})
    card.write_text(whole)
    with pytest.raises(BITES, match="it draws lots"):
        contracts.check_card(dataclasses.replace(under, settings=failing), tmp_path, monkeypatch)


def test_a_method_without_settings_breaks_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = Method("extra", "callback", "lightning_stable.callbacks.extra.Extra", "0000.00000", "nothing")
    monkeypatch.setattr(registry, "METHODS", (*registry.METHODS, extra))
    with pytest.raises(ValueError, match="extra"):
        settings.build_rows()


def test_a_relative_belongs_to_the_row_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (registry.METHODS[0]._replace(relatives=("Cousin",)), *registry.METHODS[1:])
    monkeypatch.setattr(registry, "METHODS", rows)
    module = rows[0].class_path.rpartition(".")[0]
    monkeypatch.setattr(settings, "public_classes", lambda: {f"{module}.Cousin"})
    assert len(settings.build_rows()) == len(rows)
    monkeypatch.setattr(settings, "public_classes", lambda: {f"{module}_elsewhere.Cousin"})
    with pytest.raises(ValueError, match="elsewhere"):
        settings.build_rows()


def test_a_public_class_without_a_row_breaks_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "public_classes", lambda: {"lightning_stable.callbacks.stray.Stray"})
    with pytest.raises(ValueError, match="Stray"):
        settings.build_rows()


OTHER_KINDS = [
    row(broken.HonestStrategy, identities=()),
    row(broken.HonestPrecision, identities=(lambda: broken.HonestPrecision(1.0),)),
]


@pytest.mark.parametrize("kind", OTHER_KINDS, ids=lambda kind: kind.name)
def test_the_contracts_take_strategies_and_precisions(kind: Row, tmp_path: Path) -> None:
    contracts.check_resume(kind, tmp_path)
    contracts.check_any_module(kind, "dict", tmp_path)
    contracts.check_safe_load(kind, tmp_path)
    contracts.check_company(kind, HONEST, tmp_path)
    if kind.settings.identities:
        contracts.check_inert(kind, tmp_path)


def test_the_contracts_take_a_strategy_in_two_processes(workers: Pair) -> None:
    strategy, _ = OTHER_KINDS
    contracts.check_two_processes(strategy, workers)


@pytest.mark.parametrize(
    ("plugin", "entry"),
    [
        (broken.HonestStrategy, {"strategy": {"class_path": "contract.broken.HonestStrategy"}}),
        (
            broken.HonestPrecision,
            {"plugins": [{"class_path": "contract.broken.HonestPrecision", "init_args": {"factor": 0.25}}]},
        ),
    ],
)
def test_the_contracts_find_other_kinds_in_a_config(plugin: type, entry: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({"trainer": entry}))
    contracts.check_yaml(dataclasses.replace(row(plugin), addons=(path,)), tmp_path)
    path.write_text(yaml.safe_dump({"trainer": {"max_steps": 1}}))
    with pytest.raises(BITES, match="did not add one"):
        contracts.check_yaml(dataclasses.replace(row(plugin), addons=(path,)), tmp_path)


def test_public_classes_are_found_though_nothing_exports_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "package_of_strays" / "callbacks"
    (room / "deep").mkdir(parents=True)
    (room / "deep" / "__init__.py").touch()
    (room / "deep" / "inner.py").write_text(
        "from abc import ABC, abstractmethod\n"
        "from lightning.pytorch import Callback\n"
        "from lightning.pytorch.callbacks import Timer\n"
        "__all__ = []\n"
        "class Stray(Callback):\n    pass\n"
        "class _Hidden(Callback):\n    pass\n"
        "class Base(Callback, ABC):\n    @abstractmethod\n    def act(self):\n        pass\n"
    )
    (room / "__init__.py").write_text("class Exported:\n    pass\n__all__ = ['Exported']\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert settings.public_classes(tmp_path / "package_of_strays") == {
        "package_of_strays.callbacks.Exported",
        "package_of_strays.callbacks.deep.inner.Stray",
    }


def test_public_classes_are_found() -> None:
    assert settings.public_classes() == settings.listed_classes()
