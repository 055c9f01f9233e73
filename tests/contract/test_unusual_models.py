"""Models that do what few models do. Each is served correctly or refused with a typed error: never a wrong number, never a silent no-op."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchwrap as tw
from tests.contract.cases import Case, every_technique
from tests.contract.compare import equal, model_difference
from tests.contract.neutral import Scaled
from tests.models import by_name, run

WIDTH = 8


class OwnCall(nn.Module):
    """Overrides `__call__` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x + 1) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


class OwnState(nn.Module):
    """Holds a lock, which can be neither copied nor pickled, and says how to do without it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Locked() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return self.linear(x)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.Lock()


class OwnDeepcopy(nn.Module):
    """Copies itself by building anew."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnDeepcopy:
        made = OwnDeepcopy().train(self.training)
        made.load_state_dict(self.state_dict())
        return made


class Forwarding(nn.Module):
    """Looks up unknown attributes in the module it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Recursive(nn.Module):
    """Calls its block inside a call of the same block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Nested() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, depth=2)
        return x


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, depth: int = 0) -> torch.Tensor:
        return self.linear(self(x, depth - 1) if depth else x)


class Recurrent(nn.Module):
    """LSTMs, which keep a second list of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[None]
        for layer in self.layers:
            x, _ = layer(x)
        return x[0]


class ReadsParts(nn.Module):
    """Uses weights of its blocks without calling them, as attention with fused projections does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = nn.functional.linear(x, block.weight, block.bias)
        return x


class OwnParameters(nn.Module):
    """Parameters at the root, used before, between and after the blocks, and a buffer that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("fixed", torch.rand(WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for block in self.blocks:
            x = block(x * self.scale) + self.fixed
        return x * self.calls


def _weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(*(nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(3)))


def _spectral_normed() -> nn.Module:
    return nn.Sequential(*(nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(3)))


def _parametrized() -> nn.Module:
    return nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(3)))


def _reading_hook() -> nn.Module:
    """Hooks of the user read the weights of the block they stand on, before and after its forward."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    for block in model:
        block.register_forward_pre_hook(_add_norm)
        block.register_forward_hook(_scale_by_norm)
    return model


def _add_norm(module: nn.Linear, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0] + module.weight.norm(),)


def _scale_by_norm(module: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return output * module.weight.norm()


def _mixed_types() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    model.append(nn.Linear(WIDTH, WIDTH, dtype=torch.float64).requires_grad_(False))
    model[-1].register_forward_pre_hook(_to_double)
    return model


def _to_double(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].double(),)


def _without_parameters() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.ReLU())


def _of_zero_size() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 0), nn.Linear(0, WIDTH), nn.Linear(WIDTH, WIDTH))


def _strided() -> nn.Module:
    """Weights that are transposed, or slices of a larger tensor."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    model[0].weight = nn.Parameter(torch.rand(WIDTH, WIDTH).t())
    whole = torch.rand(3 * WIDTH, WIDTH)
    model[1].weight, model[2].weight = nn.Parameter(whole[:WIDTH]), nn.Parameter(whole[WIDTH : 2 * WIDTH])
    return model


class Grid(nn.Sequential):
    """Treats each row as the channels of one pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(-1, WIDTH, 1, 1).to(memory_format=torch.channels_last)).flatten(1)


def _channels_last() -> nn.Module:
    return Grid(*(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))).to(memory_format=torch.channels_last)


def _single() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "own-call": OwnCall,
    "own-state": OwnState,
    "own-deepcopy": OwnDeepcopy,
    "forwarding-attributes": Forwarding,
    "recursive": Recursive,
    "recurrent": Recurrent,
    "reads-parts": ReadsParts,
    "own-parameters": OwnParameters,
    "weight-norm-hook": _weight_normed,
    "spectral-norm-hook": _spectral_normed,
    "parametrized": _parametrized,
    "hooks-reading-weights": _reading_hook,
    "mixed-dtypes": _mixed_types,
    "no-parameters": _without_parameters,
    "zero-size": _of_zero_size,
    "strided": _strided,
    "channels-last": _channels_last,
    "single-module": _single,
}

every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=list(KINDS))


