"""A chat model under 40 % of its memory, compared with itself."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torchwrap as tw
from torchwrap.core.tensors import tensor_bytes
from torchwrap.demo.weights import smollm2

folder = smollm2()
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
question = [{"role": "user", "content": "Name three colours."}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)

plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)

full = sum(map(tensor_bytes, model.parameters()))
tw.offload(model, device_memory=int(0.4 * full))
wrapped = model.generate(**inputs, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(wrapped[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(tw.handle_of(model, "offload").explain())
tw.unwrap(model)

equal = torch.equal(plain, wrapped)
print(f"outputs equal: {equal}")
sys.exit(not equal)
