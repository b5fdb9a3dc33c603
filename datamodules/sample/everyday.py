"""Everyday sentences in Korean and English, made from small tables: material for pretraining text and for rewriting."""

from __future__ import annotations

from random import Random

from leyden.datamodules.sample.korean import particle

KOREAN_ACTIONS = """
밥을 먹어 먹었 먹을
물을 마셔 마셨 마실
책을 읽어 읽었 읽을
영화를 봐 봤 볼
음악을 들어 들었 들을
운동을 해 했 할
숙제를 해 했 할
청소를 해 했 할
산책을 해 했 할
요리를 해 했 할
친구를 만나 만났 만날
편지를 써 썼 쓸
노래를 불러 불렀 부를
그림을 그려 그렸 그릴
옷을 사 샀 살
선물을 받아 받았 받을
사진을 찍어 찍었 찍을
창문을 열어 열었 열
문을 닫아 닫았 닫을
손을 씻어 씻었 씻을
버스를 타 탔 탈
학교에 가 갔 갈
회사에 가 갔 갈
시장에 가 갔 갈
병원에 가 갔 갈
집에 와 왔 올
바다에 가 갔 갈
방에서 자 잤 잘
공원에서 뛰어 뛰었 뛸
도서관에서 공부해 공부했 공부할
카페에서 기다려 기다렸 기다릴
전화를 걸어 걸었 걸
커피를 마셔 마셨 마실
빵을 만들어 만들었 만들
꽃을 심어 심었 심을
강아지를 키워 키웠 키울
여행을 떠나 떠났 떠날
일찍 일어나 일어났 일어날
늦게 자 잤 잘
천천히 걸어 걸었 걸을
많이 웃어 웃었 웃을
푹 쉬어 쉬었 쉴
"""
KOREAN_WHO = (
    "나 친구 동생 엄마 아빠 언니 형 누나 오빠 할머니 할아버지 선생님 민수 지우 서연 하준 우리 아저씨 아이들".split()
)
KOREAN_WHEN = (
    "오늘;지금;요즘;매일;아침마다;저녁마다;주말마다;가끔;자주".split(";"),
    "어제;아까;지난주에;작년에;오늘 아침에;방금;그저께;지난 주말에".split(";"),
    "내일;이따가;다음 주에;내년에;모레;오늘 저녁에;곧;이번 주말에".split(";"),
)
KOREAN_TALK = """
오늘 기분이 안 좋아|무슨 일이 있었는지 말해 봐
시험에 떨어졌어|많이 속상했겠다. 다음에는 잘될 거야
너무 힘들어|오늘은 푹 쉬어. 고생 많았어
배고파|맛있는 것을 먹으러 가자
졸려|조금 자는 게 어때
날씨가 참 좋다|산책하기 좋은 날이야
비가 와|우산을 꼭 가져가
눈이 와|길이 미끄러우니까 조심해
남자친구랑 헤어졌어|마음이 많이 아프겠다. 시간이 약이야
여자친구랑 싸웠어|먼저 사과해 보는 건 어때
좋아하는 사람이 생겼어|용기를 내서 고백해 봐
그 사람이 자꾸 생각나|많이 좋아했나 봐
살이 쪘어|천천히 운동하면 괜찮아질 거야
돈이 없어|이번 달은 아껴 써야겠다
회사에 가기 싫어|조금만 더 힘내
내일 면접을 봐|잘할 수 있을 거야. 응원할게
감기에 걸렸어|따뜻한 물을 많이 마시고 쉬어
여행을 가고 싶어|어디로 가고 싶은지 말해 줘
심심해|재미있는 영화를 보는 게 어때
고마워|나도 고마워
미안해|괜찮아. 다 이해해
생일 축하해|고마워. 정말 기뻐
외로워|내가 옆에 있을게
잠이 안 와|따뜻한 우유를 마셔 봐
합격했어|정말 축하해. 노력한 보람이 있다
머리를 잘랐어|새 머리가 잘 어울려
뭐 먹을까|김치찌개는 어때
시간이 너무 빨라|그래서 하루하루가 소중해
친구가 연락을 안 해|바쁜 일이 있을지도 몰라
결혼하고 싶어|좋은 사람을 만날 거야
화가 나|깊게 숨을 쉬어 봐
불안해|괜찮아. 다 잘될 거야
"""

