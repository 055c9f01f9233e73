"""How a call of attention is to be computed, as far as the caller has a say: which back end, and by which knowledge one is chosen.

`attend` takes a name or a `Settings` in its place. Compiled graphs hold operators, whose arguments are tensors, numbers and strings: there
settings are text, and are read again when the operator runs.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from torchwrap.core.errors import ConfigError

__all__ = ["Settings", "Tune", "settings_of"]

Tune = Literal["table", "measure", "off"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the caller of `attend` decides.

    Attributes:
        backend: "auto", or a name of `dispatch.BACKENDS`.
        tune: what "auto" goes by. "table": the order that the library ships for a kind of device, corrected by what was measured on this
            one before (`torchwrap.attention.tune`). "measure": the same, and a kind of call that was never measured is measured when it
            first comes. "off": the shipped order.
        tune_dir: folder of the measurements; None: `$TORCHWRAP_CACHE`, else `~/.cache/torchwrap`, folder `attention`.
        deterministic: no gradients by a back end whose last bits may differ from run to run; one that was asked for by name raises.
        block_m, block_n, num_warps, num_stages: rows and columns of a tile, warps of a program, tiles in flight; with `backend="triton"`,
            which takes them as they are or refuses. None: from its table.
        text: the settings as a string, of which `settings_of` makes them again; the name of the back end if that is all they say.

    Raises:
        ConfigError: a value of the wrong kind.
    """

    backend: str = "auto"
    tune: Tune = "table"
    tune_dir: str | None = None
    deterministic: bool = False
    block_m: int | None = None
    block_n: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    # Made beforehand, of literals: Dynamo 2.13 can read a string and trace `repr`, but not `json`.
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tune not in get_args(Tune):
            allowed = ", ".join(map(repr, get_args(Tune)))
            raise ConfigError(f"tune={self.tune!r} is unknown", where="Settings", fix=f"Choose one of {allowed}.")
        if not isinstance(self.deterministic, bool):
            raise ConfigError(f"deterministic={self.deterministic!r}", where="Settings", fix="Give True or False.")
        if not isinstance(self.backend, str) or not isinstance(self.tune_dir, str | None) or self.tune_dir == "":
            said = f"backend={self.backend!r}, tune_dir={self.tune_dir!r}"
            raise ConfigError(said, where="Settings", fix="Give the name of a back end, and a folder as a string or None.")
        for name, least, most in (("block_m", 16, 256), ("block_n", 16, 256), ("num_warps", 1, 32), ("num_stages", 1, 8)):
            _check_tile(name, getattr(self, name), least, most, self.backend)

        given = {field.name: value for field in fields(self) if field.init and (value := getattr(self, field.name)) != field.default}
        said = ", ".join([f"{name!r}: {value!r}" for name, value in given.items()])
        object.__setattr__(self, "text", self.backend if all(name == "backend" for name in given) else f"{{{said}}}")

    @property
    def tiles(self) -> tuple[int | None, ...]:
        """block_m, block_n, num_warps and num_stages; empty if none is given."""
        given = (self.block_m, self.block_n, self.num_warps, self.num_stages)
        return () if all(value is None for value in given) else given


def _check_tile(name: str, value: int | None, least: int, most: int, backend: str) -> None:
    if value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= most or (name != "num_stages" and value & (value - 1)):
        powers = "a number" if name == "num_stages" else "a power of two"
        raise ConfigError(f"{name}={value!r}", where="Settings", fix=f"Give {powers} from {least} to {most}, or None for the table's.")
    if backend != "triton":
        fix = 'Only the back end "triton" takes it: use backend="triton", or leave it out.'
        raise ConfigError(f"{name}={value} would have no effect with backend={backend!r}", where="Settings", fix=fix)


def settings_of(given: str | Settings) -> Settings:
    """Settings from settings, from the name of a back end, or from their text.

    Raises:
        ConfigError: neither.
    """
    if isinstance(given, Settings):
        return given
    if not isinstance(given, str):
        fix = 'Give "auto", the name of a back end, or Settings.'
        raise ConfigError(f"backend is a {type(given).__name__}", where="attend", fix=fix)
    return _read(given)


@functools.lru_cache(maxsize=256)
def _read(text: str) -> Settings:
    return Settings(**ast.literal_eval(text)) if text.startswith("{") else Settings(backend=text)
