"""A transformers model without its weights, and where in its files each weight is.

`from_pretrained` itself is asked to load onto the `meta` device: class, config, dtype, generation config, key renaming and weight tying
are then its own work and cannot drift from ours, and no weight is read. Three things are left to do. Buffers: the persistent ones are
read, the others computed by the model's own initialiser, as `from_pretrained` does after loading. The map from parameter names to stored
keys: the same renaming functions, run over the headers. And tensors that are not stored as the model needs them (experts stored one by
one, another dtype): the framework's converter writes just those into a private folder, one at a time.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from torchwrap.core.errors import TorchwrapWarning, UnsupportedModelError
from torchwrap.core.integration import Skeleton
from torchwrap.integrations.transformers.buffers import fill_persistent_buffers, initialise
from torchwrap.integrations.transformers.checkpoint import Checkpoint, Entry, find

__all__ = ["skeleton"]

COMPARE_BYTES = 16 << 20  # chosen: rows of two stored tensors compared at a time
CONVERT_BYTES = 256 << 20  # chosen: stored bytes converted per pass; more passes cost little, fewer map more of the files at once


@dataclass
class _Sources:
    """Where each name's tensor comes from: one stored as it is, or several that the converter makes it of."""

    direct: dict[str, Entry] = field(default_factory=dict)
    convert: dict[str, list[Entry]] = field(default_factory=dict)


def skeleton(folder: Path, work: os.PathLike[str], *, dtype: torch.dtype | None = None) -> Skeleton:
    """Build the model of a checkpoint folder with all parameters on `meta` and a map to their files.

    Args:
        folder: what `save_pretrained` wrote, or a downloaded repository.
        work: private folder, asked for its name only when needed: takes a safetensors file per tensor that has to be converted.
        dtype: as `from_pretrained(dtype=...)`; None means its default, "auto" (transformers 5.23): the config's dtype, else the files'.

    Returns:
        A `Skeleton`. The model equals the one of `from_pretrained(folder)` in class, config, mode, tying and buffers.

    Raises:
        UnsupportedModelError: see `checkpoint.find`; an unknown architecture; weights missing from the files, by name.
        StorageError: files missing, unsafe or corrupt.

    Exactness: bit-identical to what `from_pretrained` would load.
    Cost: headers, plus for converted tensors reading and writing them once. Memory: about three times
    the largest converted tensor (measured: sources, result, and the writer's copy), and up to 256 MiB of mapped file pages.
    """
    stored = find(Path(folder))
    errors: list[UnsupportedModelError] = []
    for kind in _classes(stored):
        try:
            return _build(kind, stored, work, dtype)
        except UnsupportedModelError as error:
            errors.append(error)
    raise errors[0]


def _build(kind: Any, stored: Checkpoint, work: os.PathLike[str], dtype: torch.dtype | None) -> Skeleton:
    with _quiet(), torch.random.fork_rng(devices=[]):
        model, report = _load_on_meta(kind, stored, dtype)
        sources = _match(model, stored)
        weights = {name: (entry.file, entry.key) for name, entry in sources.direct.items()}
        if sources.convert:
            weights |= _convert(model, sources.convert, Path(work))
        _tie_equal_copies(model, weights)
        fill_persistent_buffers(model, weights)
        absent = _absent(model, weights)
        needed = sorted(absent & set(report["missing_keys"]))
        if needed:
            named = ", ".join(needed[:8]) + (" ..." if len(needed) > 8 else "")
            raise UnsupportedModelError(
                f"{len(needed)} weights of {type(model).__name__} are in no file: {named}",
                where=str(stored.folder),
                fix=f"from_pretrained would draw them at random. Give the class that was saved ({stored.config.get('architectures')}), or "
                "load with from_pretrained, train or set them, and save_pretrained.",
            )
        weights |= initialise(model, absent, work)
    return Skeleton(model=model, weights=weights)


def _classes(stored: Checkpoint) -> Iterator[Any]:
    import transformers

    names = stored.config.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is not None:
        yield kind
        return
    try:
        config = transformers.AutoConfig.from_pretrained(stored.folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} knows neither architecture {names} nor model_type {stored.config['model_type']!r}",
            where=str(stored.folder),
            fix="Install a transformers release that has it.",
        ) from error
    autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel)
    kinds = [auto._model_mapping[type(config)] for auto in autos if type(config) in auto._model_mapping]
    yield from kinds


