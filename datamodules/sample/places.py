"""Facts about countries and workplaces, as tables of the form that `leyden.datamodules.sample.world` describes."""

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
