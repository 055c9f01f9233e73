"""An offloaded part beside a part that FSDP2 shards over two processes: the snippet of docs/huggingface.md, with two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.forks import forks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "huggingface.md"


def snippet() -> str:
    """The block of the page that shards, without what belongs to its only process."""
    block = next(part.partition("```")[0] for part in PAGE.read_text().split("```python\n")[1:] if "fully_shard(" in part)
    assert "dist.destroy_process_group()" in block
    return block.replace("dist.destroy_process_group()", "")


def build() -> Any:
    """A tiny Llama, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, use_cache=False, tie_word_embeddings=False)).train()


def tokens(rank: int) -> torch.Tensor:
    """What a process sees: other tokens than its neighbour."""
    return torch.arange(16)[None] * (rank + 2) % 64


def train(rank: int, folder: Path) -> None:
    """One of two processes: run the page's code, and store the loss, what the head became and whether the rest stayed."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    import torchwrap as tw

    names: dict[str, Any] = {"build": build, "ids": tokens(rank), "torch": torch, "tw": tw, "dist": dist}
    exec(compile(snippet(), str(PAGE), "exec"), names)
    model = names["model"]
    head = model.lm_head.weight
    torch.save(
        {
            "share": head.to_local().shape[0],
            "head": head.full_tensor(),
            "streams": tw.handle_of(model.model, "offload").plan.streamed_bytes,
            "loss": model(input_ids=names["ids"], labels=names["ids"]).loss.detach(),
        },
        folder / f"{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


def in_memory() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The head after the same step of one process that sees both inputs, and then the loss of each."""
    model = build()
    model.model.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.lm_head.parameters(), lr=1e-3)
    losses = [model(input_ids=tokens(rank), labels=tokens(rank)).loss for rank in range(2)]
    (sum(losses) / 2).backward()
    optimizer.step()
    head: nn.Parameter = model.lm_head.weight
    with torch.no_grad():
        return head.detach(), [model(input_ids=tokens(rank), labels=tokens(rank)).loss for rank in range(2)]


@pytest.mark.slow
def test_the_page_trains_a_sharded_head_over_an_offloaded_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.optimizer.test_shards", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected, losses = in_memory()
    assert [each["share"] for each in found] == [32, 32]  # of 64 rows
    assert all(each["streams"] > 0 for each in found)
    assert torch.equal(found[0]["head"], found[1]["head"])
    # Gradients are averaged in another order than one backward adds them up; AdamW's first step is the learning rate times a sign.
    torch.testing.assert_close(found[0]["head"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack([each["loss"] for each in found]), torch.stack(losses), rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[0]["head"], build().lm_head.weight)


if __name__ == "__main__":
    torch.set_num_threads(1)
    forks(2, lambda rank: train(rank, Path(sys.argv[1])))
