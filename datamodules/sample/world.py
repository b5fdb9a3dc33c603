"""Facts about living things and everyday objects, in Korean and English side by side, and the reader of tables.

One table a relation. A line is one fact: `Korean subject = Korean answer | English subject = English answer`. Both
halves say the same thing, so that a fact held out of training is held out in both languages. A table in which one
language has no such word leaves that half empty.
"""

from __future__ import annotations

SOUND = """
강아지 = 멍멍 | the dog = woof
고양이 = 야옹 | the cat = meow
소 = 음매 | the cow = moo
돼지 = 꿀꿀 | the pig = oink
닭 = 꼬끼오 | the rooster = cock-a-doodle-doo
병아리 = 삐악삐악 | the chick = cheep
오리 = 꽥꽥 | the duck = quack
참새 = 짹짹 | the sparrow = tweet
까마귀 = 까악까악 | the crow = caw
개구리 = 개굴개굴 | the frog = ribbit
말 = 히힝 | the horse = neigh
호랑이 = 어흥 | the lion = roar
쥐 = 찍찍 | the mouse = squeak
매미 = 맴맴 | the bee = buzz
부엉이 = 부엉부엉 | the owl = hoot
뻐꾸기 = 뻐꾹뻐꾹 | the cuckoo = cuckoo-cuckoo
"""

YOUNG = """
개 = 강아지 | dog = a puppy
소 = 송아지 | cow = a calf
닭 = 병아리 | chicken = a chick
말 = 망아지 | horse = a foal
개구리 = 올챙이 | frog = a tadpole
곰 = 능소니 | bear = a cub
꿩 = 꺼병이 | goose = a gosling
호랑이 = 개호주 | duck = a duckling
명태 = 노가리 | swan = a cygnet
매미 = 굼벵이 | cat = a kitten
 | sheep = a lamb
 | pig = a piglet
 | deer = a fawn
 | kangaroo = a joey
 | owl = an owlet
"""

COLOUR = """
바나나 = 노란색 | a banana = yellow
딸기 = 빨간색 | a strawberry = red
하늘 = 파란색 | the sky = blue
눈 = 하얀색 | snow = white
풀 = 초록색 | grass = green
숯 = 검은색 | coal = black
당근 = 주황색 | a carrot = orange
가지 = 보라색 | an eggplant = purple
코끼리 = 회색 | an elephant = grey
초콜릿 = 갈색 | chocolate = brown
병아리 = 노란색 | a chick = yellow
토마토 = 빨간색 | a tomato = red
바다 = 파란색 | the sea = blue
우유 = 하얀색 | milk = white
오이 = 초록색 | a cucumber = green
까마귀 = 검은색 | a crow = black
귤 = 주황색 | a tangerine = orange
포도 = 보라색 | a grape = purple
쥐 = 회색 | a mouse = grey
커피 = 갈색 | coffee = brown
레몬 = 노란색 | a lemon = yellow
소방차 = 빨간색 | a fire engine = red
소금 = 하얀색 | salt = white
개구리 = 초록색 | a frog = green
"""

TOOL = """
나무를 자를 때 쓰는 도구 = 톱 | cutting wood = a saw
못을 박을 때 쓰는 도구 = 망치 | driving in nails = a hammer
종이를 자를 때 쓰는 도구 = 가위 | cutting paper = scissors
글씨를 쓸 때 쓰는 도구 = 연필 | writing = a pencil
글씨를 지울 때 쓰는 도구 = 지우개 | rubbing out writing = an eraser
국을 떠먹을 때 쓰는 도구 = 숟가락 | eating soup = a spoon
반찬을 집을 때 쓰는 도구 = 젓가락 | picking up noodles = chopsticks
이를 닦을 때 쓰는 도구 = 칫솔 | cleaning teeth = a toothbrush
머리를 가지런히 할 때 쓰는 도구 = 빗 | combing hair = a comb
비를 막을 때 쓰는 도구 = 우산 | keeping off rain = an umbrella
바닥을 쓸 때 쓰는 도구 = 빗자루 | sweeping the floor = a broom
시간을 볼 때 쓰는 도구 = 시계 | telling the time = a clock
길이를 잴 때 쓰는 도구 = 자 | measuring length = a ruler
무게를 잴 때 쓰는 도구 = 저울 | measuring weight = a scale
열을 잴 때 쓰는 도구 = 체온계 | measuring fever = a thermometer
옷을 꿰맬 때 쓰는 도구 = 바늘 | sewing clothes = a needle
땅을 팔 때 쓰는 도구 = 삽 | digging the ground = a shovel
문을 열 때 쓰는 도구 = 열쇠 | opening a lock = a key
옷을 다릴 때 쓰는 도구 = 다리미 | smoothing clothes = an iron
사진을 찍을 때 쓰는 도구 = 카메라 | taking photos = a camera
별을 볼 때 쓰는 도구 = 망원경 | watching the stars = a telescope
밥을 지을 때 쓰는 도구 = 밥솥 | boiling water = a kettle
불을 끌 때 쓰는 도구 = 소화기 | putting out a fire = an extinguisher
물고기를 낚을 때 쓰는 도구 = 낚싯대 | catching fish = a fishing rod
"""

