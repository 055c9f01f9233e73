"""A skeleton filled from the files it names is the model that from_pretrained makes of the same folder."""

from __future__ import annotations

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.integrations.tiny import CASES, Case, case
from torchwrap.core.errors import CorruptDataError, StorageError, TorchwrapWarning, UnsafePathError, UnsupportedModelError
from torchwrap.core.integration import Skeleton
from torchwrap.core.tensors import tied_groups
from torchwrap.integrations.transformers import integration


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def save(model: nn.Module, folder: Path, *, shards: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")  # type: ignore[operator]
    return folder


def fill(skeleton: Skeleton) -> Any:
    """Load every tensor from where the skeleton says it is, once per tied group."""
    model = skeleton.model
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter.is_meta
        names.setdefault(id(parameter), []).append(name)
    for group in names.values():
        file, key = next(skeleton.weights[name] for name in group if name in skeleton.weights)
        with safe_open(file, framework="pt") as handle:
            value = handle.get_tensor(key)
        expected = model.get_parameter(group[0])
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        shared = nn.Parameter(value)
        for name in group:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, shared)
    return model


def reference(row: Case, folder: Path, **options: Any) -> Any:
    import transformers

    return getattr(transformers, row.kind).from_pretrained(folder, **options)


def assert_same(model: Any, expected: Any, row: Case) -> None:
    # Copies, because they are aligned alike: matrix products differ in the last bit with the alignment of weights mapped from a file.
    with torch.no_grad():
        ours, theirs = copy.deepcopy(model)(**row.inputs())[0], copy.deepcopy(expected)(**row.inputs())[0]
    assert torch.equal(ours, theirs)
    assert type(model) is type(expected)
    state, wanted = model.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[name], wanted[name]) and state[name].dtype == wanted[name].dtype for name in wanted)
    buffers, real = dict(model.named_buffers()), dict(expected.named_buffers())
    assert buffers.keys() == real.keys()
    assert all(torch.equal(buffers[n], real[n]) and buffers[n].dtype == real[n].dtype for n in real)
    assert tied_groups(model) == tied_groups(expected)
    assert model.all_tied_weights_keys == expected.all_tied_weights_keys
    assert model.config.to_dict() == expected.config.to_dict()
    assert (model.training, model.name_or_path, model.dtype) == (False, expected.name_or_path, expected.dtype)
    assert model.config.name_or_path == expected.config.name_or_path
    if expected.can_generate():
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert model.__dict__.keys() == expected.__dict__.keys()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert repr(model._weight_conversions) == repr(expected._weight_conversions)


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("row", CASES, ids=lambda row: row.name)
def test_filled_skeleton_equals_from_pretrained(row: Case, shards: bool, tmp_path: Path, work: Path) -> None:
    folder = save(row.build(), tmp_path / "model", shards=shards)
    assert (folder / "model.safetensors.index.json").exists() == shards
    skeleton = integration.skeleton(folder, work)
    assert_same(fill(skeleton), reference(row, folder), row)
    if row.kind != "MixtralForCausalLM":
        assert list(work.iterdir()) == []
        assert all(file.parent == folder for file, _ in skeleton.weights.values())


@pytest.mark.parametrize("name", ["LlamaForCausalLM-tied", "GPT2LMHeadModel-tied", "T5ForConditionalGeneration-tied", "MixtralForCausalLM"])
def test_half_precision_checkpoints_keep_their_dtype(name: str, tmp_path: Path, work: Path) -> None:
    row = case(name)
    folder = save(row.build(torch.bfloat16), tmp_path / "model")
    assert_same(fill(integration.skeleton(folder, work)), reference(row, folder), row)


