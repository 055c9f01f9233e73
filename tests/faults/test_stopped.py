"""A process that is stopped for longer than `io_timeout_s` (Ctrl-Z, a frozen container) goes on as if nothing had been."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.contract.processes import fresh_process
from tests.sharing import made_once

PROGRAM = """
    import os, signal, subprocess, time
    import torchwrap as tw
    from torch import nn
    from torchwrap.storage.generations import GenerationStore
    from torchwrap.storage import backend

    slept = []

    def stop():  # a thread that works stops the process while another one waits for it
        if not slept:
            slept.append(time.monotonic())
            subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {{os.getpid()}}"])
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.2)
            slept.append(time.monotonic())

    def stopping(owner, name):
        before = getattr(owner, name)
        def call(*args, **options):
            if armed and args[0] is not None:
                stop()
            return before(*args, **options)
        setattr(owner, name, call)

    armed = []
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(96, 96) for _ in range(6)))
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(6)))
    model.load_state_dict(plain.state_dict())
    tw.offload(model, params="disk", units=("Linear",), io_timeout_s=1.0)
    optimizer = tw.OffloadedOptimizer(model, torch.optim.AdamW, lr=1e-2, overlap={overlap})
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    stopping({owner}, {name!r})
    for step in range(3):
        for net, opt in ((plain, reference), (model, optimizer)):
            if net is model and step == 1:
                armed.append(True)
            net(torch.ones(256, 96)).square().mean().backward()
            opt.step()
            opt.zero_grad()
    assert slept[1] - slept[0] > 2.5, slept
    expected = plain.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
"""


CASES = {
    "a write beside the backward": {"owner": "GenerationStore", "name": "write", "overlap": True},
    "a write in the step": {"owner": "GenerationStore", "name": "write", "overlap": False},
    "a read": {"owner": "backend.Backend", "name": "pread", "overlap": True},
}
# Each in a fork of one process that has imported everything, all at the same time, since most of it is waiting.
IN_FORKS = """
    import os, traceback
    from pathlib import Path
    import torchwrap as tw
    tw.offload, tw.OffloadedOptimizer
    made = []
    for file, program in {programs!r}.items():
        if not (child := os.fork()):
            try:
                exec(program, {{"torch": torch}})
                said = "right"
            except BaseException:
                said = traceback.format_exc()
            Path(file).write_text(said)
            os._exit(0)
        made.append(child)
    for child in made:
        os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what came of each case."""

    def make(folder: Path) -> None:
        programs = {str(folder / case): textwrap.dedent(PROGRAM.format(**fields)) for case, fields in CASES.items()}
        fresh_process(IN_FORKS.format(programs=programs))

    return made_once(tmp_path_factory, "stopped", make)


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_process_is_no_hanging_disk(case: str, said: Path) -> None:
    assert (said / case).read_text() == "right"
