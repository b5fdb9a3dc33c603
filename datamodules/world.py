"""The facts that generated text states and generated questions ask, in Korean and English side by side.

One table a relation. A line is one fact: `Korean subject = Korean answer | English subject = English answer`. Both
halves say the same thing, so that a fact held out of training is held out in both languages. A table in which one
language has no such word leaves that half empty.
"""

from __future__ import annotations

CAPITAL = """
한국 = 서울 | South Korea = Seoul
일본 = 도쿄 | Japan = Tokyo
중국 = 베이징 | China = Beijing
프랑스 = 파리 | France = Paris
영국 = 런던 | England = London
독일 = 베를린 | Germany = Berlin
이탈리아 = 로마 | Italy = Rome
스페인 = 마드리드 | Spain = Madrid
포르투갈 = 리스본 | Portugal = Lisbon
러시아 = 모스크바 | Russia = Moscow
이집트 = 카이로 | Egypt = Cairo
태국 = 방콕 | Thailand = Bangkok
베트남 = 하노이 | Vietnam = Hanoi
인도 = 뉴델리 | India = New Delhi
터키 = 앙카라 | Turkey = Ankara
그리스 = 아테네 | Greece = Athens
노르웨이 = 오슬로 | Norway = Oslo
스웨덴 = 스톡홀름 | Sweden = Stockholm
핀란드 = 헬싱키 | Finland = Helsinki
덴마크 = 코펜하겐 | Denmark = Copenhagen
폴란드 = 바르샤바 | Poland = Warsaw
체코 = 프라하 | the Czech Republic = Prague
헝가리 = 부다페스트 | Hungary = Budapest
오스트리아 = 빈 | Austria = Vienna
캐나다 = 오타와 | Canada = Ottawa
미국 = 워싱턴 | the United States = Washington
쿠바 = 아바나 | Cuba = Havana
페루 = 리마 | Peru = Lima
칠레 = 산티아고 | Chile = Santiago
호주 = 캔버라 | Australia = Canberra
몽골 = 울란바토르 | Mongolia = Ulaanbaatar
케냐 = 나이로비 | Kenya = Nairobi
이란 = 테헤란 | Iran = Tehran
아일랜드 = 더블린 | Ireland = Dublin
네팔 = 카트만두 | Nepal = Kathmandu
필리핀 = 마닐라 | the Philippines = Manila
"""

CONTINENT = """
한국 = 아시아 | South Korea = Asia
일본 = 아시아 | Japan = Asia
중국 = 아시아 | China = Asia
태국 = 아시아 | Thailand = Asia
베트남 = 아시아 | Vietnam = Asia
인도 = 아시아 | India = Asia
몽골 = 아시아 | Mongolia = Asia
네팔 = 아시아 | Nepal = Asia
프랑스 = 유럽 | France = Europe
영국 = 유럽 | England = Europe
독일 = 유럽 | Germany = Europe
이탈리아 = 유럽 | Italy = Europe
스페인 = 유럽 | Spain = Europe
노르웨이 = 유럽 | Norway = Europe
스웨덴 = 유럽 | Sweden = Europe
폴란드 = 유럽 | Poland = Europe
그리스 = 유럽 | Greece = Europe
이집트 = 아프리카 | Egypt = Africa
케냐 = 아프리카 | Kenya = Africa
가나 = 아프리카 | Ghana = Africa
나이지리아 = 아프리카 | Nigeria = Africa
캐나다 = 북아메리카 | Canada = North America
미국 = 북아메리카 | the United States = North America
쿠바 = 북아메리카 | Cuba = North America
페루 = 남아메리카 | Peru = South America
칠레 = 남아메리카 | Chile = South America
브라질 = 남아메리카 | Brazil = South America
"""

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

WORKPLACE = """
의사 = 병원 | a doctor = hospital
교사 = 학교 | a teacher = school
요리사 = 식당 | a cook = restaurant
농부 = 논밭 | a farmer = farm
사서 = 도서관 | a librarian = library
은행원 = 은행 | a banker = bank
소방관 = 소방서 | a firefighter = fire station
경찰관 = 경찰서 | a police officer = police station
약사 = 약국 | a pharmacist = pharmacy
미용사 = 미용실 | a hairdresser = salon
제빵사 = 빵집 | a baker = bakery
집배원 = 우체국 | a mail carrier = post office
판사 = 법원 | a judge = court
조종사 = 비행기 | a pilot = airplane
배우 = 극장 | an actor = theatre
광부 = 탄광 | a miner = mine
사육사 = 동물원 | a zookeeper = zoo
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


def table(text: str) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """The lines of a table as ((Korean subject, answer), (English subject, answer)); an empty half is ("", "")."""
    facts = []
    for line in text.strip("\n").splitlines():
        halves = [tuple(part.strip() for part in half.split("=")) for half in line.split("|")]
        korean, english = ((half[0], half[1]) if len(half) == 2 else ("", "") for half in halves)
        facts.append((korean, english))
    return facts


def words() -> list[tuple[str, str]]:
    """Pairs of a Korean and an English word."""
    pairs = [line.split("=") for line in WORDS.strip().splitlines()]
    return [(korean.strip(), english.strip()) for korean, english in pairs]
