"""transformers' `Trainer` and accelerate train an offloaded model with the bits of the same program in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.integrations.training import LR, Data, arguments, history, killed, llama, offloaded, optimizer_of, trainer_of
from torchwrap.integrations.transformers.callbacks import OffloadCallback, PlanCallback, optimizer_settings

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ROOT = Path(__file__).parents[2]
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "clipping": {"max_grad_norm": 0.5},
    "overlapping": {"max_grad_norm": 0.0},
    "accumulating": {"gradient_accumulation_steps": 3},
    "accumulating-overlapping": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.0},
    "evaluating": {"eval_strategy": "steps", "eval_steps": 2, "max_grad_norm": 0.0},
    "best-at-the-end": {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "learning_rate": 0.05,
    },
    "checkpointing": {"activation_checkpointing": True},
    "bfloat16": {"bf16": True, "gradient_accumulation_steps": 2},
}

WAITING = ("clipping", "accumulating", "accumulating-overlapping", "checkpointing")  # gradients wait in these


def unequal(plain: nn.Module, model: nn.Module) -> list[str]:
    """Names of parameters with different bits; the model is unwrapped."""
    tw.unwrap(model)
    mine = dict(model.named_parameters())
    return [name for name, parameter in plain.named_parameters() if not torch.equal(parameter, mine[name])]


def same_state(reference: Any, optimizer: Any) -> bool:
    """Whether two optimizers have equal state and settings."""
    expected, got = reference.state_dict(), optimizer.state_dict()
    entries = [(n, key) for n, kept in expected["state"].items() for key in kept]
    assert entries
    equal = all(torch.equal(expected["state"][n][key], got["state"][n][key]) for n, key in entries)
    return equal and [g["lr"] for g in expected["param_groups"]] == [g["lr"] for g in got["param_groups"]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run in memory with checkpoints: (folder, model, trainer)."""
    folder = tmp_path_factory.mktemp("plain")
    model = llama()
    trainer = trainer_of(model, arguments(folder, **SAVING))
    trainer.train()
    return folder, model, trainer


@pytest.mark.parametrize(("name", "gradients"), [*((name, "host") for name in ARGUMENTS), *((name, "disk") for name in WAITING)])
def test_trainer_computes_the_same_bits(name: str, gradients: Any, tmp_path: Path) -> None:
    fields = ARGUMENTS[name]
    plain = llama()
    expected = trainer_of(plain, arguments(tmp_path / "plain", **fields))
    expected.train()
    model, args = offloaded(llama()), arguments(tmp_path / "offloaded", **fields)
    optimizer = optimizer_of(model, args, gradients=gradients)
    trainer = trainer_of(model, args, OffloadCallback(), PlanCallback(), optimizer=optimizer)
    trainer.train()
    lines = history(trainer)
    assert lines == history(expected)
    assert len(lines) >= 6 and any(line.get("grad_norm", 0) > 0.5 for line in lines)
    assert same_state(expected.optimizer, optimizer)
    assert unequal(plain, model) == []


def test_every_log_line_tells_what_was_moved(tmp_path: Path) -> None:
    model, args = offloaded(llama()), arguments(tmp_path, max_steps=3, max_grad_norm=0.0)
    optimizer = optimizer_of(model, args)
    trainer = trainer_of(model, args, OffloadCallback(), optimizer=optimizer)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 3
    assert all(line["offload_read_bytes"] > 0 and line["offload_written_bytes"] > 0 for line in lines)
    assert all(0 <= line["offload_stall_share"] <= 1 for line in lines)
    assert sum(line["offload_written_bytes"] for line in lines) == optimizer.stats()["bytes_written"]  # type: ignore[attr-defined]


def test_without_the_callback_the_model_still_trains(tmp_path: Path) -> None:
    plain = llama()
    trainer_of(plain, arguments(tmp_path)).train()
    model, args = offloaded(llama()), arguments(tmp_path)
    trainer_of(model, args, optimizer=optimizer_of(model, args, overlap=False)).train()
    assert unequal(plain, model) == []


def test_without_the_callback_overlap_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model, args = offloaded(llama()), arguments(tmp_path)
    with pytest.raises(tw.ConflictError, match=r"overlap=False.*OffloadCallback\(\)"):
        trainer_of(model, args, optimizer=optimizer_of(model, args)).train()


