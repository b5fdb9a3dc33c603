"""`leyden chat`: text that settles token by token, what a conversation keeps, the loop through pipes and terminals."""

from __future__ import annotations

import io
import json
import os
import random
import select
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from chat import GEMMA, byte_level, word_marked
from hypothesis import given, settings
from hypothesis import strategies as st

from leyden.data.chat_template import ChatTemplate
from leyden.data.tokenizer import load_tokenizer
from leyden.errors import UserError
from leyden.models import CausalLM
from leyden.models.chat.conversation import Conversation
from leyden.models.chat.loop import Talk
from leyden.models.chat.streaming_text import LOST, Spelling
from leyden.policy.policy import Sampling

TOKENIZERS = {"tiny": lambda: load_tokenizer("tiny"), "byte_level": byte_level, "word_marked": word_marked}
PARTS = st.one_of(
    st.sampled_from(
        ["안녕하세요", "뷁", " 서울은 ", "값", "𠮷", "🙂", "👩‍👩‍👧‍👦", "👍🏽", "❤️", "🇰🇷🇯🇵", "é", "日本語", "\n", "  "]
    ),
    st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), max_size=4),
    st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), min_size=1, max_size=3).map(
        lambda text: unicodedata.normalize("NFD", text)
    ),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8),
)
TEXTS = st.lists(PARTS, max_size=8).map("".join)


@pytest.fixture(scope="module", params=[*TOKENIZERS])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def pieces(tokenizer: Any, tokens: list[int], whole: bool = True) -> list[str]:
    """What is given out after every token, and at the end."""
    spelling = Spelling(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), tokenizer.convert_ids_to_tokens)
    return [*(spelling.add(token) for token in tokens), spelling.end(whole)]


# -- text ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_what_is_given_out_is_the_text_and_no_character_is_cut(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    found, whole = pieces(tokenizer, tokens), tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(found) == whole
    at = 0
    for piece in found[:-1]:
        assert LOST not in piece
        at += len(piece)
        before, after = whole[:at], whole[at:]
        if piece:  # neither a syllable in separate letters, nor a family, nor a flag
            composed = unicodedata.normalize("NFC", before) + unicodedata.normalize("NFC", after)
            assert composed == unicodedata.normalize("NFC", whole) or unicodedata.combining(after[0])
            assert not before.endswith("\u200d") and not after.startswith(("\u200d", "\ufe0f", "🏽"))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_tokens_at_all_come_out_as_they_are_decoded(tokenizer: Any, seed: int) -> None:
    """A model may choose bytes that are no text."""
    r = random.Random(seed)
    rare = [i for word, i in tokenizer.get_vocab().items() if len(word) == 1 or word.startswith("<0x")]
    tokens = [r.choice(rare) if r.random() < 0.6 else r.randrange(len(tokenizer)) for _ in range(r.randint(0, 12))]
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_syllable_comes_when_its_last_byte_does_and_a_cut_one_never() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("뷁!", add_special_tokens=False)
    assert len(tokens) == 4 and pieces(tokenizer, tokens) == ["", "", "뷁", "!", ""]
    assert "".join(pieces(tokenizer, tokens[:2])) == LOST  # as the whole decode has it
    assert "".join(pieces(tokenizer, tokens[:2], whole=False)) == ""
    marked = word_marked()
    tokens = marked.encode("가뷁", add_special_tokens=False)[:-1]
    assert LOST in marked.decode(tokens) and "".join(pieces(marked, tokens, whole=False)) == "가"


def test_words_come_one_by_one(tokenizer: Any) -> None:
    """Holding everything back would pass every test above."""
    text = "Hello, how are you today? 서울은 대한민국의 수도입니다."
    found = pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert sum(bool(piece) for piece in found) >= 8 and not found[-1]


# -- turns -----------------------------------------------------------------------------------------------------------


def conversation(positions: int | None = None, room: int = 8, template: str | None = None) -> Conversation:
    return Conversation(ChatTemplate(load_tokenizer("tiny"), template), positions, room)


def test_the_prompt_is_the_template_of_all_turns() -> None:
    talk = conversation()
    talk.direct("짧게.")
    talk.ask("하나?")
    talk.answer("둘.")
    prompt, dropped = talk.ask("셋?")
    turns = [("system", "짧게."), ("user", "하나?"), ("assistant", "둘."), ("user", "셋?")]
    text = "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in turns) + "<|im_start|>assistant\n"
    assert load_tokenizer("tiny").decode(prompt) == text and dropped == 0


def test_the_oldest_turns_go_where_positions_end_and_are_still_saved(tmp_path: Path) -> None:
    talk = conversation(positions=64, room=16)
    dropped = []
    for number in range(6):
        prompt, gone = talk.ask(f"question number {number}")
        dropped.append(gone)
        assert len(prompt) + 16 <= 64
        talk.answer(f"answer number {number}")
    assert dropped[0] == 0 and sum(dropped) == talk.first > 0 and all(gone % 2 == 0 for gone in dropped)
    assert talk.save(tmp_path / "chat.jsonl") == 12
    with pytest.raises(UserError, match=r"positions for 64; shorten it"):
        talk.ask("long " * 100)
    assert talk.turns[-1]["role"] == "assistant"  # the question is not kept