COUNT = """
개의 다리 수 = 4개 | legs on a dog = 4
새의 다리 수 = 2개 | legs on a bird = 2
거미의 다리 수 = 8개 | legs on a spider = 8
개미의 다리 수 = 6개 | legs on an ant = 6
오징어의 다리 수 = 10개 | arms on a squid = 10
새의 날개 수 = 2개 | wings on a bird = 2
자동차의 바퀴 수 = 4개 | wheels on a car = 4
자전거의 바퀴 수 = 2개 | wheels on a bicycle = 2
세발자전거의 바퀴 수 = 3개 | wheels on a tricycle = 3
삼각형의 변의 수 = 3개 | sides in a triangle = 3
사각형의 변의 수 = 4개 | sides in a square = 4
오각형의 변의 수 = 5개 | sides in a pentagon = 5
육각형의 변의 수 = 6개 | sides in a hexagon = 6
한 손의 손가락 수 = 5개 | fingers on one hand = 5
두 손의 손가락 수 = 10개 | fingers on two hands = 10
얼굴에 있는 눈의 수 = 2개 | eyes on a face = 2
얼굴에 있는 코의 수 = 1개 | noses on a face = 1
일주일의 날수 = 7일 | days in a week = 7
일 년의 달수 = 12달 | months in a year = 12
하루의 시간 수 = 24시간 | hours in a day = 24
한 시간의 분 수 = 60분 | minutes in an hour = 60
계절의 수 = 4개 | seasons in a year = 4
무지개의 색의 수 = 7개 | colours in a rainbow = 7
기타의 줄 수 = 6개 | strings on a guitar = 6
바이올린의 줄 수 = 4개 | strings on a violin = 4
축구 한 팀의 선수 수 = 11명 | players in a football team = 11
농구 한 팀의 선수 수 = 5명 | players in a basketball team = 5
야구 한 팀의 선수 수 = 9명 | players in a baseball team = 9
"""

KIND = """
사과 = 과일 | the apple = a fruit
배추 = 채소 | the cabbage = a vegetable
고양이 = 동물 | the cat = an animal
장미 = 꽃 | the rose = a flower
버스 = 탈것 | the bus = a vehicle
피아노 = 악기 | the piano = an instrument
의자 = 가구 | the chair = furniture
바지 = 옷 | the shirt = clothing
축구 = 운동 | football = a sport
참새 = 새 | the sparrow = a bird
포도 = 과일 | the grape = a fruit
당근 = 채소 | the carrot = a vegetable
사자 = 동물 | the lion = an animal
튤립 = 꽃 | the tulip = a flower
기차 = 탈것 | the train = a vehicle
바이올린 = 악기 | the violin = an instrument
책상 = 가구 | the desk = furniture
치마 = 옷 | the skirt = clothing
농구 = 운동 | tennis = a sport
독수리 = 새 | the eagle = a bird
수박 = 과일 | the melon = a fruit
시금치 = 채소 | spinach = a vegetable
토끼 = 동물 | the rabbit = an animal
해바라기 = 꽃 | the sunflower = a flower
비행기 = 탈것 | the plane = a vehicle
기타 = 악기 | the guitar = an instrument
침대 = 가구 | the bed = furniture
양말 = 옷 | the coat = clothing
수영 = 운동 | swimming = a sport
비둘기 = 새 | the pigeon = a bird
"""

NEXT = """
월요일 다음 날 = 화요일 | the day after Monday = Tuesday
화요일 다음 날 = 수요일 | the day after Tuesday = Wednesday
수요일 다음 날 = 목요일 | the day after Wednesday = Thursday
목요일 다음 날 = 금요일 | the day after Thursday = Friday
금요일 다음 날 = 토요일 | the day after Friday = Saturday
토요일 다음 날 = 일요일 | the day after Saturday = Sunday
일요일 다음 날 = 월요일 | the day after Sunday = Monday
월요일 전날 = 일요일 | the day before Monday = Sunday
화요일 전날 = 월요일 | the day before Tuesday = Monday
수요일 전날 = 화요일 | the day before Wednesday = Tuesday
목요일 전날 = 수요일 | the day before Thursday = Wednesday
금요일 전날 = 목요일 | the day before Friday = Thursday
토요일 전날 = 금요일 | the day before Saturday = Friday
일요일 전날 = 토요일 | the day before Sunday = Saturday
봄 다음 계절 = 여름 | the season after spring = summer
여름 다음 계절 = 가을 | the season after summer = autumn
가을 다음 계절 = 겨울 | the season after autumn = winter
겨울 다음 계절 = 봄 | the season after winter = spring
"""


def table(text: str) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """The lines of a table as ((Korean subject, answer), (English subject, answer)); an empty half is ("", "")."""
    facts = []
    for line in text.strip("\n").splitlines():
        halves = [tuple(part.strip() for part in half.split("=")) for half in line.split("|")]
        korean, english = ((half[0], half[1]) if len(half) == 2 else ("", "") for half in halves)
        facts.append((korean, english))
    return facts