def _build(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        return make().eval()


def _inputs(model: nn.Module) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


def _wrapped_or_skip(case: Case, model: nn.Module, twin: nn.Module) -> nn.Module:
    """The wrapped model after a first call.

    Where the technique refuses the model, when it is applied or on the first call, with a typed error, and leaves it untouched, the
    test is done.
    """
    try:
        case.apply(model)
        with torch.no_grad():
            first = model(_inputs(model))
    except (tw.UnsupportedModelError, tw.ConflictError) as error:
        assert error.fix, "a refusal has to say what to do"
        tw.unwrap(model)
        with torch.no_grad():
            equal(model(_inputs(model)), twin(_inputs(twin)))
        assert model_difference(model, twin) is None
        pytest.skip(f"refused: {error}")
    with torch.no_grad():
        equal(first, twin(_inputs(twin)))
    return model


@every_technique
@every_kind
def test_unusual_model_gives_the_same_numbers_and_undoes(case: Case, make: Callable[[], nn.Module]) -> None:
    model, twin = _build(make), _build(make)
    _wrapped_or_skip(case, model, twin)
    with torch.no_grad():
        for _ in range(3):
            equal(model(_inputs(model)), twin(_inputs(twin)))
        equal(model.state_dict(), twin.state_dict())
        tw.unwrap(model)
        equal(model(_inputs(model)), twin(_inputs(twin)))
    assert model_difference(model, twin) is None
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.stride() == theirs.stride()


@every_technique
@every_kind
def test_copies_of_an_unusual_model_give_the_same_numbers(case: Case, make: Callable[[], nn.Module]) -> None:
    # Called once before: weight_norm's hook makes a weight with a history at first, which cannot be copied.
    model, twin = _build(make), _build(make)
    _wrapped_or_skip(case, model, twin)
    copies = [copy.deepcopy(model)]
    if make is not _parametrized:  # its class forbids pickling, wrapped or not
        copies.append(pickle.loads(pickle.dumps(model)))
    for each in copies:
        expected = copy.deepcopy(twin)
        with torch.no_grad():
            equal(each(_inputs(each)), expected(_inputs(twin)))
        tw.unwrap(each)
        with torch.no_grad():
            equal(each(_inputs(each)), expected(_inputs(twin)))


@every_technique
def test_lazy_modules_are_served_or_refused_but_never_silently_dropped(case: Case) -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(*(nn.LazyLinear(WIDTH) for _ in range(3)))

    model = lazy()
    try:
        tw.apply(model, [case.config(model), Scaled(factor=2.0)])
    except tw.UnsupportedModelError as error:
        assert "Lazy" in str(error) or "uninitialized" in str(error).lower()
        assert {type(module) for module in model} == {nn.LazyLinear}
        return
    first = run(model, {"input": torch.ones(1, WIDTH)})
    plain = copy.deepcopy(tw.unwrap(model))
    assert not torch.equal(first, run(plain, {"input": torch.ones(1, WIDTH)}))


class _NoSubclass(nn.Sequential):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("this class is final")


@every_technique
def test_class_that_forbids_subclasses_is_refused_by_name(case: Case) -> None:
    model = _NoSubclass(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    before = set(model.__dict__)
    try:
        case.apply(model)
    except tw.UnsupportedModelError as error:
        assert "_NoSubclass" in str(error)
        assert "this class is final" in str(error)
    else:  # a technique that only touches the blocks has no need of the class
        tw.unwrap(model)
    assert type(model) is _NoSubclass
    assert set(model.__dict__) == before
    assert {type(module) for module in model} == {nn.Linear}


# --- a wrapped model that the user goes on changing ------------------------------------------------------------------------------------


@every_technique
def test_slices_of_a_wrapped_sequence_compute_the_same(case: Case) -> None:
    model, twin = (_build(lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))) for _ in range(2))
    case.apply(model)
    with torch.no_grad():
        equal(model[1:3](_inputs(model)), twin[1:3](_inputs(model)))
        equal(pickle.loads(pickle.dumps(model[1:3]))(_inputs(model)), twin[1:3](_inputs(model)))


@every_technique
def test_a_model_built_from_the_class_of_a_wrapped_one_is_plain(case: Case) -> None:
    fixture = by_name("llama")
    model = case.apply(fixture.build())
    made = type(model)(model.config).eval()
    made.load_state_dict(fixture.build().state_dict())
    assert tw.wrappers_of(made) == {}
    equal(run(made, fixture.inputs()), run(fixture.build(), fixture.inputs()))


