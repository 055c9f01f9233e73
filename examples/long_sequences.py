"""One training step of a language model whose sequences are divided over two processes, compared with one process."""

from __future__ import annotations

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

import torchwrap as tw
from torchwrap.attention.distributed.sequence import DividedSequence
from torchwrap.integrations.transformers.sequence import shard_inputs

PROCESSES = 2


def model_and_batch() -> tuple[LlamaForCausalLM, dict[str, torch.Tensor]]:
    """The same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    ids = torch.randint(0, 128, (2, 256))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def train(rank: int, folder: str) -> None:
    """One of the processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    model, batch = model_and_batch()
    tw.fast_attention(model, sp_group=dist.group.WORLD, ring="zigzag")
    sequence = DividedSequence(dist.group.WORLD, "zigzag")

    out = model(**shard_inputs(batch, sequence))  # logits of this process' tokens, and its share of the loss
    out.loss.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)  # shares add up

    logits = sequence.whole(out.logits)
    if rank == 0:
        print(tw.handle_of(model, "fast_attention").explain())
        torch.save((logits, model.lm_head.weight.grad), f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Both ways, and whether they agree."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(train, (folder,), nprocs=PROCESSES, start_method="fork")  # nothing has computed yet, everything is imported
        found = torch.load(f"{folder}/found.pt")
    model, batch = model_and_batch()
    out = model(**batch)
    out.loss.backward()
    expected = (out.logits, model.lm_head.weight.grad)
    equal = all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))
    print(f"outputs equal: {equal}")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
