"""How a call of attention is to be computed, as far as the caller has a say: which back end, and by which knowledge one is chosen.

`attend` takes a name or a `Settings` in its place. Compiled graphs hold operators, whose arguments are tensors, numbers and strings: there
settings are text, and are read again when the operator runs.
"""

from __future__ import annotations

import functools
import json
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
        deterministic: "auto" takes no back end whose gradients may differ in their last bits from run to run.
        text: the settings as a string, of which `settings_of` makes them again; the name of the back end if that is all they say.

    Raises:
        ConfigError: a value of the wrong kind.
    """

    backend: str = "auto"
    tune: Tune = "table"
    tune_dir: str | None = None
    deterministic: bool = False
    # Made beforehand: Dynamo 2.13 can read a string, but cannot trace what would make it.
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tune not in get_args(Tune):
            allowed = ", ".join(map(repr, get_args(Tune)))
            raise ConfigError(f"tune={self.tune!r} is unknown", where="Settings", fix=f"Choose one of {allowed}.")
        if not isinstance(self.deterministic, bool):
            raise ConfigError(f"deterministic={self.deterministic!r}", where="Settings", fix="Give True or False.")
        if not isinstance(self.backend, str) or not isinstance(self.tune_dir, str | None):
            said = f"backend={self.backend!r}, tune_dir={self.tune_dir!r}"
            raise ConfigError(said, where="Settings", fix="Give the name of a back end, and a folder as a string or None.")

        said = {field.name: value for field in fields(self) if field.init and (value := getattr(self, field.name)) != field.default}
        object.__setattr__(self, "text", self.backend if said.keys() <= {"backend"} else json.dumps(said))


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
    return Settings(**json.loads(text)) if text.startswith("{") else Settings(backend=text)