@pytest.mark.parametrize("name", ["LlamaForCausalLM-tied", "T5ForConditionalGeneration-tied", "MixtralForCausalLM", "BertModel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_dtype_asked_for_is_converted_once_into_the_work_folder(name: str, dtype: torch.dtype, tmp_path: Path, work: Path) -> None:
    """float16 checks the parts that a family keeps in float32 (T5's `wo`)."""
    if (name, dtype) == ("MixtralForCausalLM", torch.float64):
        pytest.skip("torch 2.13 has no float64 grouped matrix product, which the experts need")
    row = case(name)
    folder = save(row.build(), tmp_path / "model")
    skeleton = integration.skeleton(folder, work, dtype=dtype)
    assert any(file.parent == work for file, _ in skeleton.weights.values())
    model, expected = fill(skeleton), reference(row, folder, dtype=dtype)
    assert_same(model, expected, row)


def test_a_config_dtype_that_differs_from_the_files_is_honoured(tmp_path: Path, work: Path) -> None:
    row = case("LlamaForCausalLM")
    folder = save(row.build(), tmp_path / "model")
    edit(folder, dtype="bfloat16")
    model = fill(integration.skeleton(folder, work))
    assert model.dtype == torch.bfloat16
    assert_same(model, reference(row, folder), row)


def test_without_a_config_dtype_the_files_decide(tmp_path: Path, work: Path) -> None:
    row = case("LlamaForCausalLM")
    folder = save(row.build(torch.bfloat16), tmp_path / "model")
    edit(folder, dtype=None)
    assert_same(fill(integration.skeleton(folder, work)), reference(row, folder), row)


def test_fused_experts_are_written_once_and_the_rest_is_adopted_in_place(tmp_path: Path, work: Path) -> None:
    row = case("MixtralForCausalLM")
    folder = save(row.build(), tmp_path / "model", shards=True)
    skeleton = integration.skeleton(folder, work)
    written = {name for name, (file, _) in skeleton.weights.items() if file.parent == work}
    assert written == {f"model.layers.{i}.mlp.experts.{part}" for i in range(3) for part in ("gate_up_proj", "down_proj")}
    assert len(list(work.iterdir())) == len(written)


def test_conversion_in_many_batches_gives_the_same_model(tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchwrap.integrations.transformers import skeleton as module

    row = case("MixtralForCausalLM")
    folder = save(row.build(), tmp_path / "model", shards=True)
    sizes: list[int] = []
    convert = module._convert_some

    def count(model: Any, entries: Any, work: Path) -> Any:
        sizes.append(sum(entry.nbytes for entry in entries))
        return convert(model, entries, work)

    monkeypatch.setattr(module, "_convert_some", count)
    monkeypatch.setattr(module, "CONVERT_BYTES", 100_000)
    skeleton = integration.skeleton(folder, work)
    assert len(sizes) > 1 and max(sizes) <= 100_000
    assert_same(fill(skeleton), reference(row, folder), row)


@pytest.mark.parametrize(
    ("saved", "opened"),
    [
        ("LlamaModel", "LlamaForCausalLM"),
        ("LlamaForCausalLM-tied", "LlamaModel"),
        ("GPT2Model", "GPT2LMHeadModel"),
        ("GPT2LMHeadModel-tied", "GPT2Model"),
        ("T5ForConditionalGeneration-tied", "T5EncoderModel"),
    ],
)
def test_base_checkpoints_open_as_heads_and_back(saved: str, opened: str, tmp_path: Path, work: Path) -> None:
    row = case(saved)
    folder = save(row.build(), tmp_path / "model")
    edit(folder, architectures=[opened], tie_word_embeddings=True)
    other = Case(opened, row.config, row.arguments, "text" if opened == "T5EncoderModel" else row.input)
    assert_same(fill(integration.skeleton(folder, work)), reference(other, folder), other)


def test_weights_that_no_file_holds_are_refused_by_name(tmp_path: Path, work: Path) -> None:
    folder = save(case("LlamaModel").build(), tmp_path / "model")
    edit(folder, architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight"):
        integration.skeleton(folder, work)


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_a_tied_head_stored_twice_is_tied_only_if_the_copies_agree(equal: bool, tmp_path: Path, work: Path) -> None:
    row = case("LlamaForCausalLM-tied")
    folder = save(row.build(), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone() + (0 if equal else 1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if equal:
        skeleton = integration.skeleton(folder, work)
    else:
        with pytest.warns(TorchwrapWarning, match="tie_word_embeddings"):
            skeleton = integration.skeleton(folder, work)
    assert_same(fill(skeleton), reference(row, folder), row)


def test_persistent_buffers_are_located_and_real(tmp_path: Path, work: Path) -> None:
    from transformers import BartForConditionalGeneration

    row = case("BartForConditionalGeneration-tied")
    source = row.build()
    source.final_logits_bias.normal_()  # type: ignore[operator,union-attr]
    folder = save(source, tmp_path / "model")
    skeleton = integration.skeleton(folder, work)
    assert "final_logits_bias" in skeleton.weights
    expected = BartForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(skeleton.model.final_logits_bias, expected.final_logits_bias)  # type: ignore[arg-type]


def test_a_buffer_that_may_be_absent_is_initialised(tmp_path: Path, work: Path) -> None:
    row = case("BartForConditionalGeneration-tied")
    folder = save(row.build(), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    del state["final_logits_bias"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(fill(integration.skeleton(folder, work)), reference(row, folder), row)


def test_a_parameter_that_may_be_absent_is_computed_and_written(tmp_path: Path, work: Path) -> None:
    from transformers import MarianConfig

    sizes = dict(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, pad_token_id=0)
    row = Case("MarianMTModel", MarianConfig.__name__, {**sizes, **heads, "decoder_start_token_id": 0}, "seq2seq")
    folder = save(row.build(), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    for part in ("encoder", "decoder"):
        state.pop(f"model.{part}.embed_positions.weight", None)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    skeleton = integration.skeleton(folder, work)
    assert skeleton.weights["model.encoder.embed_positions.weight"][0].parent == work
    assert_same(fill(skeleton), reference(row, folder), row)


def test_a_checkpoint_without_architectures_opens_as_a_class_that_fits(tmp_path: Path, work: Path) -> None:
    for name, kind in (("LlamaForCausalLM-tied", "LlamaForCausalLM"), ("BertModel", "BertModel")):
        folder = save(case(name).build(), tmp_path / name)
        edit(folder, architectures=None)
        assert type(integration.skeleton(folder, work).model).__name__ == kind


def test_random_state_stays(tmp_path: Path, work: Path) -> None:
    folder = save(case("BertModel").build(), tmp_path / "model")
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    integration.skeleton(folder, work)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == numpy.random.get_state()[1]).all()


def test_default_dtype_and_progress_bars_stay(tmp_path: Path, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    folder = save(case("BertModel").build(torch.bfloat16), tmp_path / "model")
    before = torch.get_default_dtype(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    integration.skeleton(folder, work)
    assert capfd.readouterr() == ("", "")
    assert before == (torch.get_default_dtype(), logging.get_verbosity(), logging.is_progress_bar_enabled())


def test_no_weight_is_read(tmp_path: Path, work: Path) -> None:
    """Headers are enough: the weights' bytes may be missing pages of a sparse file of any size."""
    row = case("LlamaForCausalLM")
    folder = save(row.build(), tmp_path / "model")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(integration.skeleton(folder, work).weights) == set(row.build().state_dict())


# --- what cannot be opened -------------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save(case("LlamaForCausalLM").build(), tmp_path / "model", shards=True)


def test_a_missing_shard_is_named(sharded: Path, work: Path) -> None:
    gone = sorted(sharded.glob("*-of-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(StorageError, match=gone.name):
        integration.skeleton(sharded, work)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors"])
def test_an_index_that_points_out_of_the_folder_is_refused(name: str, sharded: Path, work: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(UnsafePathError, match=r"x\.safetensors"):
        integration.skeleton(sharded, work)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_a_typed_error(content: str, sharded: Path, work: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(StorageError):
        integration.skeleton(sharded, work)


def test_a_truncated_file_is_corrupt_data(tmp_path: Path, work: Path) -> None:
    folder = save(case("LlamaForCausalLM").build(), tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptDataError, match=r"model\.safetensors"):
        integration.skeleton(folder, work)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "trust_remote_code"),
        ({"architectures": ["NoSuchModel"], "model_type": "no_such_family"}, "no_such_family"),
        ({"hidden_size": 40}, "lm_head"),
        ({"transformers_weights": "../model.safetensors"}, "leaves the folder"),
    ],
    ids=["quantised", "remote-code", "unknown", "other-shapes", "outside"],
)
def test_unopenable_configs_are_refused_with_the_reason(change: dict[str, Any], said: str, tmp_path: Path, work: Path) -> None:
    folder = save(case("LlamaForCausalLM").build(), tmp_path / "model")
    edit(folder, **change)
    with pytest.raises((UnsupportedModelError, UnsafePathError), match=said):
        integration.skeleton(folder, work)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-q4.gguf"])
def test_other_formats_are_refused_with_the_way_out(name: str, tmp_path: Path, work: Path) -> None:
    folder = save(case("LlamaForCausalLM").build(), tmp_path / "model")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UnsupportedModelError, match=name) as caught:
        integration.skeleton(folder, work)
    assert "save_pretrained" in str(caught.value)


def test_an_adapter_folder_is_refused(tmp_path: Path, work: Path) -> None:
    folder = save(case("LlamaForCausalLM").build(), tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        integration.skeleton(folder, work)


def test_opens_folders_of_transformers_only(tmp_path: Path) -> None:
    folder = save(case("LlamaModel").build(), tmp_path / "model")
    assert integration.opens(folder)
    assert not integration.opens(tmp_path)
    assert not integration.opens(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    assert not integration.opens(tmp_path)


def test_source_is_the_folder_a_model_came_from(tmp_path: Path, work: Path) -> None:
    row = case("LlamaModel")
    folder = save(row.build(), tmp_path / "model")
    assert integration.source(integration.skeleton(folder, work).model) == folder.resolve()
    assert integration.source(reference(row, folder)) == folder.resolve()
    assert integration.source(row.build()) is None
