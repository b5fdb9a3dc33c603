"""Words: opposites, as a table of the form that `leyden.datamodules.sample.world` describes, and translations."""

from __future__ import annotations

OPPOSITE = """
크다 = 작다 | big = small
길다 = 짧다 | long = short
높다 = 낮다 | high = low
빠르다 = 느리다 | fast = slow
덥다 = 춥다 | hot = cold
무겁다 = 가볍다 | heavy = light
밝다 = 어둡다 | bright = dark
넓다 = 좁다 | wide = narrow
많다 = 적다 | many = few
두껍다 = 얇다 | thick = thin
강하다 = 약하다 | strong = weak
쉽다 = 어렵다 | easy = difficult
가깝다 = 멀다 | near = far
깊다 = 얕다 | deep = shallow
열다 = 닫다 | open = closed
사다 = 팔다 | buy = sell
웃다 = 울다 | laugh = cry
오다 = 가다 | come = go
주다 = 받다 | give = take
앉다 = 서다 | sit = stand
이기다 = 지다 | win = lose
위 = 아래 | up = down
앞 = 뒤 | front = back
안 = 밖 | inside = outside
왼쪽 = 오른쪽 | left = right
낮 = 밤 | day = night
아침 = 저녁 | morning = evening
시작 = 끝 | start = end
여름 = 겨울 | summer = winter
남자 = 여자 | man = woman
거짓 = 진실 | false = true
전쟁 = 평화 | war = peace
기쁨 = 슬픔 | happy = sad
부자 = 거지 | rich = poor
선생님 = 학생 | teacher = student
"""

WORDS = """
물 = water
불 = fire
집 = house
책 = book
손 = hand
발 = foot
눈 = eye
코 = nose
산 = mountain
강 = river
바다 = sea
하늘 = sky
별 = star
달 = moon
해 = sun
비 = rain
꽃 = flower
나무 = tree
새 = bird
개 = dog
고양이 = cat
물고기 = fish
빵 = bread
우유 = milk
사과 = apple
밥 = rice
소금 = salt
설탕 = sugar
친구 = friend
학교 = school
문 = door
창문 = window
길 = road
옷 = clothes
돈 = money
시간 = time
사랑 = love
꿈 = dream
노래 = song
음악 = music
"""
"""Korean and English words that mean the same, for translation and as material for rewriting."""


def pairs() -> list[tuple[str, str]]:
    """Pairs of a Korean and an English word."""
    lines = [line.split("=") for line in WORDS.strip().splitlines()]
    return [(korean.strip(), english.strip()) for korean, english in lines]