@pytest.mark.parametrize("kept", [True, False], ids=["folder", "temporary"])
def test_training_goes_on_from_a_checkpoint(kept: bool, saved: Any, tmp_path: Path) -> None:
    _, plain, expected = saved
    args = arguments(tmp_path / "out", **SAVING)
    path = tmp_path / "run" if kept else None
    for resumed in (None, str(tmp_path / "out" / "checkpoint-4")):
        model = offloaded(llama())
        optimizer = optimizer_of(model, args, path=path)
        trainer = trainer_of(model, args, OffloadCallback(), PlanCallback(), optimizer=optimizer)
        trainer.train(resume_from_checkpoint=resumed)
        assert history(trainer) == history(expected)
        assert optimizer.steps == trainer.state.global_step == 8  # type: ignore[attr-defined]
        assert same_state(expected.optimizer, optimizer)
        assert unequal(plain, model) == []
        optimizer.close()  # type: ignore[attr-defined]


def test_checkpoints_are_those_of_training_in_memory(saved: Any, tmp_path: Path) -> None:
    folder, plain, expected = saved
    model = offloaded(llama())
    args = arguments(folder, **SAVING)
    optimizer = optimizer_of(model, args)
    trainer = trainer_of(model, args, OffloadCallback(), PlanCallback(), optimizer=optimizer)
    trainer.args.output_dir = str(tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))  # written in memory, gone on with offloaded
    assert history(trainer) == history(expected)
    assert unequal(plain, model) == []
    mine, theirs = tmp_path / "checkpoint-6", folder / "checkpoint-6"
    assert {file.name for file in mine.iterdir()} == {file.name for file in theirs.iterdir()} | {"torchwrap.json"}
    assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert (mine / "optimizer.pt").stat().st_size == (theirs / "optimizer.pt").stat().st_size
    back = llama()
    again = trainer_of(back, arguments(folder, **SAVING))
    again.train(resume_from_checkpoint=str(mine))  # and back into memory
    assert history(again) == history(expected)
    assert unequal(plain, back) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "event"), [(True, "on_save"), (False, "on_pre_optimizer_step")], ids=["folder-before-its-commit", "temporary-within-a-step"]
)
def test_a_killed_run_goes_on(kept: bool, event: str, saved: Any, tmp_path: Path) -> None:
    _, plain, expected = saved
    step = 4 if event == "on_save" else 5
    command = [sys.executable, "-m", "tests.integrations.training", str(tmp_path), "kept" if kept else "", str(step), event]
    done = subprocess.run([*command, str(torch.get_num_threads())], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr[-3000:]
    assert (tmp_path / "out" / "checkpoint-4").is_dir() and not (tmp_path / "out" / "checkpoint-6").exists()
    model, optimizer, trainer = killed(tmp_path, kept, -1, "")
    assert optimizer.steps == (2 if kept else 0)  # the commit of checkpoint-4 had not happened
    trainer.train(resume_from_checkpoint=True)
    assert history(trainer) == history(expected)
    assert same_state(expected.optimizer, optimizer)
    assert unequal(plain, model) == []


@pytest.mark.parametrize("inside", [True, False], ids=["offload-inside", "offload-outside"])
def test_adapters_of_a_streamed_base_train_with_the_trainers_own_optimizer(inside: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: nn.Module) -> Any:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)

    plain = adapted(llama())
    expected = trainer_of(plain, arguments(tmp_path / "plain", **SAVING))
    expected.train()
    args = arguments(tmp_path / "offloaded", **SAVING)
    for resumed in (None, str(tmp_path / "offloaded" / "checkpoint-4")):
        model = adapted(offloaded(llama())) if inside else offloaded(adapted(llama()))
        trainer = trainer_of(model, args, OffloadCallback(), PlanCallback())
        trainer.train(resume_from_checkpoint=resumed)
        assert history(trainer) == history(expected)
        trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        mine = dict(model.named_parameters())
        assert trained and [name for name, p in trained.items() if not torch.equal(p, mine[name])] == []
    assert json.loads((tmp_path / "offloaded" / "checkpoint-4" / "torchwrap.json").read_text())["techniques"][0]["name"] == "offload"


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_streamed_model_inside_another_one_trains_whole(fused: bool) -> None:
    plain, model = llama(), offloaded(llama())
    outer = [nn.ModuleDict({"base": each}) for each in (plain, model)]
    reference = torch.optim.AdamW(outer[0].parameters(), lr=LR, fused=fused)
    optimizer = tw.OffloadedOptimizer(outer[1], torch.optim.AdamW, lr=LR, chunk=8192, fused=fused)
    for each, opt in ((plain, reference), (model, optimizer)):
        torch.manual_seed(3)
        for step in range(2):
            each(**{name: value[None] for name, value in Data()[step].items()}).loss.backward()
            opt.step()
            opt.zero_grad()
    assert same_state(reference, optimizer)
    assert unequal(plain, model) == []


