"""transformers' LlamaForCausalLM in torch, or its Qwen3MoeForCausalLM: `torch_step.py eager|compile|moe`."""

import sys

import numpy as np
import torch
from timing import serve
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.set_num_threads(2)
torch.manual_seed(0)
shape = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attn_implementation": "sdpa",
    "use_cache": False,
}
if sys.argv[1] == "moe":
    experts = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "norm_topk_prob": True}
    heads = {"num_key_value_heads": 4, "head_dim": 32}
    balance = {"output_router_logits": True, "router_aux_loss_coef": 0.001}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape | heads, **experts, **balance))
else:
    model = LlamaForCausalLM(LlamaConfig(**shape))
run = torch.compile(model) if sys.argv[1] == "compile" else model
matrices = [p for p in model.parameters() if p.ndim > 1]
rest = [p for p in model.parameters() if p.ndim < 2]
groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 1024, (4, 257)))
inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def step() -> float:
    """Forward, backward, clip, AdamW; the loss."""
    optimizer.zero_grad()
    loss = run(input_ids=inputs, labels=inputs, shift_labels=targets).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


serve(step)
