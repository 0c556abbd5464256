"""TRL's DPOTrainer as a format of the benchmark: ``pip install 'torchtune-prefix-sharing[bench]'``.

The trainer is TRL's own, with a transformers model that has the benchmark's weights, and reference log-probs computed
beforehand. A step calls the trainer's collator and its ``compute_loss``; backward pass, clipping and AdamW are those of
the other formats.
"""

import tempfile

import torch
from tokenizers.models import WordLevel
from torchtune.models.convert_weights import tune_to_hf
from torchtune.modules import TiedLinear, TransformerDecoder
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from datasets import Dataset
from prefix_sharing.benchmark.formats import Format, MicroBatch, Pairs, flops_of_padded, in_batches
from tokenizers import Tokenizer


def build_trl_format(plain: TransformerDecoder, device: torch.device, *, batch_size: int, beta: float) -> Format:
    """TRL's path.

    Args:
        plain (TransformerDecoder): a model of the Llama architecture as torchtune builds it, whose weights are copied.
        device (torch.device): where it runs.
        batch_size (int): pairs a micro-batch.
        beta (float): of the DPO loss.

    Returns:
        Format: over a model of its own.
    """
    model = _as_transformers_model(plain).to(device)
    trainer = _build_trainer(model, device, beta)

    def micro_batches(pairs: Pairs) -> list[MicroBatch]:
        made = []
        for indices in in_batches(len(pairs), batch_size):
            examples = []
            for chosen, rejected in (pairs[i] for i in indices):
                prompt = int(chosen.scored.argmax())
                examples.append(
                    {
                        "prompt_ids": chosen.tokens[:prompt].tolist(),
                        "chosen_ids": chosen.tokens[prompt:].tolist(),
                        "rejected_ids": rejected.tokens[prompt:].tolist(),
                    }
                )
            inputs = {name: tensor.to(device) for name, tensor in trainer.data_collator(examples).items()}
            sequences, length = inputs["input_ids"].shape
            # Its output projection is computed for the tokens of responses only.
            num_projected = int(inputs["completion_mask"].sum())
            not_projected = 6.0 * plain.tok_embeddings.weight.numel() * (sequences * length - num_projected)
            flops = flops_of_padded(plain, sequences, length) - not_projected
            num_tokens = int(inputs["attention_mask"].sum())
            made.append(MicroBatch(indices, inputs, num_tokens, sequences * length, flops))
        return made

    def log_probs(batch: MicroBatch) -> torch.Tensor:
        labels = batch.inputs["input_ids"].masked_fill(batch.inputs["completion_mask"] == 0, -100)
        output = trainer.model(
            input_ids=batch.inputs["input_ids"],
            attention_mask=batch.inputs["attention_mask"],
            labels=labels,
            fused_lm_head=True,
        )
        return output.log_probs.sum(1).view(2, -1).T

    def loss(batch: MicroBatch, reference: torch.Tensor) -> torch.Tensor:
        chosen, rejected = reference[batch.pairs].unbind(1)
        inputs = {**batch.inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return trainer.compute_loss(trainer.model, inputs) * len(batch.pairs)

    return Format("trl", trainer.model, micro_batches, log_probs, loss)


def _as_transformers_model(plain: TransformerDecoder) -> LlamaForCausalLM:
    attn, mlp = plain.layers[0].attn, plain.layers[0].mlp
    config = LlamaConfig(
        vocab_size=plain.tok_embeddings.num_embeddings,
        hidden_size=plain.tok_embeddings.embedding_dim,
        intermediate_size=mlp.w1.out_features,
        num_hidden_layers=len(plain.layers),
        num_attention_heads=attn.num_heads,
        num_key_value_heads=attn.num_kv_heads,
        head_dim=attn.head_dim,
        max_position_embeddings=plain.max_seq_len,
        rms_norm_eps=plain.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(attn.pos_embeddings.base)},
        tie_word_embeddings=isinstance(plain.output, TiedLinear),
    )
    model = LlamaForCausalLM(config)
    weights = tune_to_hf(
        plain.state_dict(),
        num_heads=attn.num_heads,
        num_kv_heads=attn.num_kv_heads,
        dim=config.hidden_size,
        head_dim=attn.head_dim,
    )
    missing, unexpected = model.load_state_dict({k: v.clone() for k, v in weights.items()}, strict=False)
    # A tied output projection is in neither list of torchtune's weights.
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model


def _build_trainer(model: LlamaForCausalLM, device: torch.device, beta: float) -> DPOTrainer:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
    )
    # The trainer has to be built with a data set. The benchmark hands its pairs to the collator itself.
    dataset = Dataset.from_list([{"prompt": "a", "chosen": "ab", "rejected": "ac"}])
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        beta=beta,
        max_length=None,
        precompute_ref_log_probs=True,
        per_device_train_batch_size=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=device.type == "cpu",
        report_to=[],
        disable_tqdm=True,
    )
    return DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
