"""Offload with a real device: same numbers as a resident model, and no more device memory than allowed.

The stream logic itself is tested without a card against a fake arena (tests/stream); here the real copies, events and allocator run.
"""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import torchwrap as tw

pytest.importorskip("transformers")

MIB = 1 << 20
HOMES = ("host", "disk")


def llama(dtype: torch.dtype, *, tied: bool = False, blocks: int = 12) -> Any:
    """Llama with 12 blocks of 3.3M weights: enough to stream, quick to build."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def prompt(length: int = 24, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 2048, (batch, length), generator=torch.Generator().manual_seed(1)).cuda()


def offloaded(model: Any, home: str, folder: Path, share: float = 0.4, **options: Any) -> Any:
    """Wrap with `share` of the weights allowed on the device; the disk home also bounds host memory."""
    if home == "disk":
        options |= {"path": str(folder), "host_memory": int(weight_bytes(model) * 0.5)}
    return tw.offload(model, device="cuda", device_memory=int(weight_bytes(model) * share), params=home, **options)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@torch.inference_mode()
def test_logits_equal_a_resident_model(dtype: torch.dtype, tied: bool, home: str, tmp_path: Path) -> None:
    model = llama(dtype, tied=tied)
    resident = copy.deepcopy(model).cuda()
    streamed = offloaded(model, home, tmp_path)
    ids = prompt()
    expected = resident(ids).logits
    for _ in range(3):
        assert torch.equal(streamed(ids).logits, expected)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "sampled", "beam"],
)
@torch.inference_mode()
def test_generated_tokens_equal_a_resident_model(options: dict[str, Any], home: str, tmp_path: Path) -> None:
    model = llama(torch.bfloat16)
    resident = copy.deepcopy(model).cuda()
    streamed = offloaded(model, home, tmp_path)
    chosen = []
    for candidate in (resident, streamed):
        torch.manual_seed(3)
        chosen.append(candidate.generate(prompt(), max_new_tokens=12, min_new_tokens=12, **options))
    assert torch.equal(*chosen)


@pytest.mark.parametrize("home", HOMES)
@torch.inference_mode()
def test_device_peak_stays_under_the_budget(home: str, tmp_path: Path) -> None:
    model = llama(torch.float32)
    total = weight_bytes(model)
    ids = prompt(length=8, batch=1)
    before = torch.cuda.memory_allocated()
    streamed = offloaded(model, home, tmp_path, share=0.4)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        streamed(ids)
    peak = torch.cuda.max_memory_allocated() - before
    # Activations of eight tokens are far below 8 MiB; cuBLAS takes up to 32 MiB of workspace on recent cards.
    assert peak <= 0.4 * total + 40 * MIB
    assert peak < total
    assert tw.handle_of(streamed, "offload").predict(batch=1, tokens=8).device_bytes <= 0.4 * total


@torch.inference_mode()
def test_many_passes_over_two_slots_never_read_a_slot_too_early() -> None:
    model = llama(torch.float32, blocks=16)
    resident = copy.deepcopy(model).cuda()
    streamed = tw.offload(model, device="cuda", device_memory=int(weight_bytes(model) * 0.35), params="host", k=2)
    for seed in range(60):
        ids = torch.randint(3, 2048, (1, 1 + seed % 5), generator=torch.Generator().manual_seed(seed)).cuda()
        assert torch.equal(streamed(ids).logits, resident(ids).logits), seed


@torch.inference_mode()
def test_side_stream_of_the_caller_is_honoured() -> None:
    model = llama(torch.float32)
    resident = copy.deepcopy(model).cuda()
    streamed = offloaded(model, "host", Path())
    ids = prompt()
    expected = resident(ids).logits
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        first = streamed(ids).logits
    second = streamed(ids).logits
    stream.synchronize()
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@torch.inference_mode()
def test_two_threads_share_one_model() -> None:
    model = llama(torch.float32)
    resident = copy.deepcopy(model).cuda()
    streamed = offloaded(model, "host", Path())
    inputs = [prompt(length) for length in (5, 9)]
    expected = [resident(ids).logits for ids in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.inference_mode():
            for _ in range(10):
                if not torch.equal(streamed(inputs[index]).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.inference_mode()
def test_autocast_equals_a_resident_model(dtype: torch.dtype) -> None:
    model = llama(torch.float32)
    resident = copy.deepcopy(model).cuda()
    streamed = offloaded(model, "host", Path())
    with torch.autocast("cuda", dtype=dtype):
        expected = resident(prompt()).logits
        assert torch.equal(streamed(prompt()).logits, expected)
        assert torch.equal(streamed(prompt()).logits, expected)


@pytest.mark.parametrize("home", HOMES)
@torch.inference_mode()
def test_folder_is_opened_without_materialising_it(home: str, tmp_path: Path) -> None:
    model = llama(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    total = weight_bytes(model)
    resident = model.cuda()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    host_memory = 2 * total if home == "host" else total // 2
    streamed = tw.offload.from_pretrained(
        tmp_path / "model", device="cuda", device_memory=int(total * 0.4), host_memory=host_memory, params=home
    )
    assert torch.equal(streamed(prompt()).logits, resident(prompt()).logits)
    assert torch.cuda.max_memory_allocated() - before < total + 40 * MIB


@pytest.mark.parametrize("home", HOMES)
@torch.inference_mode()
def test_unwrap_gives_weights_and_device_memory_back(home: str, tmp_path: Path) -> None:
    model = llama(torch.float32)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.cuda.memory_allocated()
    streamed = offloaded(model, home, tmp_path)
    streamed(prompt())
    tw.unwrap(streamed)
    assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in streamed.state_dict().items())
    streamed.cpu()
    gc.collect()
    torch.cuda.synchronize()
    # cuBLAS keeps its workspace, up to 32 MiB, for the life of the process.
    assert torch.cuda.memory_allocated() - before <= 34 * MIB


@torch.inference_mode()
def test_budget_below_the_minimum_names_its_bytes_and_takes_none() -> None:
    model = llama(torch.float32)
    before = torch.cuda.memory_allocated()
    with pytest.raises(tw.core.errors.BudgetError) as caught:
        tw.offload(model, device="cuda", device_memory=MIB, params="host")
    assert caught.value.needed > MIB
    assert torch.cuda.memory_allocated() == before
    assert model(prompt().cpu()).logits.isfinite().all()


@torch.inference_mode()
def test_streams_and_memory_do_not_grow_over_passes() -> None:
    streamed = offloaded(llama(torch.float32), "host", Path())
    ids = prompt()
    for _ in range(10):
        streamed(ids)
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for _ in range(100):
        streamed(ids)
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() <= reserved
