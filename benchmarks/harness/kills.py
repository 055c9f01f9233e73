"""Training killed at random moments: what its folder holds afterwards, bit for bit, and what else lies about.

The model is the first three blocks of SmolLM2-135M with its table and head, which are frozen; blocks and their optimizer state are on the
disk. A run is ended by SIGKILL at a moment drawn evenly from the time that an undisturbed run takes, from the wrapping of the model on. A
second process opens the folder and says which step it finds, takes a digest of all weights and state, and trains to the end. Digests and
losses are compared with those of the same training in memory, step by step. Every other run commits after each step, the others after
every third.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.contenders import declare_torchvision_operators
from benchmarks.harness.rounds import ROOT

__all__ = ["TITLE", "main", "measure_kills"]

TITLE = "training-faults[smollm2-3-blocks]"
BLOCKS = 3
COMMIT_EVERY = {"step": 1, "save": 3}
_KNOWN = {"LOCK", "manifest.json"}


@dataclass(frozen=True, slots=True)
class _Run:
    """One run in a folder of its own, by processes that keep their temporary files there too."""

    folder: Path
    durability: str
    steps: int

    def start(self, *more: str) -> subprocess.Popen[str]:
        """The training process; its first line says that it begins."""
        temporary = self.folder / "temporary"
        temporary.mkdir(exist_ok=True)
        variables = {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "benchmarks.harness.kills", str(self.folder), self.durability, str(self.steps), *more]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **variables})
        assert child.stdout is not None
        if child.stdout.readline() != "begin\n":
            raise RuntimeError(f"the training process did not begin: exit status {child.wait()}")
        return child

    def finish(self) -> dict[str, Any]:
        """Open the folder in a new process and train to the end; what it found, and what is left behind it.

        Raises:
            RuntimeError: it failed.
        """
        child = self.start("--report")
        said = child.communicate()[0].splitlines()
        if child.returncode:
            raise RuntimeError(f"the folder could not be opened and trained to the end: exit status {child.returncode}")
        unknown = [path.name for path in (self.folder / "run").iterdir() if path.name not in _KNOWN]
        strangers = sorted(unknown)[1:] + os.listdir(self.folder / "temporary")  # one file holds weights and state
        return {**json.loads(said[-1]), "losses": _losses(said), "orphans": strangers}


def measure_kills(kills: int = 20, steps: int = 30, seed: int | None = None) -> dict[str, Any]:
    """Kill that many runs; what each left, and how many left anything else than their last commit.

    Args:
        kills: runs, each killed once.
        steps: of each run.
        seed: of the moments; None draws one.
    """
    seed = time.time_ns() % (1 << 32) if seed is None else seed
    chance, expected = random.Random(seed), _in_memory(steps)
    with tempfile.TemporaryDirectory(prefix="torchwrap-kills-") as name:
        whole = _Run(Path(name, "whole"), "step", steps)
        whole.folder.mkdir()
        began = time.monotonic()
        child = whole.start()
        begin_s = time.monotonic() - began
        child.communicate()
        lasts_s = time.monotonic() - began - begin_s
        if whole.finish()["opened"] != expected.digests[steps]:
            raise RuntimeError("a run that nobody killed differs from training in memory")
        trials: list[dict[str, Any]] = []
        while len(trials) < kills:
            run = _Run(Path(name, f"{len(trials)}-{time.monotonic_ns()}"), ("step", "save")[len(trials) % 2], steps)
            run.folder.mkdir()
            moment = chance.uniform(0, 1)
            trial = _trial(run, moment * lasts_s, expected)
            shutil.rmtree(run.folder)
            if trial is not None:
                trials.append({"moment": round(moment, 4), **trial})
                print(f"{TITLE} {len(trials):3} of {kills}: {trials[-1]}", flush=True)
    return {
        "title": TITLE,
        "kills": kills,
        "steps": steps,
        "seed": seed,
        "committed_steps": sorted(trial["committed"] for trial in trials),
        "killed_in_commit": sum(trial["in_commit"] for trial in trials),
        "different": sum(not trial["equal"] for trial in trials),
        "different_at_the_end": sum(not trial["equal_at_the_end"] for trial in trials),
        "different_losses": sum(not trial["equal_losses"] for trial in trials),
        "lost_commits": sum(trial["lost"] for trial in trials),
        "orphans": sum(len(trial["orphans"]) for trial in trials),
        "trials": trials,
    }


@dataclass(frozen=True, slots=True)
class _Expected:
    """Of the training in memory: digests before it and after each step, and the loss of each."""

    digests: Sequence[str]
    losses: Mapping[int, str]


def _trial(run: _Run, moment_s: float, expected: _Expected) -> dict[str, Any] | None:
    """Kill one run; None if it was over by then."""
    child = run.start()
    try:
        child.wait(moment_s)
        child.communicate()
        return None
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
    said = child.communicate()[0].splitlines()
    before = _losses(said)
    finished = max((int(line.split()[1]) for line in said if line.startswith("step ")), default=0)
    if finished == run.steps:
        return None
    found = run.finish()
    committed, every, after = found["steps"], COMMIT_EVERY[run.durability], found["losses"]
    return {
        "durability": run.durability,
        "finished": finished,
        "in_commit": said[-1:] == ["commit"],
        "committed": committed,
        "equal": found["opened"] == expected.digests[committed],
        "equal_at_the_end": found["ended"] == expected.digests[run.steps],
        "equal_losses": {**before, **after} == expected.losses == {**after, **before},
        # The commit of a step follows its update: it may be there before anybody was told.
        "lost": not finished // every * every <= committed <= (finished + 1) // every * every,
        "orphans": found["orphans"],
    }


def _losses(said: Sequence[str]) -> dict[int, str]:
    """Of the steps that a training process told of, by the number of the step."""
    told = [line.split() for line in said if line.startswith("loss ")]
    return {int(number): loss for _, number, loss in told}


def _model() -> Any:
    import transformers

    from torchwrap.demo.weights import smollm2

    transformers.logging.set_verbosity_error()  # weights of the other blocks are not used
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(smollm2(), num_hidden_layers=BLOCKS, dtype=torch.float32)
    model.get_input_embeddings().requires_grad_(False)
    return model.train()


def _step(model: Any, optimizer: Any, number: int, told: Callable[[str], object]) -> None:
    ids = torch.randint(0, model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    told(loss.item().hex())  # before the step, which may be committed and then killed
    optimizer.step()


def _in_memory(steps: int) -> _Expected:
    """One thread, as the training processes have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    digests, losses = [_digest(dict(model.named_parameters()), optimizer)], dict[int, str]()
    for number in range(steps):
        _step(model, optimizer, number, functools.partial(losses.__setitem__, number + 1))
        digests.append(_digest(dict(model.named_parameters()), optimizer))
    torch.set_num_threads(threads)
    return _Expected(digests, losses)


