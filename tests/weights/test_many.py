"""Several batches through one streamed model: equal to one call after another, read once, and whole again after every kind of failure."""

from __future__ import annotations

import _thread
import copy
import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import torchwrap as tw
from tests.models import ModelFixture, by_name, run
from tests.weights.budgets import streamed
from torchwrap.offload.handle import OffloadHandle
from torchwrap.weights.many import forward_many, generate_many

some_models = pytest.mark.parametrize(
    "fixture", [by_name(name) for name in ("llama", "gpt2", "t5", "bert", "mixtral", "vit", "albert", "llava")], ids=lambda f: f.name
)
generating = pytest.mark.parametrize("fixture", [by_name(name) for name in ("llama", "t5", "mixtral", "llava")], ids=lambda f: f.name)


def _jobs(inputs: dict[str, Any], count: int = 8) -> list[dict[str, Any]]:
    """Inputs of other content each, and other sizes."""
    return [
        {
            name: (value.roll(number, dims=-1) if value.is_floating_point() or name.endswith("input_ids") else value)[
                : 1 + number % len(value)
            ]
            for name, value in inputs.items()
        }
        for number in range(count)
    ]


def _leaves(output: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(getattr(output, "to_tuple", lambda: output)()) if torch.is_tensor(leaf))


def _same(got: Any, expected: Any) -> bool:
    pairs = zip(_leaves(got), _leaves(expected), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _pair(fixture: ModelFixture, **fields: Any) -> tuple[nn.Module, nn.Module, OffloadHandle]:
    plain = fixture.build()
    wrapped = streamed(copy.deepcopy(plain), **fields)
    return plain, wrapped, tw.handle_of(wrapped, "offload")


class Blocks(nn.Module):
    """Four streamed blocks; `seen` is called with the number of each block before it runs."""

    def __init__(self, count: int = 4, width: int = 96) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.seen: Callable[[int, torch.Tensor], None] = lambda index, x: None

    def forward(self, x: torch.Tensor, skip: tuple[int, ...] = (), scale: float = 1.0) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            if index not in skip:
                self.seen(index, x)
                x = torch.tanh(block(x)) * scale
        return x


def _blocks(**fields: Any) -> tuple[Blocks, Blocks, OffloadHandle]:
    torch.manual_seed(0)
    plain = Blocks().eval()
    wrapped = copy.deepcopy(plain)
    tw.offload(wrapped, device_memory=2 * 48 * 1024, params="disk", units=tuple(f"blocks.{i}" for i in range(4)), **fields)
    return plain, wrapped, tw.handle_of(wrapped, "offload")


def _read(handle: OffloadHandle) -> int:
    assert handle.engine is not None
    return int(handle.engine.counters["bytes_read"])


def _is_whole(handle: OffloadHandle, wrapped: nn.Module, plain: nn.Module) -> None:
    """Nothing is left over from a failure: the model computes, streams and can be unwrapped."""
    assert handle.engine is not None
    assert handle.engine.turns is None and not any(fetch.users for fetch in handle.engine._fetches.values())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("torchwrap-turn")]
    with torch.no_grad():
        assert torch.equal(wrapped(torch.ones(2, 96)), plain(torch.ones(2, 96)))
        assert all(torch.equal(y, plain(torch.ones(1, 96))) for y in handle.forward_many([torch.ones(1, 96)] * 3))
    tw.unwrap(wrapped)
    assert all(torch.equal(a, b) for a, b in zip(wrapped.parameters(), plain.parameters(), strict=True))


# -- results and reading -------------------------------------------------------------------------------------------------------------


@some_models
def test_eight_batches_give_the_results_of_eight_calls_and_are_read_once(fixture: ModelFixture) -> None:
    plain, wrapped, handle = _pair(fixture)
    jobs = _jobs(fixture.inputs())
    expected = [run(plain, job) for job in jobs]
    with torch.no_grad():
        for _ in range(2):
            assert _same(handle.forward_many(jobs), expected)  # the first passes are watched; the order is learned
        assert wrapped(**jobs[0]) is not None
        before = _read(handle)
        assert wrapped(**jobs[0]) is not None
        one_pass, before = _read(handle) - before, _read(handle)
        assert _same(handle.forward_many(jobs), expected)
    assert _read(handle) - before == one_pass


