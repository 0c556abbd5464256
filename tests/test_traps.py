"""One test for each mistake that others made in public, named after what must stay true."""

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from plain import FAMILIES, plain_log_probs, response
from prefix_sharing import scoring
from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.hosts import load_checkpoint, to_tree_model
from prefix_sharing.losses import DPOLoss, ORPOLoss, SimPOLoss
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.trees import PrefixTree, Row, RowOptions
from runs import eval_log, losses, run_in_process, training_log


def plain_and_tree(family="llama3"):
    plain, tree = FAMILIES[family](), FAMILIES[family]()
    tree.load_state_dict(plain.state_dict())
    return plain, to_tree_model(tree, "chains")


def build(tmp_path, rows, **kwargs):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prefix_preference_dataset(tokenizer(), source="json", data_files=str(file), **kwargs)


def test_the_first_token_of_an_answer_counts():
    # fw-ai/cookbook 388: its predictor is in the prompt, so it was dropped, and one-token answers had no margin
    plain, tree = plain_and_tree()
    example = [response([1, 2, 3, answer], [0, 0, 0, 1]) for answer in (4, 5)]
    output = tree(Row.from_examples([example]))
    assert output.num_scored.tolist() == [[1, 1]]
    torch.testing.assert_close(output.log_probs[0], plain_log_probs(plain, example))
    assert output.log_probs[0, 0] != output.log_probs[0, 1]


@pytest.mark.parametrize("loss", [DPOLoss(), SimPOLoss(), ORPOLoss()])
def test_answers_cut_away_or_empty_or_alike_after_truncation_never_reach_the_loss(tmp_path, loss):
    # TRL 3382, 5826, 6548: NaN; OpenRLHF 1311: identical pairs kept
    rows = [
        {"prompt": "q", "chosen": "bread", "rejected": "boat"},
        {"prompt": "bread " * 60, "chosen": "bread", "rejected": "boat"},
        {"prompt": "q", "chosen": "bread " * 40 + "salt", "rejected": "bread " * 40 + "oven"},
        {"prompt": "q", "chosen": "", "rejected": "boat"},
    ]
    dataset = build(tmp_path, rows, max_seq_len=24)
    assert len(dataset) == 1
    assert sum(dataset.dropped.values()) == 3
    _, tree = plain_and_tree()
    small = [response(np.minimum(r.tokens, 22), r.scored) for r in dataset[0]]
    output = tree(Row.from_examples([small]))
    assert loss(output, output.log_probs.detach()).losses.isfinite().all()


def test_a_token_merged_across_the_end_of_the_prompt_is_no_part_of_the_prefix():
    # TRL 2054, 1153: the prompt was tokenized apart, and its last token is another one inside the whole text
    merging = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3}, [("a", "b")]))
    merging.pre_tokenizer = pre_tokenizers.Sequence([])
    sequences = [merging.encode("ca" + answer).ids for answer in ("b", "c")]
    assert sequences == [[2, 3], [2, 0, 2]]
    plain, tree = plain_and_tree()
    example = [response(ids, [0] + [1] * (len(ids) - 1)) for ids in sequences]
    laid_out = PrefixTree.from_responses(example)
    assert laid_out.tokens.tolist() == [2, 0]
    torch.testing.assert_close(tree(Row.from_examples([example])).log_probs[0], plain_log_probs(plain, example))


def test_prompts_that_differ_are_two_prompts():
    # TRL 3490: templates whose prefix differs between chosen and rejected
    plain, tree = plain_and_tree()
    example = [response([1, 2, 3, 4], [0, 0, 1, 1]), response([1, 5, 3, 4], [0, 0, 1, 1])]
    torch.testing.assert_close(tree(Row.from_examples([example])).log_probs[0], plain_log_probs(plain, example))


