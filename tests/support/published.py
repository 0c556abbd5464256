"""The ``config.json`` of published models, as far as it says what is computed."""

_LLAMA2 = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
_LLAMA3 = _LLAMA2 | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_LLAMA31_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA31 = _LLAMA3 | {"rope_scaling": _LLAMA31_SCALING}
_LLAMA32 = _LLAMA31 | {
    "intermediate_size": 8192,
    "rope_scaling": _LLAMA31_SCALING | {"factor": 32.0},
    "tie_word_embeddings": True,
}
_MISTRAL = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_PHI3 = {
    "model_type": "phi3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
_GEMMA = {
    "model_type": "gemma",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
_GEMMA2 = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
_QWEN2 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_QWEN2_05B = _QWEN2 | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
_QWEN2_15B = _QWEN2_05B | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
}

PUBLISHED = {
    "Llama-2-7b": _LLAMA2,
    "Llama-2-13b": _LLAMA2 | _13B | {"num_key_value_heads": 40},
    "Llama-2-70b": _LLAMA2 | _70B | {"num_key_value_heads": 8},
    "CodeLlama-7b": _LLAMA2 | {"rope_theta": 1000000, "vocab_size": 32016},
    "CodeLlama-13b": _LLAMA2 | _13B | {"num_key_value_heads": 40, "rope_theta": 1000000, "vocab_size": 32016},
    "Llama-3-8B": _LLAMA3,
    "Llama-3-70B": _LLAMA3 | _70B,
    "Llama-3.1-8B": _LLAMA31,
    "Llama-3.1-70B": _LLAMA31 | _70B,
    "Llama-3.3-70B": _LLAMA31 | _70B | {"head_dim": 128},
    "Llama-3.2-1B": _LLAMA32 | {"head_dim": 64, "hidden_size": 2048, "num_hidden_layers": 16},
    "Llama-3.2-3B": _LLAMA32
    | {"head_dim": 128, "hidden_size": 3072, "num_attention_heads": 24, "num_hidden_layers": 28},
    "SmolLM2-135M": _LLAMA2
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "Mistral-7B-v0.1": _MISTRAL,
    "Phi-3-mini-4k": _PHI3,
    "phi-4": _PHI3
    | {
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384,
        "rope_theta": 250000,
        "sliding_window": None,
        "vocab_size": 100352,
    },
    "gemma-2b": _GEMMA,
    "gemma-7b": _GEMMA
    | {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 16,
    },
    "gemma-2-2b": _GEMMA2,
    "gemma-2-9b": _GEMMA2
    | {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
    },
    "gemma-2-27b": _GEMMA2
    | {
        "head_dim": 128,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
    },
    "Qwen2-7B": _QWEN2,
    "Qwen2-0.5B": _QWEN2_05B,
    "Qwen2-1.5B": _QWEN2_15B,
    "Qwen2.5-0.5B": _QWEN2_05B,
    "Qwen2.5-1.5B": _QWEN2_15B,
    "Qwen2.5-3B": _QWEN2_15B
    | {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_hidden_layers": 36},
    "Qwen2.5-7B": _QWEN2,
    "Qwen2.5-14B": _QWEN2
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "max_window_layers": 48,
        "num_attention_heads": 40,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
    },
}

FIXED_BUILDERS = {
    "llama2.llama2_7b": "Llama-2-7b",
    "llama2.llama2_13b": "Llama-2-13b",
    "llama2.llama2_70b": "Llama-2-70b",
    "code_llama2.code_llama2_7b": "CodeLlama-7b",
    "code_llama2.code_llama2_13b": "CodeLlama-13b",
    "llama3.llama3_8b": "Llama-3-8B",
    "llama3.llama3_70b": "Llama-3-70B",
    "llama3_1.llama3_1_8b": "Llama-3.1-8B",
    "llama3_1.llama3_1_70b": "Llama-3.1-70B",
    "llama3_2.llama3_2_1b": "Llama-3.2-1B",
    "llama3_2.llama3_2_3b": "Llama-3.2-3B",
    "llama3_3.llama3_3_70b": "Llama-3.3-70B",
    "mistral.mistral_7b": "Mistral-7B-v0.1",
    "phi3.phi3_mini": "Phi-3-mini-4k",
    "gemma.gemma_2b": "gemma-2b",
    "gemma.gemma_7b": "gemma-7b",
    "gemma2.gemma2_2b": "gemma-2-2b",
    "gemma2.gemma2_9b": "gemma-2-9b",
    "gemma2.gemma2_27b": "gemma-2-27b",
    "qwen2.qwen2_7b": "Qwen2-7B",
    "qwen2.qwen2_0_5b": "Qwen2-0.5B",
    "qwen2.qwen2_1_5b": "Qwen2-1.5B",
    "qwen2_5.qwen2_5_0_5b": "Qwen2.5-0.5B",
    "qwen2_5.qwen2_5_1_5b_base": "Qwen2.5-1.5B",
    "qwen2_5.qwen2_5_1_5b_instruct": "Qwen2.5-1.5B",
    "qwen2_5.qwen2_5_3b": "Qwen2.5-3B",
    "qwen2_5.qwen2_5_7b_base": "Qwen2.5-7B",
    "qwen2_5.qwen2_5_7b_instruct": "Qwen2.5-7B",
    "qwen2_5.qwen2_5_14b_base": "Qwen2.5-14B",
}
"""torchtune's builders without dimensions, below ``torchtune.models``, with the model they are of."""

CONFIGS = {
    "gemma2/2B": "gemma-2-2b",
    "gemma2/9B": "gemma-2-9b",
    "llama3_1/8B": "Llama-3.1-8B",
    "llama3_1/70B": "Llama-3.1-70B",
    "llama3_2/1B": "Llama-3.2-1B",
    "llama3_2/3B": "Llama-3.2-3B",
    "mistral/7B": "Mistral-7B-v0.1",
    "phi4/14B": "phi-4",
    "qwen2_5/0.5B": "Qwen2.5-0.5B",
    "qwen2_5/1.5B": "Qwen2.5-1.5B",
    "qwen2_5/7B": "Qwen2.5-7B",
    "smollm2/135M": "SmolLM2-135M",
}
"""The project's configs of published models, as their names begin."""


def as_transformers_5_writes_it(hf_config):
    """The same with all that concerns rotation in ``rope_parameters``."""
    rest = {key: value for key, value in hf_config.items() if key not in ("rope_theta", "rope_scaling")}
    scaling = hf_config.get("rope_scaling") or {}
    rope = {"rope_theta": hf_config.get("rope_theta", 10000.0), "rope_type": scaling.get("type", "default")}
    return rest | {"rope_parameters": rope | scaling}