def _load_on_meta(kind: Any, stored: Checkpoint, dtype: torch.dtype | None) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    folder = str(stored.folder)
    try:
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        # Tensors on meta made from the headers, instead of the files: from_pretrained maps those, and the kernel's read-ahead then
        # fills the page cache with weights nobody asked for (measured: 1.4 of 2.7 GB), which a memory limit counts.
        headers = {key: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for key, entry in stored.entries.items()}
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=headers,
            dtype="auto" if dtype is None else dtype,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the mismatch is reported below, with names
        )
        # What from_pretrained takes from a folder besides config and weights.
        model.config._name_or_path = model.name_or_path = folder
        if model.can_generate():
            own = (stored.folder / "generation_config.json").is_file()
            source: dict[str, Any] = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True, **source)
    except (ValueError, RuntimeError, OSError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"transformers cannot build {kind.__name__} from this folder: {error}",
            where=folder,
            fix=f"{kind.__name__}.from_pretrained must work on the folder first.",
        ) from error
    if report["mismatched_keys"]:
        name, found, wanted = sorted(report["mismatched_keys"])[0]
        raise UnsupportedModelError(
            f"{len(report['mismatched_keys'])} stored weights have another shape than the model's, first {name}: {tuple(found)} stored, "
            f"{tuple(wanted)} wanted",
            where=str(stored.folder),
            fix="config.json and the weights do not belong together.",
        )
    return model, report


def _match(model: Any, stored: Checkpoint) -> _Sources:
    """Pair stored keys with model names by the loader's own rules; same order of attempts as its loading loop."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    wanted = model.state_dict()
    sources = _Sources()
    for key, entry in stored.entries.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, wanted)
        if name not in wanted:
            continue  # unexpected keys: from_pretrained ignores them too
        same = entry.dtype == wanted[name].dtype and entry.shape == tuple(wanted[name].shape)
        if pattern is None and same:
            sources.direct[name] = entry
        else:
            sources.convert.setdefault(name, []).append(entry)
    return sources


def _convert(model: Any, groups: dict[str, list[Entry]], work: Path) -> dict[str, tuple[Path, str]]:
    """Let the loader convert these stored tensors and write them below `work`, as for a model placed on disk."""
    used = model._weight_conversions  # set by from_pretrained from the whole checkpoint; the partial loads below would shorten it
    written: dict[str, tuple[Path, str]] = {}
    for entries in _batches(groups):
        written |= _convert_some(model, entries, work)
    model._weight_conversions = used
    return written


def _batches(groups: dict[str, list[Entry]]) -> Iterator[list[Entry]]:
    """Whole groups, at most `CONVERT_BYTES` of stored tensors at a time unless one group alone is larger."""
    batch: list[Entry] = []
    for entries in groups.values():
        if batch and sum(entry.nbytes for entry in (*batch, *entries)) > CONVERT_BYTES:
            yield batch
            batch = []
        batch = [*batch, *entries]
    if batch:
        yield batch


def _convert_some(model: Any, entries: list[Entry], work: Path) -> dict[str, tuple[Path, str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    transforms: Any = get_model_conversion_mapping(model)
    settings = LoadStateDictConfig(
        device_map={"": "disk"}, disk_offload_folder=str(work), offload_buffers=True, dtype=model.dtype, weight_mapping=transforms
    )
    # Closing the files after each batch gives back the pages of them that were mapped.
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(safe_open(file, framework="pt")) for file in {entry.file for entry in entries}}
        lazy = {entry.key: files[entry.file].get_slice(entry.key) for entry in entries}
        report, written = convert_and_load_state_dict_in_model(model, lazy, settings, disk_offload_index={})
        del lazy
    if report.conversion_errors:
        name, reason = next(iter(report.conversion_errors.items()))
        raise UnsupportedModelError(f"transformers could not convert the stored weights of {name}: {reason}", where=name)
    return {name: (Path(item["safetensors_file"]), item["weight_name"]) for name, item in written.items()}


def _tie_equal_copies(model: Any, weights: dict[str, tuple[Path, str]]) -> None:
    """Tied names that are both stored: tie them if the copies are equal, else leave them apart, as from_pretrained does."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if target not in weights or source not in weights:
            continue
        if _stored_equal(weights[target], weights[source]):
            del weights[target]
            model.tie_weights(missing_keys={target}, recompute_mapping=False)
        else:
            del model.all_tied_weights_keys[target]
            warnings.warn(
                f"{target} and {source} should be tied, but the files hold different values: they are kept apart. Set "
                "tie_word_embeddings=false in config.json to say so.",
                TorchwrapWarning,
                stacklevel=4,
            )


def _stored_equal(one: tuple[Path, str], other: tuple[Path, str]) -> bool:
    with safe_open(one[0], framework="pt") as first, safe_open(other[0], framework="pt") as second:
        left, right = first.get_slice(one[1]), second.get_slice(other[1])
        shape = left.get_shape()
        if shape != right.get_shape() or left.get_dtype() != right.get_dtype():
            return False
        if not shape:
            return torch.equal(left[...], right[...])
        row = max(1, torch.Size(shape[1:]).numel() * 8)
        step = max(1, COMPARE_BYTES // row)
        return all(torch.equal(left[at : at + step], right[at : at + step]) for at in range(0, shape[0], step))


def _absent(model: nn.Module, weights: dict[str, tuple[Path, str]]) -> set[str]:
    """Names in the state dict that no file serves, neither under their own nor under a tied name."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            names.setdefault(id(tensor), []).append(name)
    return {name for group in names.values() if not any(other in weights for other in group) for name in group}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no load report: what matters in them is raised as an error with names."""
    import transformers

    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