ENGLISH_ACTIONS = """
eat rice|ate rice
drink water|drank water
read a book|read a book
watch a film|watched a film
open the door|opened the door
close the window|closed the window
clean the room|cleaned the room
wash the dishes|washed the dishes
call a friend|called a friend
write a letter|wrote a letter
sing a song|sang a song
draw a picture|drew a picture
walk the dog|walked the dog
feed the cat|fed the cat
buy some bread|bought some bread
make some tea|made some tea
take a photo|took a photo
ride the bus|rode the bus
go to school|went to school
go to the park|went to the park
wait at the station|waited at the station
study at the library|studied at the library
turn on the light|turned on the light
bring the book|brought the book
plant a tree|planted a tree
play the piano|played the piano
help the teacher|helped the teacher
cook dinner|cooked dinner
come home|came home
get up early|got up early
"""
ENGLISH_WHO = (
    "I;we;they;you;my friend;my brother;my sister;the teacher;my mother;my father;Tom;Anna;the children".split(";")
)
ENGLISH_PAST = "yesterday;this morning;last week;last night;on Sunday;a moment ago".split(";")
ENGLISH_FUTURE = "tomorrow;this evening;next week;on Monday;soon;after lunch".split(";")
ENGLISH_TALK = """
I am tired today.|You should get some rest.
I passed the test!|Well done, I am happy for you.
It is raining.|Take an umbrella with you.
I am hungry.|Let us find something to eat.
I had a bad day.|I am sorry to hear that. Tell me about it.
Thank you so much.|You are welcome.
I am bored.|How about a walk in the park?
I cannot sleep.|Try a cup of warm milk.
Happy birthday!|Thank you, that is very kind.
I miss my friend.|Why not write a letter?
I have a cold.|Drink something warm and rest.
I am nervous.|Take a deep breath. It will be fine.
"""


def korean_forms(draw: Random, tense: int | None = None) -> dict[str, str]:
    """One action in every style: `plain` 먹었어, `polite` 먹었어요, `formal` 먹었습니다, `written` 먹었다.

    `tense` is 0 for the present (which has no formal and written form here), 1 for the past, 2 for the future.
    """
    *rest, present, past, future = draw.choice(KOREAN_ACTIONS.strip().splitlines()).split()
    front = " ".join(rest) + " "
    tense = draw.randrange(3) if tense is None else tense
    if tense == 0:
        return {"plain": front + present, "polite": front + present + "요", "when": draw.choice(KOREAN_WHEN[0])}
    if tense == 1:
        endings = {"plain": past + "어", "polite": past + "어요", "formal": past + "습니다", "written": past + "다"}
    else:
        endings = {
            "plain": future + " 거야",
            "polite": future + " 거예요",
            "formal": future + " 것입니다",
            "written": future + " 것이다",
        }
    return {style: front + ending for style, ending in endings.items()} | {"when": draw.choice(KOREAN_WHEN[tense])}


def korean_sentence(draw: Random) -> str:
    """One everyday sentence."""
    forms = korean_forms(draw)
    when = forms.pop("when")
    style = draw.choice(sorted(forms))
    who = draw.choice(KOREAN_WHO)
    if who == "나" and style in ("polite", "formal"):
        who = "저"
    subject = particle(who, "은") if draw.random() < 0.6 or who in ("나", "저") else particle(who, "이")
    return draw.choice([f"{subject} {when} {forms[style]}.", f"{when} {subject} {forms[style]}."])


def english_sentence(draw: Random) -> str:
    """One everyday sentence."""
    base, past = draw.choice(ENGLISH_ACTIONS.strip().splitlines()).split("|")
    who = draw.choice(ENGLISH_WHO)
    if draw.random() < 0.5:
        sentence = f"{who} {past} {draw.choice(ENGLISH_PAST)}."
    else:
        sentence = f"{who} will {base} {draw.choice(ENGLISH_FUTURE)}."
    return sentence[0].upper() + sentence[1:]


def talk(draw: Random, language: str) -> tuple[str, str]:
    """A remark and a fitting reply."""
    lines = KOREAN_TALK if language == "ko" else ENGLISH_TALK
    remark, reply = draw.choice(lines.strip().splitlines()).split("|")
    return (remark, reply) if language == "en" else (remark + ".", reply + ".")
