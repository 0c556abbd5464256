"""Tools, calls and thoughts, rendered as transformers does: calls are scored with their end, results never."""

import json
import shutil
from pathlib import Path

import pytest

from prefix_sharing.errors import UserError
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR
from prefix_sharing.tokenizers import hf_chat_tokenizer, tokenize_turns

# Templates of the shapes that models have, in few words.
HERMES = (
    "{% if tools %}{{ '<|start|>system\nTools: ' + tools | tojson + '<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{{ '<|start|>assistant' }}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls %}{{ '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|end|>\n' }}{% else %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# Qwen 2.5: results in a row are one turn of the user. Qwen 3: thoughts only behind the last question.
QWEN = (
    "{% if tools %}{{ '<|start|>system\n# Tools\n' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endif %}{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|end|>\n' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ '<|start|>assistant\n' }}"
    "{% if THINKS and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{% if call.function.arguments is string %}{{ call.function.arguments }}"
    "{% else %}{{ call.function.arguments | tojson }}{% endif %}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|end|>\n' }}"
    "{% else %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Llama 3.1: tools in the first question, one call in a turn, which ends with a token of its own.
LLAMA = (
    "{{ bos_token }}{% if tools is not defined %}{% set tools = none %}{% endif %}"
    "{% for m in messages %}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}{{ '<|start|>assistant\n\n' }}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}' }}"
    "{{ '<|more|>' if tools is not none else '<|end|>' }}"
    "{% elif m.role in ('tool', 'ipython') %}{{ '<|start|>ipython\n\n' + m.content | tojson + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '\n\n' }}{% if loop.first and tools is not none %}"
    "{% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}"
    "{{ m.content | trim + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}"
)
# Mistral: no generation prompt, tools before the last question, and roles that must alternate.
MISTRAL = (
    "{% set ns = namespace(last=0, index=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and m.tool_calls is not defined) %}"
    "{% if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.index = ns.index + 1 %}{% endif %}{% endfor %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools is not none and loop.index0 == ns.last %}"
    "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.tool_calls is defined %}"
    "{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}{{ call.function | tojson }}"
    "{{ ', ' if not loop.last else '' }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "hermes": HERMES,
    "qwen2.5": QWEN.replace("THINKS", "false"),
    "qwen3": QWEN.replace("THINKS", "true"),
    "llama3.1": LLAMA,
    "mistral": MISTRAL,
}

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def call(city):
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def result(content):
    return {"role": "tool", "content": content}


CONVERSATIONS = {
    "call": [user("Rain in Oslo?"), call("Oslo")],
    "answer": [user("Rain in Oslo?"), call("Oslo"), result("rain"), assistant("Yes.")],
    "empty_content": [user("Rain?"), {**call("Oslo"), "content": ""}, result("rain"), assistant("Yes.")],
    "twice": [user("Rain?"), call("Oslo"), result("rain"), call("Rome"), result("sun"), assistant("In Oslo.")],
    "same_twice": [user("Rain?"), call("Oslo"), result("?"), call("Oslo"), result("sun"), assistant("In Oslo.")],
    "later": [user("Rain?"), call("Oslo"), result("rain"), assistant("Yes."), user("Rome?"), assistant("No.")],
    "both": [
        user("Rain?"),
        call("Oslo"),
        result("rain"),
        assistant("Yes."),
        user("Rome?"),
        call("Rome"),
        result("sun"),
        assistant("No."),
    ],
    "no_call": [user("Rain?"), assistant("Who knows.")],
}


@pytest.fixture
def make_tokenizer(tmp_path):
    def make(template, **kwargs):
        directory = tmp_path / "model"
        shutil.copytree(TOKENIZER_DIR, directory, dirs_exist_ok=True)
        (directory / "chat_template.jinja").write_text(template)
        file = directory / "tokenizer.json"
        definition = json.loads(file.read_text())
        token = {**definition["added_tokens"][-1], "special": True}
        first = max(entry["id"] for entry in definition["added_tokens"]) + 1_000
        for i, content in enumerate(
            ("<|more|>", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[INST]", "[/INST]")
        ):
            definition["added_tokens"].append({**token, "id": first + i, "content": content})
        file.write_text(json.dumps(definition))
        return hf_chat_tokenizer(str(directory), **kwargs)

    return make


def their_ids(tokenizer, turns, **kwargs):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer.path)
    return theirs.apply_chat_template(turns, tokenize=True, return_dict=True, **kwargs)["input_ids"]


def runs(tokenizer, chat):
    """The runs of scored tokens, decoded."""
    found, previous = [], False
    for token, is_scored in zip(chat.tokens, chat.scored, strict=True):
        if is_scored:
            if not previous:
                found.append([])
            found[-1].append(token)
        previous = is_scored
    return [tokenizer.decode(run, skip_special_tokens=False) for run in found]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("tools", [TOOLS, [], None], ids=["tools", "empty", "none"])
def test_token_ids_are_those_of_apply_chat_template(make_tokenizer, template, turns, tools):
    tokenizer = make_tokenizer(TEMPLATES[template])
    chat = tokenize_turns(tokenizer, turns, [turn["role"] == "assistant" for turn in turns], tools)
    assert chat.tokens == their_ids(tokenizer, turns, tools=tools)


CALLED = '{"name": "weather", "arguments": {"city": "%s"}}'
SCORED = {
    "hermes": ("\n<tool_call>\n" + CALLED + "\n</tool_call><|end|>", "%s<|end|>"),
    "qwen2.5": ("<tool_call>\n" + CALLED + "\n</tool_call><|end|>", "%s<|end|>"),
    "qwen3": ("<tool_call>\n" + CALLED + "\n</tool_call><|end|>", "%s<|end|>"),
    "llama3.1": (CALLED.replace("arguments", "parameters") + "<|more|>", "%s<|end|>"),
    "mistral": ("[TOOL_CALLS] [" + CALLED + "]{eos}", " %s{eos}"),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_calls_and_answers_are_scored_with_their_end_and_results_are_not(make_tokenizer, template, name):
    tokenizer, turns = make_tokenizer(TEMPLATES[template]), CONVERSATIONS[name]
    chat = tokenize_turns(tokenizer, turns, [turn["role"] == "assistant" for turn in turns], TOOLS)
    eos = tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)
    of_call, of_answer = (text.replace("{eos}", eos) for text in SCORED[template])
    expected = [
        of_call % turn["tool_calls"][0]["function"]["arguments"]["city"]
        if "tool_calls" in turn
        else of_answer % turn["content"]
        for turn in turns
        if turn["role"] == "assistant"
    ]
    found = runs(tokenizer, chat)
    if template == "qwen3":  # which adds thoughts, that it has none, to what follows the last question
        found = [text.removeprefix("<think>\n\n</think>\n\n") for text in found]
    if template == "hermes":  # where the line of the generation prompt is not in the call
        expected = [text.removeprefix("\n") for text in expected]
    if template == "mistral":  # whose space may be one token with what comes before
        found, expected = [text.strip() for text in found], [text.strip() for text in expected]
    assert found == expected
    assert chat.has_end
    assert not chat.lost_text
    assert chat.unused == ()


def test_thoughts_are_scored_where_the_template_shows_them_and_missed_where_not(make_tokenizer):
    tokenizer = make_tokenizer(TEMPLATES["qwen3"])
    turns = [user("3+4?"), {**assistant("7"), "reasoning_content": "Three and four."}]
    chat = tokenize_turns(tokenizer, turns, [False, True])
    assert chat.tokens == their_ids(tokenizer, turns)
    assert runs(tokenizer, chat) == ["<think>\nThree and four.\n</think>\n\n7<|end|>"]
    assert not chat.lost_text
    later = [*turns, user("5+6?"), assistant("11")]
    chat = tokenize_turns(tokenizer, later, [False, True, False, True])
    assert chat.tokens == their_ids(tokenizer, later)
    assert chat.lost_text  # thoughts about an earlier question are not shown
    assert not tokenize_turns(tokenizer, later, [False, False, False, True]).lost_text
    assert tokenize_turns(make_tokenizer(HERMES), turns, [False, True]).lost_text


def test_variables_of_a_template_come_from_config_and_record(make_tokenizer):
    tokenizer = make_tokenizer(TEMPLATES["qwen3"], chat_template_kwargs={"enable_thinking": False})
    turns = [user("3+4?"), assistant("7")]
    assert runs(tokenizer, tokenize_turns(tokenizer, turns, [False, True])) == ["7<|end|>"]
    chat = tokenize_turns(tokenizer, turns, [False, True], template_kwargs={"enable_thinking": True})
    assert runs(tokenizer, chat) == ["<think>\n\n</think>\n\n7<|end|>"]
    assert chat.tokens == their_ids(tokenizer, turns, enable_thinking=True)


def test_keys_without_a_place_in_the_template_are_told(make_tokenizer):
    plain = "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    tokenizer = make_tokenizer(plain)
    chat = tokenize_turns(tokenizer, [{**user("q"), "name": "Ann"}, assistant("a")], [False, True], TOOLS)
    assert chat.unused == ("name",)
    assert chat.unused_tools
    with pytest.raises(UserError, match="has no place for tool_calls; use another chat template"):
        tokenize_turns(tokenizer, CONVERSATIONS["call"], [False, True])


def test_torchtunes_own_tokenizers_refuse_tools():

    class Own:
        max_seq_len = None

    for turns, tools in ((CONVERSATIONS["call"], None), (CONVERSATIONS["no_call"], TOOLS)):
        with pytest.raises(UserError, match="need a chat template: use prefix_sharing.tokenizers.hf_chat_tokenizer"):
            tokenize_turns(Own(), turns, [False, True], tools)


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("has_decoder", [False, True])
def test_special_tokens_are_those_of_transformers(make_tokenizer, in_config, has_decoder):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    directory = Path(make_tokenizer(HERMES).path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["eos_token"]
    if in_config:
        config["eos_token"] = "<|start|>"
    if has_decoder:
        entries = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
        config["added_tokens_decoder"] = {str(entry.pop("id")): entry for entry in entries}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    in_map = {"eos_token": {"content": "<|end|>", "lstrip": False}, "pad_token": "<|more|>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(in_map))
    ours = hf_chat_tokenizer(str(directory))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert ours.eos_id == theirs.eos_token_id
    assert (ours.eos_id is not None) == (in_config or not has_decoder)
    assert ours._named_tokens == theirs.special_tokens_map


@pytest.mark.parametrize("name", ["additional_special_tokens", "extra_special_tokens"])
def test_special_tokens_that_only_config_files_name_are_one_token(make_tokenizer, name):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    directory = Path(make_tokenizer(HERMES).path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {name: ["<extra>"], "eos_token": "<END>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    ours = hf_chat_tokenizer(str(directory))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    text = "a<extra>b<END>"
    assert ours.encode(text, add_bos=False, add_eos=False) == theirs.encode(text, add_special_tokens=False)
    assert ours.eos_id == theirs.eos_token_id
    assert {ours.special_tokens["<extra>"], ours.eos_id} <= set(theirs.all_special_ids)


# DeepSeek R1's distilled models: a call is rendered only where there is no content at all.
CALLS_WITHOUT_CONTENT = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.content is defined %}{{ m.content }}"
    "{% else %}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{% endif %}{{ '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# Gemma 4: call, result and what follows are one turn of the model.
RESULTS_IN_THE_TURN = (
    "{% for m in messages %}{% set result = messages[loop.index] if loop.index < messages | length else none %}"
    "{% if m.role == 'user' %}{{ '<|start|>user\n' + m.content + '<|end|>\n<|start|>assistant\n' }}"
    "{% elif m.role == 'assistant' %}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{% if m.tool_calls and result %}{{ '<result>' + result.content + '</result>' }}{% endif %}"
    "{{ (m.content or '') + '<|end|>\n' }}{% endif %}{% endfor %}"
)


def test_a_template_that_leaves_out_calls_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(CALLS_WITHOUT_CONTENT)
    chat = tokenize_turns(tokenizer, CONVERSATIONS["answer"], [False, True, False, True])
    assert runs(tokenizer, chat)[0] == CALLED % "Oslo" + "<|end|>"
    with pytest.raises(UserError, match="leaves out the tool_calls of turn 2 of 4; use another chat template"):
        tokenize_turns(tokenizer, CONVERSATIONS["empty_content"], [False, True, False, True])


def test_results_within_what_would_be_scored_are_refused(make_tokenizer):
    tokenizer = make_tokenizer(RESULTS_IN_THE_TURN)
    turns = [user("Rain?"), {**call("Oslo"), "content": "Let me look."}, result("rain"), assistant("Yes.")]
    with pytest.raises(UserError, match="puts results of tools into the assistant's turn"):
        tokenize_turns(tokenizer, turns, [False, True, False, True])


def test_text_of_other_turns_that_the_template_leaves_out_is_missed(make_tokenizer):
    template = (
        "{% for m in messages if m.role != 'system' %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    turns = [{"role": "system", "content": "Be brief."}, user("q"), assistant("a")]
    assert tokenize_turns(tokenizer, turns, [False, False, True]).lost_text
    assert not tokenize_turns(tokenizer, turns[1:], [False, True]).lost_text
    # a result that is shown as JSON is shown
    shown = [user("q"), call("Oslo"), result('{"sky": "clear"}'), assistant("a")]
    assert not tokenize_turns(make_tokenizer(LLAMA), shown, [False, True, False, True], TOOLS).lost_text


@pytest.mark.parametrize("thoughts", ["hm", "a long thought " * 20])
@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_are_scored_under_any_name_and_whatever_is_asked_for(make_tokenizer, thoughts, name):
    tokenizer = make_tokenizer(TEMPLATES["qwen3"], chat_template_kwargs={"enable_thinking": False})
    turns = [user("3+4?"), {**assistant("7"), name: thoughts}]
    chat = tokenize_turns(tokenizer, turns, [False, True])
    assert chat.tokens == their_ids(tokenizer, turns)
    (scored,) = runs(tokenizer, chat)
    assert scored.removeprefix("<think>\n") == f"{thoughts}\n</think>\n\n7<|end|>"
    assert not chat.lost_text
    assert chat.unused == ()


def test_what_no_template_can_be_given_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(HERMES)
    turns = [user("q"), assistant("a")]
    with pytest.raises(UserError, match="chat_template_kwargs must not hold add_generation_prompt"):
        tokenize_turns(tokenizer, turns, [False, True], template_kwargs={"add_generation_prompt": True})
    with pytest.raises(UserError, match="half of a surrogate pair is somewhere in it"):
        tokenize_turns(tokenizer, [user("q"), call("\ud83d")], [False, True])


@pytest.mark.parametrize("tools", [None, [], TOOLS])
def test_a_template_for_tools_is_used_as_transformers_does(make_tokenizer, tools):
    directory = Path(make_tokenizer(HERMES).path)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text(HERMES.replace("Tools: ", "You have "))
    tokenizer = hf_chat_tokenizer(str(directory))
    turns = CONVERSATIONS["no_call"]
    assert tokenize_turns(tokenizer, turns, [False, True], tools).tokens == their_ids(tokenizer, turns, tools=tools)
