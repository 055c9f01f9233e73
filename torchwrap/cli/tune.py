"""Measure which way of computing attention is fastest on this machine, and keep what was found for later processes.

For each number of tokens a prefill (as many queries as keys) and a decode (one query) are timed. `attend` and `fast_attention` go by the
figures where they are not told otherwise (`tune="table"`).
"""

from __future__ import annotations

import argparse

from torchwrap.cli.output import Outcome, table

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "measure which attention is fastest here"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--heads", type=int, default=32, help="query heads (default: 32)")
    parser.add_argument("--kv-heads", type=int, default=8, help="key and value heads (default: 8)")
    parser.add_argument("--width", type=int, default=128, help="elements of a head's vector (default: 128)")
    parser.add_argument("--tokens", type=_numbers, default=(1024, 4096), metavar="N,N", help="numbers of tokens (default: 1024,4096)")
    parser.add_argument("--batch", type=int, default=1, help="rows of a batch (default: 1)")
    parser.add_argument("--window", type=int, default=None, help="keys that a query sees, if not all (default: all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default: bfloat16 on cards")
    parser.add_argument("--device", default=None, help="default: cuda if there is a card, else cpu")
    parser.add_argument("--backends", type=_names, default=None, metavar="NAME,NAME", help="compare these, also where figures are known")
    parser.add_argument("--train", action="store_true", help="time backward as well")
    parser.add_argument("--tune-dir", default=None, metavar="FOLDER", help="where figures are kept (default: the user's cache)")


def run(arguments: argparse.Namespace) -> Outcome:
    """Measure, and list what was found."""
    import torch

    from torchwrap.attention.tune import Shape, tune
    from torchwrap.attention.tuning.kinds import said

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arguments.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    shapes = [
        Shape(
            heads=arguments.heads, kv_heads=arguments.kv_heads, width=arguments.width, q_length=rows, kv_length=tokens,
            batch=arguments.batch, window=arguments.window, dtype=getattr(torch, dtype), device=device,
        )
        for tokens in arguments.tokens
        for rows in (tokens, 1)
    ]  # fmt: skip
    found = tune(shapes, train=arguments.train, backends=arguments.backends, tune_dir=arguments.tune_dir)
    data: dict[str, object] = {"measured": [{"kind": list(one.kind), "order": list(one.order), "seconds": one.seconds} for one in found]}
    rows = [
        (said(one.kind), name if place else f"{name} *", f"{one.seconds[name] * 1e3:.3g} ms")
        for one in found
        for place, name in enumerate(one.order)
    ]
    return Outcome(data=data, text=table(rows, ("kind of call", "back end (* first choice)", "median")) or "nothing to compare")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1024,4096") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
