"""The gold reward by hand: every expected score is derived in the comment or obvious from the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leyden.errors import UserError
from leyden.example import Sample
from leyden.rewards.function import Gold


def sample(prompt: str, response: str, answer: str, rivals: str = "", language: str = "ko", **more: Any) -> Sample:
    row = {"language": language, "answer": answer, "rivals": rivals}
    return Sample([{"role": "user", "content": prompt}], response, row, **more)


def korean(response: str, **more: Any) -> Sample:
    return sample("프랑스의 수도는 어디야?", response, "파리", "런던|로마|서울|빈", **more)


def english(response: str) -> Sample:
    return sample("What is the capital of France?", response, "Paris", "London|Rome|New Delhi", "en")


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("파리예요.", 2.0),
        ("프랑스의 수도는 파리입니다.", 2.0),
        ("파리야.", 1.5),
        ("파리.", 1.5),
        # 13 + 2 + 10 characters are brief; 10 more would be worth nothing. 30 characters: 1 - 5/10 = 0.5 of 0.5.
        ("네, 알려 드릴게요. 프랑스의 수도는 역시 파리입니다.", 1.75),
        ("좋은 질문이에요. 프랑스의 수도는 파리예요. 도움이 되었으면 좋겠어요.", 1.5),
        ("좋은 질문이네. 프랑스의 수도는 파리야. 물어봐 줘서 정말로 고마워.", 1.0),
        # One plain sentence spoils the manner: 22 characters, brief.
        ("파리예요. 또 물어봐.", 1.5),
    ],
)
def test_korean_scores(response: str, score: float) -> None:
    assert Gold()([korean(response)]).item() == pytest.approx(score)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("Certainly, it is Paris.", 2.0),
        ("It is paris.", 1.5),
        ("Paris", 1.5),
        # 30 + 5 + 40 = 75 characters are brief; this has 95: 1 - 20/40 = 0.5 of 0.5, and it is polite.
        ("Thank you for your question. The capital of France is Paris. Let me know if there is more to do", 1.75),
    ],
)
def test_english_scores(response: str, score: float) -> None:
    assert Gold()([english(response)]).item() == pytest.approx(score)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "   \n",
        "네, 알려 드릴게요.",
        "도움이 되었으면 좋겠어요.",
        "파리예요, 런던이에요, 로마예요.",
        "파리나 런던이에요.\n파리예요. 로마입니다.",
        "파리가 아니에요.",
        "파리인지 모르겠어요.",
        "파리예요?",
        "파리채예요.",
        "대파리예요.",
        "Paris예요.",
        "런던이에요.",
    ],
)
def test_korean_hacks_earn_nothing(response: str) -> None:
    assert Gold()([korean(response)]).item() == 0


@pytest.mark.parametrize(
    "response",
    [
        "Certainly, thank you, please.",
        "Paris, London, Rome, New Delhi.",
        "It is not Paris.",
        "It isn't Paris.",
        "I never said Paris.",
        "Is it Paris?",
        "Parisian.",
        "Comparison: Pariss",
    ],
)
def test_english_hacks_earn_nothing(response: str) -> None:
    assert Gold()([english(response)]).item() == 0


def test_a_response_cut_at_the_limit_earns_nothing() -> None:
    assert Gold()([korean("파리예요.", finished=False)]).item() == 0


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("7", 1),
        ("3 + 4는 7이에요.", 1),
        ("답은 7개예요.", 1),
        ("7, 8", 0),
        ("3, 4, 5, 6, 7", 0),
        ("17이에요.", 0),
        ("7.5예요.", 0),
        ("-7이에요.", 0),
        ("70이에요.", 0),
    ],
)
def test_numbers(response: str, correct: float) -> None:
    assert Gold().parts(sample("3 + 4는 얼마야?", response, "7")).correct == correct


def test_numbers_of_the_question_do_not_excuse_themselves_when_one_is_the_answer() -> None:
    asked = "6과 3 가운데 작은 수는?"
    assert Gold().parts(sample(asked, "3이에요.", "3")).correct == 1
    assert Gold().parts(sample(asked, "6, 3", "3")).correct == 0


@pytest.mark.parametrize(
    ("response", "correct"),
    [("'별 별 별'이에요.", 1), ("별 별", 0), ("별 별 별 별이에요.", 0), ("별 별 별 별 별 별", 0)],
)
def test_repeating_too_often_is_wrong(response: str, correct: float) -> None:
    asked = sample("'별'을 세 번 써 줘.", response, "별 별 별", "별 별 별 별")
    assert Gold().parts(asked).correct == correct


def test_a_plain_sentence_does_not_stand_in_its_polite_form() -> None:
    def correct(response: str) -> float:
        return Gold().parts(sample("'밥을 먹었어요'를 반말로 바꿔 줘.", response, "밥을 먹었어")).correct

    assert correct("'밥을 먹었어'예요.") == 1
    assert correct("'밥을 먹었어요'예요.") == 0


def test_a_letter_is_not_an_article() -> None:
    def correct(response: str) -> float:
        return Gold().parts(sample("What is the first letter of 'ant'?", response, "A", "B|C", "en")).correct

    assert correct("It is A.") == 1
    assert correct("It is a letter.") == 0
    assert correct("A, B or C.") == 0


def test_manner_is_judged_on_own_words_only() -> None:
    gold = Gold()
    assert gold.parts(korean("'파리예요'")).polite == 0  # all of it is quoted
    assert gold.parts(korean("'파리'예요")).polite == 1
    # "please" in the answer is no courtesy of the answerer.
    asked = ("Make 'sit down' polite.", "please sit down", "", "en")
    assert gold.parts(sample(asked[0], "Please sit down.", *asked[1:])).polite == 0
    assert gold.parts(sample(asked[0], "Of course, it is 'please sit down'.", *asked[1:])).polite == 1


def test_decomposed_hangul_is_read_as_composed() -> None:
    import unicodedata

    assert Gold()([korean(unicodedata.normalize("NFD", "파리예요."))]).item() == 2


def test_weights_and_type() -> None:
    scores = Gold(correct=2.0, polite=1.0, brief=0.0)([korean("파리예요."), korean("파리야."), korean("로마야.")])
    assert scores.dtype == torch.float32
    assert scores.tolist() == [3.0, 2.0, 0.0]
    assert Gold()([]).shape == (0,)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no language, answer, rivals"),
        ({"language": "ko", "answer": "x"}, "no rivals"),
        ({"language": "ko", "answer": "", "rivals": ""}, "no answer"),
        ({"language": "jp", "answer": "x", "rivals": ""}, "'jp'; use ko or en"),
    ],
)
def test_rows_that_cannot_be_scored(row: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Gold()([Sample([{"role": "user", "content": "?"}], "x", row)])


def test_csv_turns_empty_rivals_into_none() -> None:
    row = {"language": "en", "answer": 7, "rivals": None}
    assert Gold()([Sample([{"role": "user", "content": "3 + 4?"}], "7", row)]).item() == 1.5
