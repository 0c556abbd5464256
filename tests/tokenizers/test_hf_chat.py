"""The chat tokenizer against transformers, and its masks against what a reader would mark."""

import pickle
import shutil

import pytest
from torchtune.data import Message

from prefix_sharing.errors import UserError
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR
from prefix_sharing.tokenizers import hf_chat_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|start|>system\nBe kind.<|end|>\n' }}{% endif %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] | trim + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# The system turn moves into the first user turn; no generation prompt; EOS behind each answer.
INST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
# The system turn moves into the last user turn, so earlier turns render differently once later ones follow.
INST_SYSTEM_LAST = (
    "{{ bos_token }}{% set last = messages | selectattr('role', 'equalto', 'user') | list | length %}"
    "{% set ns = namespace(user=0, system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}{% elif m['role'] == 'user' %}"
    "{% set ns.user = ns.user + 1 %}{{ '[INST] ' + (ns.system if ns.user == last else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Reasoning is shown in the last answer only, dropped from earlier ones, and an empty block stands where there is none.
REASONING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set content = m['content'] %}{% set think = '' %}"
    "{% if '</think>' in content %}{% set think = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].strip() %}{% endif %}{{ '<|start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + think + '\n</think>\n\n' }}{% endif %}{{ content + '<|end|>\n' }}"
    "{% else %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
WITH_GENERATION_TAG = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default_system": WITH_DEFAULT_SYSTEM,
    "inst": INST,
    "inst_system_last": INST_SYSTEM_LAST,
    "reasoning": REASONING,
    "generation_tag": WITH_GENERATION_TAG,
}


@pytest.fixture
def make_tokenizer(tmp_path):
    def make(template, **kwargs):
        directory = tmp_path / "model"
        shutil.copytree(TOKENIZER_DIR, directory, dirs_exist_ok=True)
        (directory / "chat_template.jinja").write_text(template)
        return hf_chat_tokenizer(str(directory), **kwargs)

    return make


def conversation(*contents, system=None, masked=None):
    messages = [] if system is None else [Message(role="system", content=system, masked=True)]
    for i, content in enumerate(contents):
        role = "user" if i % 2 == 0 else "assistant"
        messages.append(Message(role=role, content=content, masked=role == "user"))
    return messages


def scored_texts(tokenizer, messages):
    """The runs of scored tokens, decoded."""
    ids, mask = tokenizer.tokenize_messages(messages)
    runs, previous = [], True
    for token, masked in zip(ids, mask, strict=True):
        if not masked:
            if previous:
                runs.append([])
            runs[-1].append(token)
        previous = masked
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