@every_technique
def test_unwrap_after_a_block_was_replaced_restores_both(case: Case) -> None:
    fixture = by_name("llama")
    model, twin = case.apply(fixture.build()), fixture.build()
    removed, new, other = model.model.layers[1], *(fixture.build().to(torch.bfloat16).float().model.layers[1] for _ in range(2))
    model.model.layers[1], twin.model.layers[1] = new, other  # of rounded weights, so that it can be told from the removed one
    tw.unwrap(model)
    equal(run(model, fixture.inputs()), run(twin, fixture.inputs()))
    assert model_difference(removed, fixture.build().model.layers[1]) is None


@every_technique
def test_unwrap_after_a_block_was_deleted(case: Case) -> None:
    fixture = by_name("llama")
    model, twin = case.apply(fixture.build()), fixture.build()
    removed = model.model.layers[3]
    del model.model.layers[3], twin.model.layers[3]
    equal(run(model, fixture.inputs(), use_cache=False), run(twin, fixture.inputs(), use_cache=False))
    tw.unwrap(model)
    assert model_difference(removed, fixture.build().model.layers[3]) is None
    equal(run(model, fixture.inputs(), use_cache=False), run(twin, fixture.inputs(), use_cache=False))


@every_technique
@pytest.mark.parametrize("first", ["technique", "adapters"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_added_after_wrapping_come_off_in_either_order(case: Case, first: str) -> None:
    peft = pytest.importorskip("peft")
    fixture = by_name("llama")

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(4)
        return peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        ).eval()

    model, twin = adapted(case.apply(fixture.build())), adapted(fixture.build())
    expected = run(twin, fixture.inputs())
    equal(run(model, fixture.inputs()), expected)
    inner = model.base_model.model
    if first == "technique":
        tw.unwrap(inner)
        equal(run(model, fixture.inputs()), expected)
        inner = model.unload()
    else:
        inner = model.unload()
        equal(run(inner, fixture.inputs()), run(fixture.build(), fixture.inputs()))
        tw.unwrap(inner)
    equal(run(inner, fixture.inputs()), run(fixture.build(), fixture.inputs()))
    assert {type(module) for module in inner.modules()} == {type(module) for module in fixture.build().modules()}


@every_technique
def test_two_threads_applying_at_once_leave_one_application(case: Case) -> None:
    fixture = by_name("llama")
    model = fixture.build()
    outcomes: list[str] = []
    started = threading.Barrier(4)

    def worker() -> None:
        started.wait(timeout=60)
        try:
            case.apply(model)
            outcomes.append("applied")
        except tw.ConflictError:
            outcomes.append("refused")

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(outcomes) == ["applied", "refused", "refused", "refused"]
    equal(run(model, fixture.inputs()), run(fixture.build(), fixture.inputs()))
    tw.unwrap(model)
    twin = fixture.build()
    assert model_difference(model, twin) is None


# --- decorated classes under a framework's loader --------------------------------------------------------------------------------------


@every_technique
def test_decorated_class_is_wrapped_after_from_pretrained_filled_it(case: Case, tmp_path: Any) -> None:
    fixture = by_name("llama")
    fixture.build().save_pretrained(tmp_path)
    cls = type(fixture.build())
    before = dict(vars(cls))
    case.callable(cls)
    try:
        model = cls.from_pretrained(tmp_path)
    finally:
        tw.unwrap(cls)
    assert dict(vars(cls)) == before
    assert list(tw.wrappers_of(model)) == [case.technique]
    equal(run(model, fixture.inputs()), run(fixture.build(), fixture.inputs()))
    tw.unwrap(model)
    assert type(model) is cls
    equal(run(model, fixture.inputs()), run(fixture.build(), fixture.inputs()))


@every_technique
def test_decorated_class_built_on_meta_says_so_on_the_first_call_and_works_once_filled(case: Case) -> None:
    fixture = by_name("convnet")
    cls = type(fixture.build())
    case.callable(cls)
    try:
        with torch.device("meta"):
            model = cls()
        with pytest.raises(tw.UnsupportedModelError, match="meta"):
            run(model, {"x": torch.zeros(1, 3, 8, 8)})
    finally:
        tw.unwrap(cls)
