"""TRL's DPOTrainer with the weights of a model of torchtune or transformers.

It takes ``pip install 'torchtune-prefix-sharing[bench]'``. The trainer is TRL's own, with a transformers model, and
reference log-probs computed beforehand. The benchmark calls the trainer's collator and its ``compute_loss``.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torchtune.models.convert_weights import tune_to_hf
from torchtune.modules import TiedLinear, TransformerDecoder
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from prefix_sharing.trees import Response


class TRLModel:
    """Pairs by TRL's trainer.

    Args:
        plain (TransformerDecoder | PreTrainedModel): a model as transformers builds it, or as torchtune does, of the
            Llama architecture; its weights are copied.
        device (torch.device): where it runs.
        beta (float): of the DPO loss.

    Attributes:
        model (torch.nn.Module): the trainer's model.
    """

    def __init__(self, plain: TransformerDecoder | PreTrainedModel, device: torch.device, beta: float) -> None:
        model = copy.deepcopy(plain) if isinstance(plain, PreTrainedModel) else _as_transformers_model(plain)
        self._trainer = _build_trainer(model, device, beta)
        self._collate: Callable[..., dict[str, torch.Tensor]] = self._trainer.data_collator
        self.model: nn.Module = self._trainer.model_wrapped

    def batch(self, pairs: Sequence[Sequence[Response]]) -> dict[str, torch.Tensor]:
        """A micro-batch by TRL's collator."""
        examples = []
        for chosen, rejected in pairs:
            prompt = int(chosen.scored.argmax())
            examples.append(
                {
                    "prompt_ids": chosen.tokens[:prompt].tolist(),
                    "chosen_ids": chosen.tokens[prompt:].tolist(),
                    "rejected_ids": rejected.tokens[prompt:].tolist(),
                }
            )
        return self._collate(examples)

    def log_probs(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probs of chosen and rejected, shape ``[P, 2]``."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        output = self.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels, fused_lm_head=True
        )
        return output.log_probs.sum(1).view(2, -1).T

    def loss(self, inputs: dict[str, torch.Tensor], reference: torch.Tensor) -> torch.Tensor:
        """The sum of TRL's DPO loss over pairs, given reference log-probs of shape ``[P, 2]``."""
        chosen, rejected = reference.unbind(1)
        inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return self._trainer.compute_loss(self.model, inputs) * len(reference)


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


def _build_trainer(model: PreTrainedModel, device: torch.device, beta: float) -> DPOTrainer:
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
        router_aux_loss_coef=0.0,
        per_device_train_batch_size=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=device.type == "cpu",
        report_to=[],
        disable_tqdm=True,
    )
    return DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