@pytest.mark.parametrize("loss", [DPOLoss(), SimPOLoss(), ORPOLoss()])
def test_gradients_are_those_of_the_mean_over_pairs_however_rows_are_made(loss):
    # TRL 2615, 5710: accumulation scaled wrongly; ms-swift 9925: a mean over the packed row;
    # open-instruct: means weighted by the micro-batch's tokens
    _, tree = plain_and_tree()
    pairs = [
        [response([1, 2, *[3] * n], [0, 0, *[1] * n]), response([1, 2, *[4] * m], [0, 0, *[1] * m])]
        for n, m in ((1, 9), (7, 2), (3, 3))
    ]
    reference = -torch.rand(3, 2)

    def gradients(rows):
        tree.zero_grad()
        for row in rows:
            output = tree(Row.from_examples([pairs[i] for i in row], num_responses=2))
            (loss(output, reference[row]).losses.sum() / 3).backward()
        return torch.cat([p.grad.flatten() for p in tree.parameters()])

    tree.zero_grad()
    outputs = [tree(Row.from_examples([pair])) for pair in pairs]
    alone = [loss(output, reference[[i]]).losses for i, output in enumerate(outputs)]
    torch.stack(alone).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in tree.parameters()])
    for rows in ([[0, 1, 2]], [[0], [1], [2]], [[2, 0], [1]], [[0, 1, 2], []]):
        torch.testing.assert_close(gradients(rows), expected, rtol=1e-4, atol=1e-6)


def test_padding_counts_nowhere():
    # open-instruct 1900: a first loss of 6 ln 2
    _, tree = plain_and_tree()
    pair = [response([1, 2, 3, 4], [0, 0, 1, 1]), response([1, 2, 5], [0, 0, 1])]
    expected = tree(Row.from_examples([pair]))
    padded = tree(Row.from_examples([pair], options=RowOptions(round_length=lambda n: n + 50)))
    torch.testing.assert_close(padded.log_probs, expected.log_probs)
    assert padded.num_scored.equal(expected.num_scored)
    reference = expected.log_probs.detach()
    assert DPOLoss()(padded, reference).losses.tolist() == pytest.approx([math.log(2)])


def test_reference_log_probs_follow_their_examples_through_shuffling(tmp_path):
    # TRL 1962, open-instruct 1182: ignored, or looked up by position
    recipe = run_in_process(tmp_path, max_steps_per_epoch=None, epochs=2)
    with torch.no_grad():
        for i in (0, 13, 63):
            expected = initial_policy(recipe)(Row.from_examples([recipe.dataset[i]])).log_probs[0]
            torch.testing.assert_close(recipe.reference.log_probs[i], expected, rtol=1e-5, atol=1e-4)
    first, *later = losses(tmp_path)
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(loss - math.log(2)) for loss in later) > 1e-3


def initial_policy(recipe):
    _, checkpoint = load_checkpoint("checkpointer", recipe.cfg.checkpointer)
    recipe.model.load_weights(checkpoint, recipe.seed)
    return recipe.model


def test_bos_and_end_of_turn_stand_once_in_each_answer(tmp_path):
    # axolotl 1616: BOS again before each answer; unsloth 3228: EOS doubled or lost
    dataset = build(tmp_path, [{"prompt": "q", "chosen": "bread", "rejected": "boat"}])
    for sequence in dataset[0]:
        text = tokenizer().decode(sequence.tokens.tolist(), skip_special_tokens=False)
        assert text.count("<|start|>") == 2
        assert text.count("<|end|>") == 2
        assert text.endswith("<|end|>")
        assert sequence.scored[-1]


def test_logits_of_unscored_tokens_are_never_made(monkeypatch):
    # TRL 3168, LLaMA-Factory 10720, NeMo-RL 2859: out of memory from fp32 logits
    _, tree = plain_and_tree()
    projected = []
    monkeypatch.setattr(scoring, "chunk_size", lambda vocab_size: 4)
    tree.output.register_forward_hook(lambda module, inputs, output: projected.append(output.shape))
    prompt, answers = list(range(20)), ([21] * 6, [22] * 5)
    tree(Row.from_examples([[response(prompt + a, [0] * 20 + [1] * len(a)) for a in answers]]))
    # 6 + 5 scored tokens; both first ones are predicted by the prompt's last token
    assert sum(shape[0] for shape in projected) == 10
    assert max(shape[0] for shape in projected) == 4


# LLaMA-Factory 8459, the reference of a trained adapter: tests/recipes/test_lora.py


def test_at_step_0_the_loss_is_ln_2_and_every_reward_is_0(tmp_path):
    # NeMo-Aligner 227: the policy's log-probs at step 0 were not the reference's
    run_in_process(tmp_path)
    before, first = eval_log(tmp_path)[0], training_log(tmp_path)[0]
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # Zero but for rounding: the same examples stood in other rows when the reference was computed.
    for metrics, prefix in ((before, "eval/"), (first, "")):
        for name in ("chosen", "rejected", "margins"):
            assert abs(metrics[f"{prefix}rewards/{name}"]) < 1e-5