def test_an_ordinary_optimizer_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = offloaded(llama())
    with pytest.raises(tw.ConflictError, match=r"OffloadCallback: AdamW would train .*OffloadedOptimizer\(model, cls"):
        trainer_of(model, arguments(tmp_path), OffloadCallback()).train()


def test_settings_of_the_optimizer_are_the_trainers(tmp_path: Path) -> None:
    model, args = llama(), arguments(tmp_path, weight_decay=0.1, adam_beta2=0.95)
    expected = trainer_of(model, args).create_optimizer()
    cls, settings = optimizer_settings(model, args)
    assert type(expected) is cls
    found = cls(**settings)
    for mine, theirs in zip(found.param_groups, expected.param_groups, strict=True):
        assert [id(p) for p in mine.pop("params")] == [id(p) for p in theirs.pop("params")]
        assert mine == theirs
    assert [group["weight_decay"] for group in found.param_groups] == [0.1, 0.0]


def test_optimizers_that_cannot_be_offloaded_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = llama(), arguments(tmp_path, optim="adafactor")
    cls, settings = optimizer_settings(model, args)
    with pytest.raises(tw.ConfigError, match="Adafactor"):
        tw.OffloadedOptimizer(model, cls, **settings)
    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", lambda args, model: (lambda: None, {}))
    with pytest.raises(tw.ConfigError, match=r"adafactor.* is no class that runs by itself"):
        optimizer_settings(model, args)


def test_clipping_in_two_places_is_refused(tmp_path: Path) -> None:
    model, args = offloaded(llama()), arguments(tmp_path, max_grad_norm=1.0)
    optimizer = optimizer_of(model, args, max_grad_norm=0.5)
    with pytest.raises(tw.ConfigError, match=r"clips to 1.0 and the optimizer to 0.5"):
        trainer_of(model, args, OffloadCallback(), optimizer=optimizer).train()


def test_replicas_are_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState

    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(tw.UnsupportedModelError, match=r"2 replicas of the model.*DistributedDataParallel\(model\) first"):
        OffloadCallback().on_init_end(args, TrainerState(), TrainerControl(), model=offloaded(llama()))


def test_a_new_run_in_the_folder_of_an_old_one_is_told(tmp_path: Path) -> None:
    args = arguments(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2)
    for number in range(2):
        model = offloaded(llama())
        optimizer = optimizer_of(model, args, path=tmp_path / "run")
        trainer = trainer_of(model, args, OffloadCallback(), optimizer=optimizer)
        if number:
            with pytest.warns(tw.TorchwrapWarning, match="begins at step 0 with weights and optimizer state of 2 steps"):
                trainer.train()
        else:
            trainer.train()
        optimizer.close()  # type: ignore[attr-defined]


def train_with_accelerate(model: nn.Module, optimizer: Any, *, accumulate: int, clip: bool, precision: str) -> list[float]:
    """Losses (and norms) of accelerate's own loop on one device."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    loader = torch.utils.data.DataLoader(Data(), batch_size=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    found = []
    torch.manual_seed(3)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if clip and accelerator.sync_gradients:
                found.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("accumulate", "fields"),
    [(1, {}), (2, {"accumulate": 2}), (1, {"overlap": False}), (2, {"overlap": False, "gradients": "disk"})],
    ids=["overlapping", "accumulating-overlapping", "clipping", "accumulating-clipping-on-disk"],
)
def test_accelerates_prepare_and_loop(accumulate: int, fields: dict[str, Any], precision: str) -> None:
    options: dict[str, Any] = {"accumulate": accumulate, "clip": "overlap" in fields, "precision": precision}
    plain, model = llama(), offloaded(llama())
    reference = torch.optim.AdamW(plain.parameters(), lr=LR)
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=LR, chunk=8192, **fields)
    assert train_with_accelerate(model, optimizer, **options) == train_with_accelerate(plain, reference, **options)
    assert same_state(reference, optimizer)
    assert unequal(plain, model) == []


def test_a_plain_loop_with_a_scheduler() -> None:
    plain, model = llama(), offloaded(llama())
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=LR, chunk=8192, fused=True)
    reference = torch.optim.AdamW(plain.parameters(), lr=LR, fused=True)
    losses = []
    for each, opt in ((plain, reference), (model, optimizer)):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=5)  # changes betas, too
        torch.manual_seed(3)
        for step in range(5):
            opt.zero_grad()
            loss = each(**{name: value[None] for name, value in Data()[step].items()}).loss
            loss.backward()
            opt.step()
            scheduler.step()
            losses.append(loss.item())
    assert losses[:5] == losses[5:]
    assert same_state(reference, optimizer)
    assert unequal(plain, model) == []