def _digest(parameters: Mapping[str, torch.Tensor], optimizer: Any) -> str:
    """Of every bit of all weights and of all state."""
    digest = hashlib.sha256()
    state = optimizer.state_dict()["state"]
    values = [parameters[name] for name in sorted(parameters)]
    values += [state[index][key] for index in sorted(state) for key in sorted(state[index])]
    for value in values:
        digest.update(value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """A training process: says when it begins and after each step; with --report, what it found and where it ended."""
    parser = argparse.ArgumentParser(description="Train in a folder, from wherever it is.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("durability", choices=COMMIT_EVERY)
    parser.add_argument("steps", type=int)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args(arguments)
    declare_torchvision_operators()
    import torchwrap as tw

    model = _model()
    print("begin", flush=True)
    tw.offload(model, params="disk", pin=("model.embed_tokens", "lm_head"))
    optimizer = tw.OffloadedOptimizer(
        model, torch.optim.AdamW, lr=1e-3, fused=True, path=given.folder / "run", durability=given.durability, chunk="1MiB"
    )
    commit = optimizer.commit

    def committed() -> None:
        print("commit", flush=True)
        commit()

    def digest() -> str:
        with tw.core.tensors(model) as real:
            return _digest({name: real[name] for name, _ in model.named_parameters()}, optimizer)

    optimizer.commit = committed  # type: ignore[method-assign]
    if not tw.handle_of(model, "offload").plan.streamed_bytes:
        raise RuntimeError("nothing is streamed, so nothing would be shown")
    opened = {"steps": optimizer.steps, "opened": digest()} if given.report else {}
    for number in range(optimizer.steps, given.steps):
        _step(model, optimizer, number, lambda loss: print("loss", optimizer.steps + 1, loss, flush=True))
        if given.durability == "save" and optimizer.steps % COMMIT_EVERY["save"] == 0:
            optimizer.commit()
        print("step", optimizer.steps, flush=True)
    if given.report:
        ended = digest()
        optimizer.close()
        tw.unwrap(model)
        print(json.dumps({**opened, "ended": ended}), flush=True)


if __name__ == "__main__":
    main()