@generating
@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"do_sample": True, "temperature": 0.9}, {"num_beams": 2, "do_sample": False}],
    ids=["greedy", "sampled", "beam"],
)
@pytest.mark.parametrize("limit", [None, 2], ids=["all", "two"])
def test_generated_tokens_are_those_of_one_call_after_another(fixture: ModelFixture, how: dict[str, Any], limit: int | None) -> None:
    plain, _, handle = _pair(fixture)
    jobs = [{**job, "max_new_tokens": 2 + number} for number, job in enumerate(_jobs(fixture.prompt(), 4))]
    expected = []
    for seed, job in enumerate(jobs):
        torch.manual_seed(seed)
        expected.append(plain.generate(**job, **how))
    got = handle.generate_many(jobs, seeds=range(4), max_batches_in_flight=limit, **how)
    assert _same(got, expected)


def test_a_pass_for_each_token_and_not_for_each_batch() -> None:
    _, _, handle = _pair(by_name("llama"))
    jobs = _jobs(by_name("llama").prompt(), 6)
    handle.generate_many(jobs, max_new_tokens=2, do_sample=False)
    assert handle.engine is not None
    before, uses = _read(handle), handle.engine.counters["unit_uses"]
    handle.generate_many(jobs, max_new_tokens=5, do_sample=False)
    assert handle.engine.counters["unit_uses"] - uses == 5 * len(handle.units)
    assert _read(handle) - before == 5 * sum(handle.engine.layout(unit).read_bytes for unit in handle.units)


def test_every_unit_runs_for_all_batches_in_their_order_before_the_next() -> None:
    _, wrapped, handle = _blocks()
    order: list[tuple[int, int]] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args, index=index: order.append((index, len(args[0]))))
        for index, block in enumerate(wrapped.blocks)
    ]
    with torch.no_grad():
        handle.forward_many([torch.ones(1 + number, 96) for number in range(3)])
    assert order == [(block, 1 + number) for block in range(4) for number in range(3)]
    for hook in hooks:
        hook.remove()


def test_batches_that_leave_units_out_are_right_and_meet_again() -> None:
    plain, _, handle = _blocks()
    skips = [(), (1,), (1, 2), (0, 1, 2, 3), (3,), (0,)]
    jobs = [{"x": torch.full((1, 96), float(number)), "skip": skip} for number, skip in enumerate(skips)]
    with torch.no_grad():
        expected = [plain(**job) for job in jobs]
        handle.forward_many(jobs)
        assert handle.engine is not None
        uses = handle.engine.counters["unit_uses"]
        assert _same(handle.forward_many(jobs), expected)
    assert handle.engine.counters["unit_uses"] - uses == 4


def test_experts_inside_blocks_are_read_once_for_all_batches() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(64, 64)
            self.experts = nn.ModuleList(Expert() for _ in range(4))

        def forward(self, x: torch.Tensor, chosen: tuple[int, ...]) -> torch.Tensor:
            x = self.mix(x)
            return x + sum(self.experts[index](x) for index in chosen)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor, chosen: tuple[int, ...]) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, chosen)
            return x

    torch.manual_seed(1)
    plain = Model().eval()
    wrapped = streamed(copy.deepcopy(plain))
    handle = tw.handle_of(wrapped, "offload")
    assert any(unit.kind == "expert" for unit in handle.units)
    jobs = [{"x": torch.full((2, 64), 0.1 * number), "chosen": (number % 4, (number + 2) % 4)[: 1 + number % 2]} for number in range(8)]
    with torch.no_grad():
        expected = [plain(**job) for job in jobs]
        handle.forward_many(jobs)
        uses = handle.engine.counters["unit_uses"]
        assert _same(handle.forward_many(jobs), expected)
    # 3 blocks and 12 experts; a batch that wants expert 3 before expert 1 meets it on another round
    assert handle.engine.counters["unit_uses"] - uses <= 15 + 12