def test_a_template_without_a_place_for_a_system_prompt_says_so() -> None:
    talk = conversation(template=GEMMA)
    with pytest.raises(UserError, match="leave it out"):
        talk.direct("짧게.")
    assert talk.system == "" and talk.ask("?")


def test_what_is_saved_is_instruction_data(leyden: Any, workplace: Path) -> None:
    for words in ("첫째", "second"):
        talk = conversation()
        talk.direct("Be brief.")
        talk.ask(words)
        talk.answer("네.")
        talk.save(workplace / "chat.jsonl")
    rows = [json.loads(line) for line in (workplace / "chat.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [message["role"] for message in rows[1]["messages"]] == ["system", "user", "assistant"]
    code, out, error = leyden("data", "check", "--kind", "instruction", "chat.jsonl")
    assert code == 0 and "2" in out, error
    with pytest.raises(UserError, match="nothing to save"):
        conversation().save(workplace / "empty.jsonl")


# -- through a pipe --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> CausalLM:
    policy = CausalLM("tiny")
    policy.build()
    return policy


@pytest.fixture
def chat(policy: CausalLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Talk through pipes: (exit code, answers, notes, the conversation)."""

    def run(*lines: str, system: str = "", **sampling: Any) -> tuple[int, str, str, Conversation]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        how = Sampling(**({"max_new_tokens": 12, "temperature": 0.7} | sampling))
        talk = Conversation(
            ChatTemplate(policy.tokenizer, stop=policy.stop), policy.positions, how.max_new_tokens, system
        )
        capsys.readouterr()
        code = Talk(policy, talk, how).run()
        shown = capsys.readouterr()
        return code, shown.out, shown.err, talk

    return run


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_a_chat_says_what_generate_says(chat: Any, policy: CausalLM, temperature: float) -> None:
    how = Sampling(max_new_tokens=40, temperature=temperature, top_p=0.9, seed=3)
    template = ChatTemplate(policy.tokenizer, stop=policy.stop)
    turns, expected = list[Any](), []
    for key, question in enumerate(["안녕하세요?", "What is 2 plus 3?"]):
        turns.append({"role": "user", "content": question})
        (response,) = policy.generate([template.prompt(turns)], 1, how, [key])[0]
        said = response.text if response.finished else response.text.rstrip(LOST)
        turns.append({"role": "assistant", "content": said})
        expected.append(said)
    options = dict(max_new_tokens=40, temperature=temperature, top_p=0.9, seed=3)
    code, out, _, talk = chat("안녕하세요?", "", "What is 2 plus 3?", "/quit", "never asked", **options)
    assert (code, out) == (0, "".join(f"{said}\n" for said in expected)) and talk.turns == turns


def test_commands(chat: Any, tmp_path: Path) -> None:
    file = tmp_path / "대화.jsonl"
    lines = ["질문", "/regenerate", f"/save {file}", "/system 짧게 답해.", "/new", "/help", " /etc/hosts?", "/again"]
    code, out, notes, talk = chat(*lines, temperature=1.0)
    assert code == 0 and talk.system == "짧게 답해." and len(talk.turns) == 2
    first, second, *_ = out.split("\n")
    assert first != second and talk.turns[0]["content"] == "/etc/hosts?"
    for said in (
        "2 turns added",
        "another system prompt",
        "a new conversation",
        "/regenerate  ",
        "cut after 12 tokens",
    ):
        assert said in notes, said
    (row,) = file.read_text(encoding="utf-8").splitlines()
    assert [m["role"] for m in json.loads(row)["messages"]] == ["user", "assistant"]


def test_a_line_that_cannot_be_done_is_said_and_the_chat_goes_on(chat: Any, tmp_path: Path) -> None:
    lines = ["/agian", "/again", "/save", f"/save {tmp_path}/none/x.jsonl", "long " * 2000, "그래도?"]
    code, out, notes, talk = chat(*lines)
    assert code == 1 and out.strip() and len(talk.turns) == 2
    said = [line for line in notes.splitlines() if line.startswith("error: ")]
    expected = ("did you mean '/again'", "ask something first", "/save chat.jsonl", "nothing to save", "shorten it")
    assert all(part in line for part, line in zip(expected, said, strict=True)), said


def test_the_limit_is_said_whichever_it_is(chat: Any) -> None:
    assert "(cut after 3 tokens; --max-new-tokens 6 allows more)" in chat("a", max_new_tokens=3, temperature=1.5)[2]
    notes = chat("word " * 990, max_new_tokens=2000, temperature=1.5)[2]
    assert "the model has positions for 1,024" in notes and "allows more" not in notes


def test_all_answers_are_told_apart_while_they_are_sampled(policy: CausalLM) -> None:
    """`on_token` of the seam below, where several prompts and samples are under way."""
    seen: dict[tuple[int, int], list[int]] = {}
    groups = policy.generate(
        [[5, 6, 7], [8]],
        3,
        Sampling(max_new_tokens=9, temperature=1.3),
        on_token=lambda i, k, token: seen.setdefault((i, k), []).append(token),
    )
    assert seen == {(i, k): response.tokens for i, group in enumerate(groups) for k, response in enumerate(group)}


def test_what_stops_an_answer_leaves_the_policy_as_it_was(policy: CausalLM) -> None:
    modes = [module.training for module in policy.modules()]
    before = policy.generate([[5, 6, 7]], 1, Sampling(max_new_tokens=9))

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        policy.generate([[5, 6, 7]], 1, Sampling(max_new_tokens=9), on_token=stop)
    assert modes == [module.training for module in policy.modules()]
    assert policy.generate([[5, 6, 7]], 1, Sampling(max_new_tokens=9)) == before


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "MODEL"),
        (["./missing"], "no such model folder"),
        (["tiny", "--temprature", "1"], "did you mean '--temperature'?"),
        (["tiny", "--temperature", "hot"], "--temperature hot: give a number of 0 or more"),
        (["tiny", "--top-p", "0"], "--top-p 0: give a number above 0, at most 1"),
        (["tiny", "--max-new-tokens", "0"], "--max-new-tokens 0: give a number of 1 or more"),
        (["tiny", "--dtype", "float23"], "did you mean 'float32'?"),
        (["run"], "leyden export run --checkpoint last"),
        (["runs"], "runs: a folder of runs; give one of them, such as runs/dpo"),
        (["judge"], "a reward model scores answers"),
        (["tiny", "--chat-template", "plian"], "chat_template plian"),
        (["base"], "--chat-template plain"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, leyden: Any, workplace: Path, policy: CausalLM) -> None:
    (workplace / "run").mkdir()
    (workplace / "run" / "config.yaml").write_text("model: {}\n")
    for name in ("dpo", "sft"):
        (workplace / "runs" / name / "export").mkdir(parents=True)
        (workplace / "runs" / name / "export" / "config.json").write_text("{}")
    (workplace / "judge").mkdir()
    (workplace / "judge" / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    if words == ["base"]:
        policy.save(workplace / "base")
        (workplace / "base" / "chat_template.jinja").unlink()
    code, out, error = leyden("chat", *words)
    assert code == 2 and said in error and len(error.splitlines()) == 1 and not out, error


def test_a_run_folder_means_its_export(
    leyden: Any, workplace: Path, policy: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "run").mkdir()
    (workplace / "run" / "config.yaml").write_text("model: {}\n")
    policy.save(workplace / "run" / "export")
    answers = []
    for model in ("run", "tiny"):
        monkeypatch.setattr("sys.stdin", io.StringIO("What is 2 plus 3?\n"))
        code, out, error = leyden("chat", model, "--max-new-tokens", "8", "--seed", "5", "--system", "Be brief.")
        assert code == 0, error
        answers.append(out)
    assert answers[0] == answers[1] != "\n"


# -- a terminal ------------------------------------------------------------------------------------------------------


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.main, there = os.openpty()  # type: ignore[attr-defined, unused-ignore]
        words = (sys.executable, "-m", "leyden", "chat", *words)
        environment = os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        streams = dict(stdin=there, stdout=there, stderr=there)
        self.process = subprocess.Popen(words, **streams, env=environment, start_new_session=True, preexec_fn=_owned)  # type: ignore[call-overload]
        os.close(there)
        self.shown = b""

    def until(self, words: str = "", seconds: float = 240) -> str:
        """What is shown until these words are, or any at all; what comes after them is kept for later."""
        end = time.monotonic() + seconds
        while not (words.encode() in self.shown if words else self.shown.strip()):
            assert time.monotonic() < end, self.shown.decode(errors="replace")
            if select.select([self.main], [], [], 1)[0]:
                self.shown += os.read(self.main, 4096)
        at = self.shown.find(words.encode()) + len(words.encode()) if words else len(self.shown)
        found, self.shown = self.shown[:at], self.shown[at:]
        return found.decode(errors="ignore")  # a read may end inside a character

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())


def _owned() -> None:
    """Make the terminal the process's own, so that Ctrl-C reaches it, also where tests run in the background and it is
    ignored."""
    import fcntl
    import signal
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of POSIX")
def test_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal("tiny", "--temperature", "4", "--max-new-tokens", "1000")
    try:
        assert "/help for commands" in terminal.until("> ")
        terminal.type("안녕하세요?\n")
        terminal.until("안녕하세요?\r\n")  # as it was typed
        terminal.until()  # the first words of the answer
        terminal.type("\x03")
        assert "(stopped)" in terminal.until("(stopped)")
        terminal.type(f"/save {tmp_path}/chat.jsonl\n")
        terminal.until("turns added")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.main)
    (row,) = (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    question, answer = json.loads(row)["messages"]
    assert question["content"] == "안녕하세요?" and answer["content"] and LOST not in answer["content"]
