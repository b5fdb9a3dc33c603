from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
from chat import CHATML, GEMMA, NO_END, SPECIAL, TEMPLATES, byte_level, word_marked
from hypothesis import example as also
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from leyden.batch.forest import Tree
from leyden.data.chat_template import ChatTemplate
from leyden.data.tokenizer import PLAIN
from leyden.datamodules.formats.row_error import RowError
from leyden.errors import UserError
from leyden.example import Example, Message

TALK = [
    Message(role="user", content="What is two plus two?"),
    Message(role="assistant", content="four"),
    Message(role="user", content="서울은 어디인가요? 🙂"),
    Message(role="assistant", content="대한민국의 수도입니다 🙂🙂."),
]


def example(turns: list[Message] = TALK, cut: int = 1) -> Example:
    return Example(turns[:cut], [turns[cut:]])


def adding_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS before every text itself, as that of Llama does."""
    tokenizer = copy.deepcopy(byte_level())
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    return tokenizer


def trained(template: ChatTemplate, tree: Tree, response: int = 0) -> list[str]:
    """The text of each run of tokens with weight 1."""
    runs: list[list[int]] = []
    weights = (tree.weights or [])[response]
    for number, (token, weight) in enumerate(zip(tree.responses[response], weights, strict=True)):
        assert weight in (0.0, 1.0)
        if weight and (number == 0 or not weights[number - 1]):
            runs.append([])
        if weight:
            runs[-1].append(token)
    return [template.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_what_generation_sees_and_all_decodes_to_the_text(name: str) -> None:
    tokenizer = byte_level()
    template = ChatTemplate(tokenizer, TEMPLATES[name])
    tree = template.encode(example())
    assert tree.prompt == template.prompt(TALK[:1])
    text = tokenizer.apply_chat_template(TALK, tokenize=False, chat_template=TEMPLATES[name])
    decoded = tokenizer.decode(tree.prompt + tree.responses[0])
    if name == "no_end":
        assert decoded == text.rstrip("\n") + "</s>"
    else:
        assert text.startswith(decoded) and text.removeprefix(decoded).strip() == ""


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("chatml", "four<|im_end|>", "대한민국의 수도입니다 🙂🙂.<|im_end|>"),
        ("thinking", "four<|im_end|>", "<think>\n\n</think>\n\n대한민국의 수도입니다 🙂🙂.<|im_end|>"),
        ("gemma", "four<end_of_turn>", "대한민국의 수도입니다 🙂🙂.<end_of_turn>"),
        ("llama2", " four </s>", " 대한민국의 수도입니다 🙂🙂. </s>"),
        ("plain", "four</s>", "대한민국의 수도입니다 🙂🙂.</s>"),
        ("no_end", " four", " 대한민국의 수도입니다 🙂🙂.</s>"),
    ],
)
def test_exactly_the_answers_and_their_ends_are_trained(name: str, first: str, last: str) -> None:
    template = ChatTemplate(byte_level(), TEMPLATES[name])
    assert trained(template, template.encode(example())) == [first, last]
    assert trained(template, template.encode(example(cut=3))) == [last]


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and not any(special in text for special in SPECIAL)
)


@pytest.mark.parametrize("fast", [True, False])
@given(
    contents=st.lists(words, min_size=2, max_size=6), name=st.sampled_from(sorted(TEMPLATES)), first=st.integers(0, 2)
)
@also(contents=["\U000f0000", "r", "r", "0"], name="chatml", first=0)  # a character of the kind that marks places
@settings(deadline=None)
def test_any_words_are_cut_exactly(fast: bool, contents: list[str], name: str, first: int) -> None:
    """Whatever is said (blanks at the ends, emoji, the same words twice), and with or without offsets."""
    contents = contents[: len(contents) // 2 * 2]
    turns = [Message(role="user assistant".split()[i % 2], content=text) for i, text in enumerate(contents)]
    cut = 1 + 2 * min(first, len(turns) // 2 - 1)
    tokenizer = byte_level()
    template = ChatTemplate(tokenizer, TEMPLATES[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "is_fast", fast)
        tree = template.encode(example(turns, cut))
    assert tree.prompt == template.prompt(turns[:cut])
    text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=TEMPLATES[name])
    said = tokenizer.decode(tree.prompt + tree.responses[0])
    assert text.startswith(said.removesuffix("</s>") if template.terminator is None else said)
    said_by_assistant = [
        run.removesuffix("</s>").removesuffix(template.terminator or "").removeprefix("<think>\n\n</think>\n\n").strip()
        for run in trained(template, tree)
    ]
    assert said_by_assistant == [turn["content"].strip() for turn in turns[cut::2]]


def test_words_that_hold_the_terminator_do_not_end_the_answer() -> None:
    turns = [*TALK[:1], Message(role="assistant", content=" say <end_of_turn> to end ")]
    template = ChatTemplate(byte_level(), GEMMA)
    assert trained(template, template.encode(example(turns))) == ["say <end_of_turn> to end<end_of_turn>"]


def test_blanks_around_words_are_kept_where_the_template_keeps_them() -> None:
    turns = [*TALK[:1], Message(role="assistant", content="\n four ")]
    for source, expected in ((NO_END, " \n four </s>"), (CHATML, "\n four <|im_end|>"), (GEMMA, "four<end_of_turn>")):
        template = ChatTemplate(byte_level(), source)
        assert trained(template, template.encode(example(turns))) == [expected]


def test_a_template_that_ends_the_last_answer_only() -> None:
    source = NO_END.replace("{{ m.content }}", "{{ m.content }}{{ eos_token if loop.last and m.role == 'assistant' }}")
    template = ChatTemplate(byte_level(), source)
    assert template.terminator == "</s>"
    assert trained(template, template.encode(example())) == [" four", " 대한민국의 수도입니다 🙂🙂.</s>"]


def test_later_answers_start_where_generation_would_start_them() -> None:
    template = ChatTemplate(byte_level(), CHATML)
    tree = template.encode(example())
    whole = tree.prompt + tree.responses[0]
    second = template.prompt(TALK[:3])
    assert whole[: len(second)] == second
    weights = [0.0] * len(tree.prompt) + (tree.weights or [])[0]
    assert weights[len(second) - 1 : len(second) + 1] == [0.0, 1.0]


@pytest.mark.parametrize("name", ["llama2", "no_end", "plain"])
def test_tokenizers_that_mark_words(name: str) -> None:
    template = ChatTemplate(word_marked(), TEMPLATES[name])
    tree = template.encode(example())
    assert tree.prompt == template.prompt(TALK[:1])
    assert template.tokenizer.decode(tree.responses[0]).endswith(
        "수도입니다 🙂🙂. </s>" if name == "llama2" else ".</s>"
    )
    pieces = template._cut_pieces("\nfour plus", [0, 1, 5, 10])
    assert [template.tokenizer.convert_ids_to_tokens(piece)[0][0] == "▁" for piece in pieces] == [False, False, True]


def test_a_merge_across_the_cut_does_not_change_the_prompt() -> None:
    """`[x]` as generation prompt and an answer that starts with `]`: tokenised whole, `]]` is one token."""
    core = Tokenizer(models.BPE(vocab={"[": 0, "x": 1, "]": 2, "]]": 3, "</s>": 4}, merges=[("]", "]")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}[x]{{ m.content }}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[x]{% endif %}"
    )
    template = ChatTemplate(tokenizer, source)
    turns = [Message(role="user", content="x"), Message(role="assistant", content="]x")]
    assert tokenizer("x[x]]x</s>").input_ids == [1, 0, 1, 3, 1, 4]
    tree = template.encode(example(turns))
    assert (tree.prompt, tree.responses) == ([1, 0, 1, 2], [[2, 1, 4]])
    assert tree.weights == [[1.0, 1.0, 1.0]]


def test_a_merge_across_the_end_of_an_answer_does_not_train_what_follows() -> None:
    """No terminator, and the next turn starts with `]`, which merges with the `]` that ends the answer."""
    core = Tokenizer(models.BPE(vocab={"[": 0, "x": 1, "]": 2, "]]": 3, "</s>": 4}, merges=[("]", "]")]))
    template = ChatTemplate(
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"),
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    contents = ["]x[", "x]", "]x[", "x"]
    turns = [Message(role=turn["role"], content=content) for turn, content in zip(TALK, contents, strict=True)]
    tree = template.encode(example(turns))
    assert (tree.prompt, tree.responses) == ([2, 1, 0], [[1, 2, 2, 1, 0, 1, 4]])
    assert tree.weights == [[1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]]


def test_offsets_that_leave_out_blanks_do_not_hide_a_merge() -> None:
    """With trimmed offsets the token ` four` seems to start after the blank that ends the generation prompt."""
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert "Ġfour" in tokenizer.tokenize("[assistant] four")
    for first_blank in (" ", ""):  # before every answer, or before the later ones only
        source = (
            "{% for m in messages %}[{{ m.role }}]{{ FIRST if loop.index == 2 else ' ' }}{{ m.content }}</s>"
            "{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{{ FIRST if messages | length == 1 else ' ' }}{% endif %}"
        ).replace("FIRST", repr(first_blank))
        template = ChatTemplate(tokenizer, source)
        talk = [*TALK[:3], Message(role="assistant", content="four")]
        tree = template.encode(example(talk))
        assert tree.prompt == template.prompt(talk[:1])
        assert trained(template, tree) == ["four</s>", "four</s>"]
        assert trained(template, template.encode(example(talk[:2]))) == ["four</s>"]


def test_pieces_are_used_without_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(byte_level(), CHATML)
    expected = template.encode(example())
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    assert template.encode(example()) == expected  # ChatML cuts at special tokens and line ends, so both ways agree


def test_several_responses_share_one_prompt() -> None:
    template = ChatTemplate(byte_level(), CHATML)
    answers = [[Message(role="assistant", content=text)] for text in ("Hello", "안녕하세요")]
    tree = template.encode(Example(TALK[:1], answers))
    assert [trained(template, tree, index) for index in (0, 1)] == [["Hello<|im_end|>"], ["안녕하세요<|im_end|>"]]


def test_pad_equal_to_eos_changes_nothing() -> None:
    padded = ChatTemplate(byte_level(pad="</s>"), PLAIN)
    assert padded.encode(example()) == ChatTemplate(byte_level(), PLAIN).encode(example())
    assert (padded.encode(example()).weights or [])[0][-1] == 1.0


def test_bos_is_never_doubled_and_eos_never_missing() -> None:
    tokenizer = byte_level()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for source in TEMPLATES.values():
        template = ChatTemplate(tokenizer, source)
        for train_on in ("response", "all"):
            tree = template.encode(example(TALK[:2]), train_on)
            ids = tree.prompt + tree.responses[0]
            assert ids.count(bos) <= 1 and bos not in ids[1:]
            assert ids[-1] in template.stop and ids[-2] not in template.stop
    for adds, text in product((True, False), ("Hello", "<s>Hello", "Hello</s>", "<s>Hello</s>")):
        tree = ChatTemplate(adding_bos() if adds else tokenizer, None).encode(Example([], text=text))
        assert tree.prompt == ([bos] if adds or text.startswith("<s>") else [])
        assert tokenizer.decode(tree.responses[0]) == "Hello</s>" and tree.responses[0][-1] == eos
    assert ChatTemplate(byte_level(bos=None), None).encode(Example([], text="Hello")).prompt == []


def test_the_plain_template_has_bos_only_where_the_tokenizer_adds_it() -> None:
    bos = byte_level().bos_token_id
    assert ChatTemplate(adding_bos(), "plain").prompt(TALK[:1])[0] == bos
    assert bos not in ChatTemplate(byte_level(), "plain").prompt(TALK[:1])


def test_train_on_all_trains_every_token() -> None:
    template = ChatTemplate(byte_level(bos=None), CHATML)
    tree = template.encode(example(), "all")
    assert tree.prompt == [] and tree.weights == [[1.0] * len(tree.responses[0])]
    usual = template.encode(example())
    assert tree.responses[0] == usual.prompt + usual.responses[0]


def test_system_prompt_is_put_first_unless_there_is_one() -> None:
    tokenizer = byte_level()
    with_system = [Message(role="system", content="Be brief."), *TALK]
    template = ChatTemplate(tokenizer, CHATML, system_prompt="Be brief.")
    plain = ChatTemplate(tokenizer, CHATML)
    assert template.encode(example()) == plain.encode(example(with_system, cut=2))
    other = [Message(role="system", content="Be kind."), *TALK]
    assert template.encode(example(other, cut=2)) == plain.encode(example(other, cut=2))


def test_stop_holds_eos_terminator_and_given_ids() -> None:
    tokenizer = byte_level()
    ids = tokenizer.convert_tokens_to_ids
    assert ChatTemplate(tokenizer, GEMMA, stop=[7]).stop == {ids("</s>"), ids("<end_of_turn>"), 7}
    assert ChatTemplate(tokenizer, NO_END).stop == {ids("</s>")}


def test_the_words_of_a_template_that_refuses_are_passed_on() -> None:
    template = ChatTemplate(byte_level(), GEMMA, system_prompt="Be brief.")
    with pytest.raises(RowError, match="System role not supported"):
        template.encode(example())


def test_prompt_not_a_prefix_is_caught() -> None:
    template = ChatTemplate(byte_level(), CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    with pytest.raises(RowError, match=r"not a prefix.*'<think>"):
        template.encode(example())


def test_an_answer_that_the_template_drops_is_caught() -> None:
    hidden = NO_END.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else '(hidden)' }}")
    with pytest.raises(RowError, match=r"leaves out or rewrites turn 2 \(assistant\): 'four'"):
        ChatTemplate(byte_level(), hidden).encode(example())


def test_no_template_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data.chat_template plain"):
        ChatTemplate(byte_level()).encode(example())
    with pytest.raises(UserError, match="did you mean 'plain'"):
        ChatTemplate(byte_level(), "plan")
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML, encoding="utf-8")
    assert ChatTemplate(byte_level(), str(path)).encode(example()) == ChatTemplate(byte_level(), CHATML).encode(
        example()
    )
    with pytest.raises(UserError, match="chat.jinja"):
        ChatTemplate(byte_level(), str(tmp_path / "chat.jinga"))
    with pytest.raises(UserError, match="no EOS"):
        ChatTemplate(byte_level(eos=None), NO_END)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("words", ["four", " say <|im_end|> and <end_of_turn>", "수도입니다 🙂", "im_end", "think", ""])
def test_an_answer_that_was_cut_off_ends_with_its_words(
    name: str, words: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", fast)
    template = ChatTemplate(byte_level(), TEMPLATES[name])
    whole = example([*TALK[:3], Message(role="assistant", content=words)], cut=3)
    ended, cut = template.encode(whole), template.encode(whole, finished=False)
    assert cut.prompt == ended.prompt and len(cut.responses[0]) < len(ended.responses[0])
    said = template.tokenizer.decode(cut.responses[0])
    assert said.removeprefix("<think>\n\n</think>\n\n").strip() == words.strip()
    assert (said == said.rstrip() or not words) and cut.weights == [[1.0] * len(cut.responses[0])]
