"""A checkpoint folder run without its weights ever being in memory at once."""

from __future__ import annotations

import sys
from tempfile import TemporaryDirectory

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import torchwrap as tw

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=8, n_head=4, vocab_size=512, n_positions=64)).eval()
prompt = torch.tensor([[1, 2, 3]])
plain = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)

with TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    del model

    streamed = tw.offload.from_pretrained(folder, device_memory="2MiB")
    wrapped = streamed.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    stats = tw.handle_of(streamed, "offload").stats()
    print(f"{stats['total_bytes']:,} bytes of weights, at most {stats['held_bytes']:,} in memory, {stats['bytes_read']:,} read")
    del streamed

equal = torch.equal(plain, wrapped)
print(f"outputs equal: {equal}")
sys.exit(not equal)