CONVERSATIONS = [
    conversation("What did we find?", "bread butter oven"),
    conversation("Hi", "Hello.", "And now?", "Nothing new."),
    conversation("Hi", "  spaces around  ", "\nnewline first", "ends with newline\n", system="Be brief."),
    conversation("assistant", "assistant", "user\n", "assistant\n"),
    conversation("naïve — café 🦊", "日本語 🦊🦊", "again", "ok"),
    conversation("Why?", "<think>\nhm\n</think>\n\nBecause.", "Really?", "<think>\nyes\n</think>\n\nYes."),
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_token_ids_are_those_of_apply_chat_template(make_tokenizer, template, messages):
    transformers = pytest.importorskip("transformers")
    ours = make_tokenizer(TEMPLATES[template])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(ours.path)
    turns = [{"role": m.role, "content": m.text_content} for m in messages]

    def their_ids(turns, **kwargs):
        return theirs.apply_chat_template(turns, tokenize=True, return_dict=True, **kwargs)["input_ids"]

    assert ours.tokenize_messages(messages)[0] == their_ids(turns)
    prompt = ours({"messages": messages[:-1]}, inference=True)
    assert prompt["tokens"] == their_ids(turns[:-1], add_generation_prompt=True)
    # torchtune's recipes put an empty answer last to ask for one
    kick_start = [*messages[:-1], Message(role="assistant", content="")]
    assert ours({"messages": kick_start}, inference=True)["tokens"] == prompt["tokens"]


def test_generation_stops_at_the_end_of_a_turn_and_pads_with_something_else(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    end_of_turn = tokenizer.special_tokens["<|end|>"]
    assert end_of_turn in tokenizer.stop_tokens
    assert tokenizer.pad_id not in (None, *tokenizer.stop_tokens)
    ids, _ = tokenizer.tokenize_messages(CONVERSATIONS[1])
    assert tokenizer.pad_id not in ids


@pytest.mark.parametrize("template", ["chatml", "default_system", "generation_tag"])
def test_scored_are_the_answers_with_their_end_of_turn(make_tokenizer, template):
    tokenizer = make_tokenizer(TEMPLATES[template])
    assert scored_texts(tokenizer, CONVERSATIONS[0]) == ["bread butter oven<|end|>"]
    assert scored_texts(tokenizer, CONVERSATIONS[1]) == ["Hello.<|end|>", "Nothing new.<|end|>"]


def test_an_answer_that_repeats_its_header_is_not_mistaken_for_it(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    assert scored_texts(tokenizer, CONVERSATIONS[3]) == ["assistant<|end|>", "assistant\n<|end|>"]


def test_trimmed_content_is_found_as_it_was_rendered(make_tokenizer):
    tokenizer = make_tokenizer(WITH_DEFAULT_SYSTEM)
    assert scored_texts(tokenizer, CONVERSATIONS[2]) == ["spaces around<|end|>", "ends with newline<|end|>"]


def test_content_of_many_bytes_a_character_is_scored_whole(make_tokenizer):
    assert scored_texts(make_tokenizer(CHATML), CONVERSATIONS[4]) == ["日本語 🦊🦊<|end|>", "ok<|end|>"]


@pytest.mark.parametrize("template", ["inst", "inst_system_last"])
def test_a_template_without_generation_prompt_scores_from_the_answer_on(make_tokenizer, template):
    # The space that the template puts before an answer belongs to its first token.
    tokenizer = make_tokenizer(TEMPLATES[template])
    messages = conversation("Hi", "Hello.", "And now?", "Nothing new.", system="Be brief.")
    assert scored_texts(tokenizer, messages) == [" Hello.<|end|>", " Nothing new.<|end|>"]


def test_reasoning_dropped_from_earlier_turns_is_followed(make_tokenizer):
    assert scored_texts(make_tokenizer(REASONING), CONVERSATIONS[5]) == [
        "Because.<|end|>",
        "<think>\nyes\n</think>\n\nYes.<|end|>",
    ]


def test_masked_turns_are_not_scored(make_tokenizer):
    messages = conversation("Hi", "Hello.", "And now?", "Nothing new.")
    messages[1].masked = True
    assert scored_texts(make_tokenizer(CHATML), messages) == ["Nothing new.<|end|>"]


def test_a_turn_that_cannot_be_located_is_refused(make_tokenizer):
    counts = (
        "{% for m in messages %}{{ m['role'] + ' ' + (m['content'] | length | string) + ': ' + m['content'] + '\n' }}"
        "{% endfor %}"
    )
    tokenizer = make_tokenizer(counts)
    with pytest.raises(UserError, match=r"renders turn 4 \(assistant\) of 4 in a way that hides"):
        tokenizer.tokenize_messages(conversation("Hi", "Hello.", "And now?", "Nothing new."))


def test_a_turn_the_template_leaves_out_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}")
    with pytest.raises(UserError, match="cannot be scored"):
        tokenizer.tokenize_messages(conversation("Hi", "Hello."))


def test_a_conversation_the_template_refuses_is_an_error_with_its_reason(make_tokenizer):
    messages = [Message(role="user", content="a"), Message(role="user", content="b")]
    with pytest.raises(UserError, match="refuses turns of user, user: roles must alternate"):
        make_tokenizer(INST).tokenize_messages(messages)


def test_special_tokens_come_once(make_tokenizer):
    tokenizer = make_tokenizer(INST)
    ids, _ = tokenizer.tokenize_messages(CONVERSATIONS[0])
    assert ids.count(tokenizer.bos_id) == 1
    assert ids.count(tokenizer.eos_id) == 1
    assert ids[-1] == tokenizer.eos_id


def test_max_seq_len_cuts_the_end(make_tokenizer):
    ids, mask = make_tokenizer(CHATML).tokenize_messages(CONVERSATIONS[1])
    short = make_tokenizer(CHATML, max_seq_len=7).tokenize_messages(CONVERSATIONS[1])
    assert short == (ids[:7], mask[:7])


def test_a_pickled_tokenizer_is_the_same(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.tokenize_messages(CONVERSATIONS[1]) == tokenizer.tokenize_messages(CONVERSATIONS[1])


def test_encode_and_decode(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    ids = tokenizer.encode("bread and butter")
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == "bread and butter"
    assert max(ids) < tokenizer.vocab_size == 2048


def test_the_template_cannot_reach_out_of_its_sandbox(make_tokenizer):
    tokenizer = make_tokenizer("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match="unsafe"):
        tokenizer.tokenize_messages(CONVERSATIONS[0])


def test_missing_files_and_templates_are_named(tmp_path, make_tokenizer):
    with pytest.raises(UserError, match="tokenizer.json not found"):
        hf_chat_tokenizer(str(tmp_path / "nowhere"))
    directory = make_tokenizer(CHATML).path
    shutil.rmtree(directory)
    shutil.copytree(TOKENIZER_DIR, directory, ignore=shutil.ignore_patterns("*.jinja"))
    with pytest.raises(UserError, match="no chat template"):
        hf_chat_tokenizer(directory)
    with pytest.raises(UserError, match="not valid jinja"):
        make_tokenizer("{% for %}")


def test_the_template_in_tokenizer_config_is_read(make_tokenizer, tmp_path):
    import json

    directory = make_tokenizer(CHATML).path
    expected = make_tokenizer(CHATML).tokenize_messages(CONVERSATIONS[1])
    config_file = tmp_path / "model" / "tokenizer_config.json"
    (tmp_path / "model" / "chat_template.jinja").unlink()
    for template in (CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]):
        config = json.loads(config_file.read_text()) | {"chat_template": template}
        config_file.write_text(json.dumps(config))
        assert hf_chat_tokenizer(directory).tokenize_messages(CONVERSATIONS[1]) == expected


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_a_template_that_does_not_end_is_refused(make_tokenizer, loops):
    endless = "{% for i in range(99999) %}" * loops + "{{ '' }}" + "{% endfor %}" * loops
    tokenizer = make_tokenizer(endless + "{{ messages[0]['content'] }}:{{ messages[1]['content'] }}")
    if loops == 1:
        tokenizer.tokenize_messages(conversation("Hi", "Hello."))
    else:
        with pytest.raises(UserError, match="refuses turns of .*: its loops take more than 1,000,000 steps"):
            tokenizer.tokenize_messages(conversation("Hi", "Hello."))
