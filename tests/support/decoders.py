"""Small decoders of transformers with random weights, and the plain computation that their trees are compared with."""

import numpy as np
import torch

from prefix_sharing.trees import Response

DIMS = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WITH_HEAD_DIM = DIMS | {"head_dim": 16}  # more in all than hidden_size
WINDOW = {"sliding_window": 24}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
DENSE = {
    "llama": WITH_HEAD_DIM,
    "qwen2": DIMS | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": WITH_HEAD_DIM,
    "gemma": WITH_HEAD_DIM,
    "gemma2": WITH_HEAD_DIM | WINDOW,
    "gemma3_text": WITH_HEAD_DIM | WINDOW,
    "smollm3": DIMS,
    "olmo": DIMS,
    "olmo2": DIMS,
    "olmo3": DIMS | WINDOW,
    "mistral": WITH_HEAD_DIM | WINDOW,
    "ministral": WITH_HEAD_DIM | WINDOW,
    "phi": DIMS,
    "phi3": DIMS,
    "granite": DIMS | {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "glm": WITH_HEAD_DIM,
    "glm4": WITH_HEAD_DIM,
    "cohere": DIMS,
    "cohere2": WITH_HEAD_DIM | WINDOW,
    "exaone4": WITH_HEAD_DIM | WINDOW,
    "starcoder2": DIMS,
    "helium": DIMS | {"head_dim": 12},
    "ernie4_5": DIMS,
    "hunyuan_v1_dense": WITH_HEAD_DIM,
    "gpt_neox": DIMS | {"num_key_value_heads": 4},  # has no groups
}
SPARSE = {
    "qwen3_moe": WITH_HEAD_DIM | EXPERTS,
    "mixtral": DIMS | {"num_local_experts": 4},
    "deepseek_v3": DIMS | MLA,
    "olmoe": DIMS | EXPERTS,
}


def build(name, **kwargs):
    import transformers

    config = transformers.AutoConfig.for_model(name, **(DENSE | SPARSE)[name] | kwargs)
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in plain.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return plain if name in SPARSE else plain.double()


def make_examples():
    rng = np.random.default_rng(0)
    examples = []
    for num_responses in (2, 4, 3):
        prefix = rng.integers(3, 97, rng.integers(20, 50))
        examples.append([])
        for _ in range(num_responses):
            tokens = np.concatenate([prefix, rng.integers(3, 97, rng.integers(3, 20))])
            examples[-1].append(Response(tokens, np.arange(len(tokens)) >= len(prefix)))
    return examples


def plain_log_probs(plain, examples):
    found = torch.zeros(len(examples), max(map(len, examples)), dtype=next(plain.parameters()).dtype)
    for e, example in enumerate(examples):
        for k, response in enumerate(example):
            tokens = torch.from_numpy(response.tokens)[None]
            log_probs = plain(input_ids=tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
            of_targets = log_probs.gather(1, tokens[0, 1:, None])[:, 0]
            found[e, k] = of_targets[torch.from_numpy(response.scored[1:])].sum()
    return found
