"""What `offload` would do with a model folder under given budgets, before anything is loaded.

Reads only config.json and the headers of the safetensors files. The answer comes from the same planner that `offload` runs, with the disk
speed measured on the spot. Exit status 1 when the budget is too small; the message names the smallest one that works.

example: torchwrap plan ./my-model --device-memory 1GiB
example: torchwrap plan ./my-model --device-memory 300MiB --goal train --batch 4 --tokens 512 --activations disk
"""

from __future__ import annotations

import argparse

from torchwrap.cli.output import Outcome, existing_folder, positive, size

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "bytes per tier and predicted seconds per token or training step for a model folder, without loading it"

_TIERS = {"device": "device_memory", "host": "host_memory"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", type=existing_folder, help="folder with config.json and safetensors files")
    parser.add_argument("--device-memory", type=size, metavar="SIZE", help="bytes of weights the computing device may hold")
    parser.add_argument("--host-memory", type=size, metavar="SIZE", help="bytes of weights the host may hold beside a separate device")
    parser.add_argument("--budget", type=_budget, metavar="TIER=SIZE,...", default={}, help="the same in one word: device=6GiB,host=16GiB")
    parser.add_argument("--device", help="compute device, for example cpu or cuda:0 (default: as offload chooses)")
    parser.add_argument("--tile-above", type=size, metavar="SIZE", help="compute larger linear layers in tiles of that size")
    parser.add_argument(
        "--goal", choices=["infer", "train"], default="infer", help="what the model is for; train: by an OffloadedOptimizer"
    )
    parser.add_argument("--batch", type=positive, default=1, help="sequences per call or step (default: 1)")
    parser.add_argument("--tokens", type=positive, default=256, help="tokens of each sequence (default: 256)")
    parser.add_argument("--activations", choices=["auto", "keep", "recompute", "host", "disk"], help="what blocks save for the backward")
    parser.add_argument("--optimizer", type=_optimizer, help='class of torch.optim, "master_weights(AdamW)", or bytes of state per element')
    parser.add_argument("--reserve", type=size, metavar="SIZE", help="memory left to activations and caches (default: for 256 tokens)")


def run(arguments: argparse.Namespace) -> Outcome:
    """Plan, and report too small a budget as a finding rather than as an error."""
    from torchwrap.core.errors import BudgetError
    from torchwrap.offload.config import Offload
    from torchwrap.offload.plan import plan_folder

    named = ("device", "device_memory", "host_memory", "tile_above", "activations", "optimizer", "reserve")
    given = {name: getattr(arguments, name) for name in named if getattr(arguments, name) is not None}
    config = Offload(goal=arguments.goal, **{**arguments.budget, **given})
    subject = {"model": str(arguments.model), "goal": arguments.goal, "technique": "offload"}
    subject |= {"batch": arguments.batch, "tokens": arguments.tokens}
    try:
        plan = plan_folder(arguments.model, config, batch=arguments.batch, tokens=arguments.tokens)
    except BudgetError as error:
        finding = {"fits": False, "needed": error.needed, "available": error.available, "largest": error.largest, "message": str(error)}
        return Outcome(data={**subject, **finding}, text=f"offload: does not fit. {error}", ok=False)
    return Outcome(data={**subject, "fits": True, "plan": plan.to_dict()}, text=f"offload: fits.\n{plan}")


def _optimizer(text: str) -> int | str:
    import torch

    from torchwrap.core.errors import ConfigError
    from torchwrap.stream.settings import state_bytes

    wanted = int(text) if text.isdecimal() else text
    try:
        state_bytes(wanted, torch.float32)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return wanted


def _budget(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        tier, separator, amount = part.partition("=")
        if not separator or tier.strip() not in _TIERS:
            raise argparse.ArgumentTypeError(
                f"{part!r}: write TIER=SIZE with a tier of {', '.join(_TIERS)}, for example device=6GiB,host=16GiB"
            )
        found[_TIERS[tier.strip()]] = size(amount.strip())
    return found
