"""The memory predicted for a forward is what a forward takes: counted tensor by tensor, and by the peak of a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.integrations.tiny import CASES, Case, case
from torchwrap.integrations.transformers import integration
from torchwrap.integrations.transformers.memory import FIRST_FORWARD_BYTES

ROOT = Path(__file__).parents[2]


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside the block that live at the same time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive and storage.data_ptr() not in self.known:
                    self.alive.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        return result

    def _gone(self, key: int, nbytes: int) -> None:
        self.alive.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize("row", CASES, ids=lambda row: row.name)
def test_every_family_has_a_prediction_that_grows_with_batch_and_tokens(row: Case) -> None:
    model = row.build()
    small, batched = (integration.activation_bytes(model, batch=batch, tokens=8) for batch in (1, 4))
    assert small is not None and batched is not None
    assert FIRST_FORWARD_BYTES < small < batched
    if row.input != "image":
        longer = integration.activation_bytes(model, batch=1, tokens=32)
        assert longer is not None and longer > small


def test_frames_of_sound_count_whatever_the_tokens() -> None:
    """Whisper's encoder takes as many as its configuration says, and no others."""
    transformers = pytest.importorskip("transformers")
    width, layers, found = 256, 3, []
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    for frames in (100, 1100):
        config = transformers.WhisperConfig(d_model=width, decoder_layers=layers, max_source_positions=frames, pad_token_id=0, **heads)
        with torch.device("meta"):
            model = transformers.WhisperForConditionalGeneration(config)
        found.append(integration.activation_bytes(model, batch=2, tokens=4) or 0)
    # The stream, a block's copies of it, and keys and values for the decoder's layers.
    assert found[1] - found[0] > 2 * 1000 * width * 4 * (2 + 6 + 2 * layers)


def grown(name: str, **sizes: Any) -> nn.Module:
    """The case with widths at which blocks, cache and logits all count."""
    row = case(name)
    return Case(row.kind, row.config, {**row.arguments, **sizes}, row.input, extra=row.extra).build()


_WIDE = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, max_position_embeddings=512)

GROWN: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: grown("LlamaForCausalLM", **_WIDE, vocab_size=2000),
    "llama-small-vocabulary": lambda: grown("LlamaForCausalLM", **_WIDE),
    "gemma2-softcapped": lambda: grown("Gemma2ForCausalLM-tied", **_WIDE, vocab_size=2000),
    "gpt2": lambda: grown("GPT2LMHeadModel-tied", n_embd=128, n_positions=512, vocab_size=2000),
    "falcon-one-key-head": lambda: grown("FalconForCausalLM-tied", hidden_size=128, vocab_size=2000),
    "mixtral": lambda: grown("MixtralForCausalLM", **_WIDE, vocab_size=2000),
    "bert": lambda: grown("BertForMaskedLM-tied", **_WIDE, vocab_size=2000),
    "t5": lambda: grown("T5ForConditionalGeneration-tied", d_model=128, d_ff=512, d_kv=32, vocab_size=2000),
    "vit": lambda: grown("ViTForImageClassification", hidden_size=128, intermediate_size=512, image_size=64, patch_size=8),
}


@pytest.mark.parametrize("name", GROWN)
def test_prediction_covers_the_tensors_alive_at_once(name: str) -> None:
    """Never below what is counted; at most 2.5 times it, the rest being what the allocator keeps of finished blocks."""
    model, batch, tokens = GROWN[name](), 2, 256
    ids = torch.randint(3, 90, (batch, tokens))
    inputs: dict[str, Any] = {"input_ids": ids}
    if name == "t5":
        inputs["decoder_input_ids"] = ids
    if name == "vit":
        inputs = {"pixel_values": torch.randn(batch, 3, 64, 64)}
    counter = PeakBytes(model)
    with torch.no_grad(), counter:
        model(**inputs)
    predicted = integration.activation_bytes(model, batch=batch, tokens=tokens)
    assert predicted is not None
    assert counter.peak <= predicted - FIRST_FORWARD_BYTES <= 2.5 * counter.peak


_SCRIPT = """
import json, sys
from tests import torchvision_ops
torchvision_ops.ensure()
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from torchwrap.integrations.transformers import integration

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

torch.set_default_dtype(getattr(torch, sys.argv[1]))
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=8, vocab_size=32000))
model = model.to_empty(device="cpu").eval()
for tensor in (*model.parameters(), *model.buffers()):
    tensor.data.fill_(0.01)
before = kilobytes("VmRSS")
with torch.no_grad():
    model(torch.arange(128)[None])
print(json.dumps({"before": before * 1024, "peak": kilobytes("VmHWM") * 1024,
                  "predicted": integration.activation_bytes(model, batch=1, tokens=128)}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_a_fresh_process_is_predicted_within_ten_percent(dtype: str) -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT, dtype], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    expected = figures["before"] + figures["predicted"]
    assert abs(expected - figures["peak"]) <= 0.10 * figures["peak"]
    # The forward's own share is a small part of the process; it must not be far off either.
    assert 0.6 <= figures["predicted"] / (figures["peak"] - figures["before"]) <= 1.8
