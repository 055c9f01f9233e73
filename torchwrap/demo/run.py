"""The main job on a real model, start to finish, with every claim checked on the way.

A chat model answers a question unwrapped. Then one line puts it under a memory budget of 40 % of its weights, the rest streams from its own
file on disk, and it answers again: same tokens, same logits, bit for bit. Another line takes the wrapper off, and the answer is checked a
third time. What is shown: the text as it is written, the peak of weights in memory, tokens per second, torchwrap's own description, and
the memory timeline as a picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from torchwrap.core.errors import UnsupportedModelError
from torchwrap.demo.timeline import Story, draw

if TYPE_CHECKING:
    import torch
    from torch import nn

    from torchwrap.stream.timeline import Timeline

__all__ = ["BUDGET_FRACTION", "QUESTION", "Answer", "DemoResult", "run"]

BUDGET_FRACTION = 0.4
QUESTION = "Why is the sky blue?"


@dataclass(kw_only=True)
class Answer:
    """What the model said, and how fast.

    Args:
        ids: token ids of the answer, without the prompt.
        logits: (T, V) float, one row of scores for each token of the answer.
        seconds: `time.monotonic()` at which each token came out, the first entry being the start.
        text: the answer.
    """

    ids: list[int]
    logits: torch.Tensor
    seconds: list[float]
    text: str

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first, so that the prompt does not count."""
        return (len(self.seconds) - 2) / (self.seconds[-1] - self.seconds[1]) if len(self.seconds) > 2 else float("nan")


@dataclass(kw_only=True)
class DemoResult:
    """Figures and checks of one demonstration, JSON-able through `to_dict`.

    Args:
        checks: name of a claim to whether it held.
        figures: name to number or text.
        texts: name to longer text (the answer, torchwrap's description).
        picture: the file drawn, or `None` if it could not be.
    """

    checks: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, float | int | str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    picture: str | None = None

    @property
    def ok(self) -> bool:
        """True when every check held."""
        return all(self.checks.values())

    def to_dict(self) -> dict[str, object]:
        """Everything, for JSON."""
        return {"checks": self.checks, "figures": self.figures, "texts": self.texts, "picture": self.picture}


class _Stream:
    """What transformers calls a streamer: gets the prompt, then each token as it is chosen."""

    def __init__(self, tokenizer: Any, shown: TextIO | None, bar: Callable[[int], object]) -> None:
        self.tokenizer, self.shown, self.bar = tokenizer, shown, bar
        self.ids: list[int] = []
        self.seconds: list[float] = []
        self._written = ""

    def put(self, value: torch.Tensor) -> None:
        self.seconds.append(time.monotonic())
        if len(self.seconds) == 1:  # the prompt
            return
        self.ids += value.flatten().tolist()
        self.bar(1)
        if self.shown is not None:
            # Decoding everything again keeps characters whole that are spread over several tokens.
            text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):
                self.shown.write(text[len(self._written) :])
                self.shown.flush()
                self._written = text

    def end(self) -> None:
        if self.shown is not None:
            self.shown.write("\n")


def run(
    *, model: str | None, out: Path, shown: TextIO, tokens: int = 48, fraction: float = BUDGET_FRACTION, question: str = QUESTION
) -> DemoResult:
    """Show, measure and check the main job.

    Args:
        model: folder or hub id of a chat model; `None` takes SmolLM2-135M-Instruct, which travels with the `demo` extra.
        out: folder for the picture, created if need be.
        shown: where the story is told while it happens.
        tokens: most tokens of the answer.
        fraction: budget as a fraction of the bytes of the weights, in (0, 1].
        question: what the model is asked.

    Returns:
        Figures and checks; `ok` tells whether all held.

    Raises:
        BudgetError: the fraction is too small for the model.
        ModuleNotFoundError: transformers is not installed.

    Cost: the whole model in memory while it runs unwrapped; `fraction` of it while wrapped.
    """
    import torchwrap as tw
    from torchwrap.core.config import format_bytes
    from torchwrap.core.tensors import tensor_bytes

    def say(text: str) -> None:
        print(text, file=shown, flush=True)

    network, tokenizer, name = _load(model, say)
    full = sum(tensor_bytes(parameter) for parameter in network.parameters())
    budget = int(full * fraction)
    untouched = _anatomy(network)

    say(f"\n{name}: {full:,} bytes of weights ({format_bytes(full)})\nQ: {question}\n\nunwrapped, everything in memory:")
    _answer(network, tokenizer, question, 2, shown=None, progress=None)  # reads the mapped file once, starts threads: not to be timed
    moments = [time.monotonic()]
    plain = _answer(network, tokenizer, question, tokens, shown=None, progress=shown)
    say(f"{len(plain.ids)} tokens, {plain.tokens_per_s:.1f} tokens/s")

    say(f"\nmodel = tw.offload(model, device_memory={budget})  # {fraction:.0%} of the weights, {format_bytes(budget)}\n")
    moments.append(time.monotonic())
    tw.offload(network, device_memory=budget, record=True)
    handle = tw.handle_of(network, "offload")
    streamed = _answer(network, tokenizer, question, tokens, shown=shown, progress=None)
    description, explanation, stats = str(tw.describe(network)), handle.explain(), handle.stats()
    timeline: Timeline | None = handle.timeline
    say(f"\n{description}\n\ntw.unwrap(model)")
    moments.append(time.monotonic())

    tw.unwrap(network)
    again = _answer(network, tokenizer, question, tokens, shown=None, progress=shown)
    moments.append(time.monotonic())

    story = _story(timeline, full, budget, moments, streamed)
    checks = {
        "tokens equal": plain.ids == streamed.ids,
        "logits equal": _equal(plain, streamed),
        "weights within budget": 0 < story.peak_bytes <= budget,
        "tokens equal after unwrap": plain.ids == again.ids,
        "logits equal after unwrap": _equal(plain, again),
        "unwrap leaves no trace": _anatomy(network) == untouched,
    }
    # The machine may be busier before than after, or the other way round: the wrapped run has to compare with the better one.
    unwrapped_speed = max(plain.tokens_per_s, again.tokens_per_s)
    figures: dict[str, float | int | str] = {
        "model": name,
        "weight bytes": full,
        "budget bytes": budget,
        "peak weight bytes": story.peak_bytes,
        "peak / full": story.peak_bytes / full,
        "tokens": len(streamed.ids),
        "tokens/s unwrapped": unwrapped_speed,
        "tokens/s wrapped": streamed.tokens_per_s,
        "wrapped / unwrapped speed": streamed.tokens_per_s / unwrapped_speed,
        "bytes read": int(stats["bytes_read"]),
        "largest logit difference": _difference(plain, streamed),
        "seconds": moments[-1] - moments[0],
    }
    texts = {"question": question, "answer": streamed.text, "describe": description, "explain": explanation}
    picture = _save(story, out, f"{name} under {fraction:.0%} of its memory", say)
    return DemoResult(checks=checks, figures=figures, texts=texts, picture=picture)