def test_no_more_than_the_given_number_are_under_way() -> None:
    plain, wrapped, handle = _blocks()
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def count(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal most
        alive.append(weakref.ref(args[0]))
        most = max(most, sum(ref() is not None for ref in alive))

    hook = wrapped.blocks[1].register_forward_pre_hook(count)
    jobs = [torch.full((1, 96), float(number)) for number in range(7)]
    with torch.no_grad():
        assert _same(handle.forward_many(jobs, max_batches_in_flight=2), [plain(job) for job in jobs])
    assert most <= 2
    hook.remove()


def test_inputs_may_be_keywords_arguments_or_one_tensor() -> None:
    plain, wrapped, handle = _blocks()
    x = torch.ones(1, 96)
    with torch.no_grad():
        expected = [plain(x), plain(x, (1,)), plain(x=x, scale=0.5)]
        assert _same(handle.forward_many([x, (x, (1,)), {"x": x, "scale": 0.5}]), expected)
        assert _same(forward_many(wrapped, [x]), expected[:1])
        assert handle.forward_many([]) == []


def test_everything_resident_needs_no_turns() -> None:
    torch.manual_seed(0)
    plain = Blocks().eval()
    wrapped = tw.offload(copy.deepcopy(plain), device_memory="1GiB")
    handle = tw.handle_of(wrapped, "offload")
    assert handle.engine is None
    with torch.no_grad():
        assert _same(handle.forward_many([torch.ones(1, 96)] * 3), [plain(torch.ones(1, 96))] * 3)


def test_superpipeline_has_it_too() -> None:
    plain = by_name("llama").build()
    wrapped = tw.superpipeline(copy.deepcopy(plain), k=2, k_prime=1)
    jobs = _jobs(by_name("llama").inputs())
    expected = [run(plain, job) for job in jobs]
    with torch.no_grad():
        for _ in range(3):
            assert _same(tw.handle_of(wrapped, "superpipeline").forward_many(jobs), expected)
        assert _same(forward_many(wrapped, jobs), expected)


def test_a_deep_copy_runs_its_own_weights() -> None:
    plain, wrapped, _ = _blocks()
    copied = copy.deepcopy(wrapped)
    with torch.no_grad(), tw.core.tensors(copied.blocks[0], "bias", write=True) as real:
        real["bias"].fill_(3.0)
    with torch.no_grad():
        (output,) = tw.handle_of(copied, "offload").forward_many([torch.ones(1, 96)])
        assert torch.equal(output, copied(torch.ones(1, 96)))
        assert not torch.equal(output, plain(torch.ones(1, 96)))


# -- what belongs to a thread, and what to a call ------------------------------------------------------------------------------------


def test_modes_of_the_calling_thread_hold_in_the_calls() -> None:
    plain, wrapped, handle = _blocks()
    x = torch.ones(2, 96)
    with torch.inference_mode():
        assert all(y.is_inference() for y in handle.forward_many([x, x]))
    assert all(y.requires_grad for y in handle.forward_many([x, x]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert _same(handle.forward_many([x, x]), [plain(x), plain(x)])
        assert torch.is_autocast_cache_enabled()
    seen: list[Any] = []

    def look(module: nn.Module, args: Any) -> None:
        modes = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads(), torch.ones(1).device.type)
        seen.append((*modes, torch.tensor([1e-320], dtype=torch.float64, device="cpu").mul(1).item()))

    hook = wrapped.register_forward_pre_hook(look)
    try:
        torch.set_flush_denormal(True)  # per thread
        with torch.no_grad(), torch.device("meta"):
            wrapped(x)
            handle.forward_many([x, x])
    finally:
        torch.set_flush_denormal(False)
    hook.remove()
    assert len(seen) == 3 and len(set(seen)) == 1


def test_saved_tensor_hooks_of_the_caller_see_the_activations() -> None:
    _, _, handle = _blocks()
    packed: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        handle.forward_many([torch.ones(3, 96), torch.ones(5, 96)])
    assert {(3, 96), (5, 96)} <= {tuple(shape) for shape in packed}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_gradients_of_many_are_those_of_single_calls(training: bool) -> None:
    plain, wrapped, handle = _blocks()
    jobs = [torch.randn(2, 96) for _ in range(4)]
    plain.train(training)
    wrapped.train(training)
    for job in jobs:
        plain(job).square().sum().backward()
    for output in handle.forward_many(jobs):
        output.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(wrapped.parameters(), plain.parameters(), strict=True))


def test_random_numbers_are_those_of_the_seeds() -> None:
    plain, wrapped, handle = _blocks()
    for model in (plain, wrapped):
        model.blocks[1].register_forward_hook(lambda module, args, output: nn.functional.dropout(output))
    jobs = [torch.ones(1, 96)] * 3
    with torch.no_grad():
        expected = []
        for seed in (7, 8, 7):
            torch.manual_seed(seed)
            expected.append(plain(jobs[0]))
        assert _same(handle.forward_many(jobs, seeds=(7, 8, 7)), expected)
        assert _same(handle.forward_many(jobs, seeds=(7, 8, 7), max_batches_in_flight=1), expected)
        torch.manual_seed(3)
        first, second = handle.forward_many(jobs), handle.forward_many(jobs)
        torch.manual_seed(3)
        assert _same(handle.forward_many(jobs), first) and not _same(second, first)
    assert not torch.equal(first[0], first[1])


def test_the_generator_is_left_alone_if_nothing_is_drawn() -> None:
    _, _, handle = _blocks()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with torch.no_grad():
        handle.forward_many([torch.ones(1, 96)] * 3)
        handle.forward_many([torch.ones(1, 96)] * 3, seeds=(1, 2, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_notes_that_a_model_leaves_itself_do_not_mix() -> None:
    class Noting(Blocks):
        def forward(self, x: torch.Tensor, step: int = 0) -> torch.Tensor:  # type: ignore[override]
            for number in range(3):
                if number == 0:
                    self.note = x.sum()  # as the position offsets of a multimodal prompt
                    self.blocks[2].inner = x.mean()
                x = super().forward(x) + self.note + self.blocks[2].inner
            return x

    torch.manual_seed(0)
    plain = Noting().eval()
    wrapped = copy.deepcopy(plain)
    tw.offload(wrapped, device_memory=2 * 48 * 1024, params="disk", units=tuple(f"blocks.{i}" for i in range(4)))
    jobs = [torch.full((1, 96), float(number)) for number in range(5)]
    with torch.no_grad():
        expected = [plain(job) for job in jobs]
        assert _same(tw.handle_of(wrapped, "offload").forward_many(jobs), expected)
    assert torch.equal(wrapped.note, plain.note) and torch.equal(wrapped.blocks[2].inner, plain.blocks[2].inner)


def test_running_statistics_are_updated_in_the_order_of_the_batches() -> None:
    fixture = by_name("convnet")
    plain, wrapped, handle = _pair(fixture)
    plain.train()
    wrapped.train()
    jobs = _jobs(fixture.inputs(), 5)
    with torch.no_grad():
        expected = [plain(**job) for job in jobs]
        assert _same(handle.forward_many(jobs), expected)
    assert all(torch.equal(a, b) for a, b in zip(wrapped.buffers(), plain.buffers(), strict=True))


def test_layers_held_back_in_the_caller_are_held_back_in_the_calls() -> None:
    _, wrapped, handle = _blocks()
    tw.trace(wrapped)
    recorder = tw.handle_of(wrapped, "trace")
    with torch.no_grad(), tw.disabled(wrapped, "trace"):
        before = str(recorder.stats())
        handle.forward_many([torch.ones(1, 96)] * 2)
        assert str(recorder.stats()) == before
        tw.handle_of(wrapped, "offload")
    with torch.no_grad():
        handle.forward_many([torch.ones(1, 96)] * 2)
    assert str(recorder.stats()) != before


# -- failures ------------------------------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


@pytest.mark.parametrize("at", [(0, 1), (3, 1), (0, 3), (2, 0)], ids=lambda at: f"block{at[0]}-batch{at[1]}")
def test_one_batch_that_raises_ends_all_with_its_error(at: tuple[int, int]) -> None:
    plain, wrapped, handle = _blocks()

    def fail(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) == 1 + at[1]:
            raise Boom(at)

    hook = wrapped.blocks[at[0]].register_forward_pre_hook(fail)
    for limit in (None, 2):
        with torch.no_grad(), pytest.raises(Boom) as caught:
            handle.forward_many([torch.ones(1 + number, 96) for number in range(4)], max_batches_in_flight=limit)
        assert caught.value.args == (at,)
    hook.remove()
    _is_whole(handle, wrapped, plain)


def test_a_wrong_shape_ends_all_with_torch_s_own_error() -> None:
    plain, wrapped, handle = _blocks()
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        handle.forward_many([torch.ones(2, 96), torch.ones(2, 95), torch.ones(2, 96)])
    _is_whole(handle, wrapped, plain)


def test_a_model_that_tries_again_does_not_swallow_the_end() -> None:
    plain, wrapped, handle = _blocks()
    tried = []

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = wrapped

        def forward(self, x: torch.Tensor) -> Any:
            if len(x) == 3:
                raise Boom
            for _ in range(3):
                try:
                    return self.inner(x)
                except Exception:
                    tried.append(len(x))
            return None

    # The calls go through the stubborn module because it is what the handle takes for its model.
    outer = Stubborn()
    handle.root = weakref.ref(outer)
    with torch.no_grad(), pytest.raises(Boom):
        handle.forward_many([torch.ones(1, 96), torch.ones(2, 96), torch.ones(3, 96)])
    assert tried == []
    handle.root = weakref.ref(wrapped)
    _is_whole(handle, wrapped, plain)


def test_an_interrupt_ends_all_and_comes_out() -> None:
    plain, wrapped, handle = _blocks()
    hook = wrapped.blocks[2].register_forward_pre_hook(lambda module, args: _thread.interrupt_main() if len(args[0]) == 2 else None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background with it ignored
    gc.collect()
    gc.disable()  # Python drops an interrupt that meets a finalizer, and the collector may run one of another test just then
    try:
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            handle.forward_many([torch.ones(1 + number, 96) for number in range(4)] * 50)
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, before)
    hook.remove()
    _is_whole(handle, wrapped, plain)


def test_a_file_that_fails_ends_all_and_the_next_call_works() -> None:
    plain, wrapped, handle = _blocks()
    assert handle.engine is not None
    with torch.no_grad():
        handle.forward_many([torch.ones(1, 96)] * 2)
    piece = next(piece for piece in handle.pieces if not piece.resident)
    right = piece.checksum
    piece.checksum = 1
    handle.trim()
    with torch.no_grad(), pytest.raises(tw.CorruptDataError):
        handle.forward_many([torch.ones(1, 96)] * 3)
    piece.checksum = right
    handle.trim()
    _is_whole(handle, wrapped, plain)


def test_many_inside_a_forward_is_refused() -> None:
    plain, wrapped, handle = _blocks()
    x = torch.ones(1, 96)

    def again(module: nn.Module, args: Any) -> None:
        handle.forward_many([x])

    hook = wrapped.blocks[1].register_forward_pre_hook(again)
    with torch.no_grad(), pytest.raises(tw.ConflictError):
        handle.forward_many([x, x])
    with torch.no_grad(), pytest.raises(tw.ConflictError):
        wrapped(x)
    hook.remove()
    _is_whole(handle, wrapped, plain)


def test_unwrapping_inside_is_refused_and_outside_waits() -> None:
    plain, wrapped, handle = _blocks()
    x = torch.ones(1, 96)
    hook = wrapped.blocks[1].register_forward_pre_hook(lambda module, args: tw.unwrap(wrapped))
    with torch.no_grad(), pytest.raises(tw.ConflictError):
        handle.forward_many([x, x])
    hook.remove()
    inside = threading.Event()
    hook = wrapped.blocks[1].register_forward_pre_hook(lambda module, args: inside.set())
    undone: list[int] = []

    def undo() -> None:
        assert inside.wait(30)
        tw.unwrap(wrapped)
        undone.append(len(results))

    results: list[Any] = []
    other = threading.Thread(target=undo)
    other.start()
    with torch.no_grad():
        results += handle.forward_many([x] * 40)
    other.join(30)
    hook.remove()
    assert not other.is_alive() and undone
    with torch.no_grad():
        assert _same(results, [plain(x)] * 40)
        assert torch.equal(wrapped(x), plain(x)) and tw.wrappers_of(wrapped) == {}


def test_other_threads_wait_their_time() -> None:
    plain, wrapped, handle = _blocks()
    outputs: list[torch.Tensor] = []
    x = torch.ones(3, 96)

    def call() -> None:
        with torch.no_grad():
            outputs.extend(wrapped(x) for _ in range(5))

    others = [threading.Thread(target=call) for _ in range(3)]
    for other in others:
        other.start()
    with torch.no_grad():
        for _ in range(5):
            assert _same(handle.forward_many([x] * 4), [plain(x)] * 4)
    for other in others:
        other.join(30)
    with torch.no_grad():
        assert len(outputs) == 15 and _same(outputs, [plain(x)] * 15)


def test_refusals() -> None:
    _, wrapped, handle = _blocks()
    x = torch.ones(1, 96)
    with pytest.raises(tw.ConfigError, match="max_batches_in_flight"):
        handle.forward_many([x], max_batches_in_flight=0)
    with pytest.raises(tw.ConfigError, match="2 seeds for 1 inputs"):
        handle.forward_many([x], seeds=(1, 2))
    with pytest.raises(tw.UnsupportedModelError, match="generate"):
        generate_many(wrapped, [x])
    with pytest.raises(tw.NotAppliedError):
        forward_many(nn.Linear(2, 2), [torch.ones(1, 2)])
    with pytest.raises(tw.ConflictError), FlopCounterMode(display=False):
        handle.forward_many([x])
    with pytest.raises(tw.ConflictError):
        torch.func.vmap(lambda y: handle.forward_many([y])[0])(torch.ones(2, 1, 96))
    llama = tw.handle_of(streamed(by_name("llama").build()), "offload")
    with pytest.raises(tw.ConfigError, match="streamer"):
        llama.generate_many([by_name("llama").prompt()], streamer=object())
