"""What a run writes, read by transformers and PEFT, for families whose checkpoints are converted in different ways."""

import pytest
import torch

from prefix_sharing.quickstart import preference_pairs, tokenizer
from runs import evaluated_log_probs, run_in_process, transformers_log_probs

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

DIMS = {"vocab_size": 2048, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "max_seq_len": 512}
ADAPTER = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}
HF_DIMS = {
    "vocab_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "max_position_embeddings": 512,
}

FAMILIES = {
    "llama3": (
        lambda: transformers.LlamaConfig(
            **HF_DIMS, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, rms_norm_eps=1e-5
        ),
        {"_component_": "torchtune.models.llama3.lora_llama3", "intermediate_dim": 160},
        "LLAMA3",
    ),
    "qwen2": (
        lambda: transformers.Qwen2Config(
            **HF_DIMS, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, rms_norm_eps=1e-5
        ),
        {"_component_": "torchtune.models.qwen2.lora_qwen2", "intermediate_dim": 160},
        "QWEN2",
    ),
    "gemma2": (
        # torchtune caps what comes out of the last norm where Gemma 2 caps logits: here neither does.
        lambda: transformers.Gemma2Config(
            **HF_DIMS, head_dim=16, sliding_window=48, query_pre_attn_scalar=16, final_logit_softcapping=None
        ),
        {
            "_component_": "torchtune.models.gemma2.lora_gemma2",
            "intermediate_dim": 160,
            "head_dim": 16,
            "sliding_window_size": 48,
            "query_pre_attn_scalar": 16,
            "final_capping_value": 1e4,
        },
        "GEMMA2",
    ),
}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_written_for_peft_compute_what_was_trained(tmp_path, monkeypatch, family, use_dora):
    hf_config, model, model_type = FAMILIES[family]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(hf_config(), attn_implementation="eager")
    base.save_pretrained(tmp_path / "base")
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(tmp_path / "base"),
        "checkpoint_files": ["model.safetensors"],
        "model_type": model_type,
        "output_dir": str(tmp_path),
    }
    run_in_process(
        tmp_path,
        model=DIMS | ADAPTER | model | {"use_dora": use_dora},
        checkpointer=checkpointer,
        lr_scheduler=None,
        **{"optimizer.lr": 1e-2},
    )
    held_out = preference_pairs(tokenizer(), num_pairs=16, seed=1)
    base.eval()
    before, after = (evaluated_log_probs(tmp_path, when) for when in ("before", "after"))
    assert before == pytest.approx(transformers_log_probs(base, held_out), abs=1e-3)
    assert abs(after - before).max() > 0.1
    # It would refuse torchtune's torchao, of which nothing here makes use.
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "epoch_0"))
    assert after == pytest.approx(transformers_log_probs(adapted, held_out), abs=1e-3)
