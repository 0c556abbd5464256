"""PairRM's format is read as it is written, and pairs are compared by its formula."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from prefix_sharing.errors import UserError
from prefix_sharing.judging import pair_ranker_judge
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR

transformers = pytest.importorskip("transformers", minversion="5.24")

HIDDEN, TASKS = 32, 3
PROMPTS = [
    [{"role": "user", "content": "How many apples are there?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why <|source|> and <|candidate1|>?"}],
]
ANSWERS = [["two", "three of them, and a pear", "", "four"], ["because " * 30, "no", "because of <|candidate2|>"]]


def make_pair_ranker(path, **kwargs):
    """A directory with the names, shapes and keys of llm-blender/PairRM-hf."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(TOKENIZER_DIR)
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
    tokenizer.add_tokens(["<|source|>", "<|candidate1|>", "<|candidate2|>"], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids("[CLS]")), ("[SEP]", ids("[SEP]"))]
    )
    tokenizer.save_pretrained(path)
    config = transformers.DebertaV2Config(
        vocab_size=2100,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=512,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=ids("[PAD]"),
        **{"source_prefix_id": ids("<|source|>"), "cand1_prefix_id": ids("<|candidate1|>")},
        **{"cand2_prefix_id": ids("<|candidate2|>"), "n_tasks": TASKS, "drop_out": 0.1},
        architectures=["DebertaV2PairRM"],
        **kwargs,
    )
    config.save_pretrained(path)
    torch.manual_seed(0)
    encoder = transformers.DebertaV2Model(config)
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    tensors = {f"pretrained_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    tensors["head_layer.1.weight"], tensors["head_layer.1.bias"] = torch.randn(HIDDEN, 2 * HIDDEN), torch.randn(HIDDEN)
    tensors["head_layer.4.weight"], tensors["head_layer.4.bias"] = torch.randn(TASKS, HIDDEN), torch.randn(TASKS)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def logit_by_hand(path, source, one, other, source_length=1224, max_length=2048):
    """What the published model computes of one pair, written out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tensors = load_file(f"{path}/model.safetensors")
    encoder = transformers.DebertaV2Model(transformers.DebertaV2Config.from_pretrained(path)).eval()
    encoder.load_state_dict(
        {name[len("pretrained_model.") :]: t for name, t in tensors.items() if name.startswith("pretrained_model.")}
    )
    parts = [tokenizer.encode("<|source|>" + source, max_length=source_length, truncation=True)]
    left = (max_length - len(parts[0])) // 2
    parts += [tokenizer.encode(p + text, max_length=left, truncation=True)
              for p, text in (("<|candidate1|>", one), ("<|candidate2|>", other))]  # fmt: skip
    # each part is [CLS] <|...|> ... [SEP]
    places = [1, len(parts[0]) + 1, len(parts[0]) + len(parts[1]) + 1]
    with torch.no_grad():
        hidden = encoder(torch.tensor([list(itertools.chain(*parts))])).last_hidden_state[0]
    scores = []
    for place in places[1:]:
        x = torch.cat([hidden[places[0]], hidden[place]])
        x = torch.tanh(tensors["head_layer.1.weight"] @ x + tensors["head_layer.1.bias"])
        scores.append(tensors["head_layer.4.weight"] @ x + tensors["head_layer.4.bias"])
    return (scores[0] - scores[1]).mean().item()


SOURCES = ["How many apples are there?", "System: Be brief.\n\nUser: Why <|source|> and <|candidate1|>?"]


@pytest.mark.parametrize("tokens_at_once", [1, 300, 16384])
def test_margins_and_wins_are_those_of_the_formula(tmp_path, tokens_at_once):
    path = make_pair_ranker(tmp_path)
    judge = pair_ranker_judge(path, tokens_at_once=tokens_at_once)
    margins, scores = judge.margins(PROMPTS, ANSWERS), judge(PROMPTS, ANSWERS)
    for source, some, of_prompt, found in zip(SOURCES, ANSWERS, margins, scores, strict=True):
        wins = np.zeros(len(some))
        for i, j in itertools.combinations(range(len(some)), 2):
            expected = logit_by_hand(path, source, some[i], some[j]) - logit_by_hand(path, source, some[j], some[i])
            assert of_prompt[i, j] == pytest.approx(expected, abs=1e-5)
            assert of_prompt[j, i] == -of_prompt[i, j]
            wins[i if expected > 0 else j] += 1
        assert found.tolist() == wins.tolist()
        assert found.dtype == np.float64


def test_long_texts_are_cut_as_published(tmp_path):
    path = make_pair_ranker(tmp_path)
    judge = pair_ranker_judge(path, source_length=20, max_length=64)
    prompt, answers = [{"role": "user", "content": "many words " * 40}], ["one " * 90, "other " * 90]
    (margins,) = judge.margins([prompt], [answers])
    a, b = (logit_by_hand(path, prompt[0]["content"], *pair, 20, 64) for pair in (answers, answers[::-1]))
    assert margins[0, 1] == pytest.approx(a - b, abs=1e-5)


def test_equal_answers_tie_and_one_alone_beats_none(tmp_path):
    path = make_pair_ranker(tmp_path)
    same, alone, none = pair_ranker_judge(path)([PROMPTS[0]] * 3, [["two", "two", "two"], ["two"], []])
    assert same.tolist() == [1.0, 1.0, 1.0]
    assert alone.tolist() == [0.0]
    assert none.tolist() == []


def test_other_directories_are_refused(tmp_path):
    path = make_pair_ranker(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("head")}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="are not those of a PairRM in the format of llm-blender/PairRM-hf.*Missing"):
        pair_ranker_judge(path)(PROMPTS, ANSWERS)
    transformers.PreTrainedTokenizerFast.from_pretrained(TOKENIZER_DIR).save_pretrained(path)
    with pytest.raises(UserError, match=r"has a tokenizer without <\|source\|>"):
        pair_ranker_judge(path)(PROMPTS, ANSWERS)
    with pytest.raises(UserError, match="'max_length': 1000 leaves no room for two answers"):
        pair_ranker_judge(path, max_length=1000)