def _load(model: str | None, say: Callable[[str], None]) -> tuple[nn.Module, Any, str]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs transformers: pip install 'torchwrap[demo]'", name="transformers") from error
    logging.disable_progress_bar()
    name = model or "SmolLM2-135M-Instruct"
    if model is None:
        from torchwrap.demo.weights import smollm2

        model = str(smollm2(say))
    try:
        network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        return network, AutoTokenizer.from_pretrained(model), Path(name).name
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"cannot load a chat model: {first}", where=model, fix="Name a folder with config, tokenizer and weights, or a hub id."
        ) from error


def _answer(network: Any, tokenizer: Any, question: str, tokens: int, *, shown: TextIO | None, progress: TextIO | None) -> Answer:
    import torch

    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(question, return_tensors="pt")
    with _progress(tokens, progress) as bar:
        stream = _Stream(tokenizer, shown, bar)
        with torch.inference_mode():
            out = network.generate(
                **inputs.to(network.device),
                max_new_tokens=tokens,
                do_sample=False,
                streamer=stream,
                return_dict_in_generate=True,
                output_logits=True,
            )
    ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return Answer(ids=ids, logits=torch.cat(out.logits), seconds=stream.seconds, text=tokenizer.decode(ids, skip_special_tokens=True))


@contextmanager
def _progress(total: int, stream: TextIO | None) -> Iterator[Callable[[int], object]]:
    """A progress bar if one is wanted, a terminal shows it and tqdm is there; silence otherwise."""
    if stream is not None and stream.isatty():
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            pass
        else:
            with tqdm(total=total, unit=" tokens", file=stream, leave=False) as bar:
                yield bar.update
            return
    yield lambda count: None


def _anatomy(network: nn.Module) -> list[object]:
    """Classes, attribute names and parameter objects of every module: what wrapping must leave as it was."""
    modules: list[object] = [(name, type(module), tuple(sorted(module.__dict__))) for name, module in network.named_modules()]
    return modules + [(name, id(parameter), parameter.data_ptr() != 0) for name, parameter in network.named_parameters()]


def _equal(one: Answer, other: Answer) -> bool:
    return one.logits.shape == other.logits.shape and bool((one.logits == other.logits).all())


def _difference(one: Answer, other: Answer) -> float:
    if one.logits.shape != other.logits.shape:
        return float("nan")
    return float((one.logits - other.logits).abs().max())


def _story(timeline: Timeline | None, full: int, budget: int, moments: list[float], streamed: Answer) -> Story:
    """The whole run on the timeline's clock: full model, then what was recorded, then full model again."""
    offset = timeline.zero if timeline is not None else moments[0]
    started, wrapped_at, unwrapped_at, ended = (moment - offset for moment in moments)
    recorded, bars = ([(wrapped_at, full)], []) if timeline is None else (sorted(timeline.samples), timeline.events)
    base = full if timeline is None else timeline.base_bytes
    # What stays was all there was from the moment of wrapping to the first unit that came.
    wrapped = [(min(0.0, *(at for at, _ in recorded)), base), *(sample for sample in recorded if sample[0] <= unwrapped_at)]
    return Story(
        samples=[(started, full), *wrapped, (unwrapped_at, full), (ended, full)],
        bars=[event for event in bars if event.end <= unwrapped_at],
        full_bytes=full,
        budget_bytes=budget,
        marks=[(started, "unwrapped"), (wrapped_at, "offload"), (unwrapped_at, "unwrapped again")],
        tokens=[at - offset for at in streamed.seconds[1:]],
        wrapped=(wrapped[0][0], wrapped[-1][0]),
    )


def _save(story: Story, out: Path, title: str, say: Callable[[str], None]) -> str | None:
    from torchwrap.storage.atomic import atomic_write

    try:
        picture = draw(story, title=title)
    except ModuleNotFoundError as error:
        say(f"no picture: {error}")
        return None
    out.mkdir(parents=True, exist_ok=True)
    path = out / "memory-timeline.png"
    atomic_write(path, picture)
    return str(path)
