"""The texts that benchmarks embed: the demo's sentences, varied until there are enough of them, and texts of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

SENTENCES = Path(__file__).parent.parent / "demo" / "sentences.txt"


def sentences() -> list[str]:
    """The demo's sentences, of mixed lengths."""
    return SENTENCES.read_text().splitlines()


def distinct(count: int, salt: str) -> list[str]:
    """`count` different texts whose lengths are those of the sentences; another `salt` gives other texts."""
    known = sentences()
    return [f"{known[i % len(known)]} {salt}{i // len(known)}" for i in range(count)]


_OTHER_SENTENCES = [
    "Der Fluss trat nach drei Tagen Regen über die Ufer, und die Brücke am alten Markt wurde gesperrt.",
    "Die Bäckerei öffnet um sechs, aber das Roggenbrot kommt erst gegen acht aus dem Ofen.",
    "La bibliothèque ferme à midi le samedi ; les livres se rendent dans la boîte près de l'entrée.",
    "Ce train s'arrête à toutes les gares, sauf le dimanche et les jours fériés.",
    "El puerto estuvo cerrado por la niebla, y los pescadores esperaron hasta el mediodía.",
    "Para llegar al museo, siga la calle mayor y doble a la derecha después del puente.",
    "Il motore si spegne da solo quando la temperatura dell'acqua supera i novanta gradi.",
    "O café da montanha amadurece devagar e por isso tem um gosto mais doce.",
    "Sneeuw bleef liggen tot in april, en de tulpen kwamen drie weken later dan anders.",
    "Klasztor stoi na wzgórzu, a droga do niego prowadzi przez las i stary kamieniołom.",
    "Поезд опоздал на сорок минут, потому что на мосту меняли рельсы.",
    "Осенью в этом лесу много грибов, но собирать их нужно осторожно.",
    "Το πλοίο φεύγει το πρωί και φτάνει στο νησί πριν από το μεσημέρι.",
    "Köprü gece boyunca kapalı kalacak; arabalar eski yoldan gidecek.",
    "يفتح السوق عند الفجر، ويغلق قبل غروب الشمس بساعة.",
    "הגשם הראשון ירד השנה כבר בספטמבר, ולכן השדות ירוקים.",
    "इस साल बारिश देर से आई और किसानों ने धान की जगह बाजरा बोया।",
    "รถไฟขบวนสุดท้ายออกจากสถานีเวลาสี่ทุ่มครึ่ง",
    "Chuyến phà cuối cùng rời bến lúc chín giờ tối.",
    "电池在低温下会更快地失去电量，所以冬天要多带一块。",
    "这座桥修了七年，通车以后两岸之间只要十分钟。",
    "山の上の小屋まで四時間かかり、途中に水場は一つしかない。",
    "新しい図書館は駅のすぐそばにあり、夜九時まで開いている。",
    "눈이 많이 와서 학교는 이틀 동안 문을 닫았다.",
    "def area(width: float, height: float) -> float:\n    return width * height  # square metres",
    "SELECT name, COUNT(*) FROM orders JOIN customers USING (customer_id) GROUP BY name HAVING COUNT(*) > 3;",
    '{"order": 48213, "lines": [{"item": "A-17", "count": 4}, {"item": "B-02", "count": 1}], "paid": true}',
    "ERROR 2031-04-17T08:22:51Z worker-7: connection reset by peer (attempt 3 of 5), retrying in 1.6 s",
    "https://shop.example.org/catalogue/lamps?colour=green&page=4#reviews",
    "3.14159 2.71828 1.41421 0.57722 1.61803 6.02214e23 1.60218e-19 299792458",
    "🚲 🌧️ ☕ — late again!!! :-(",
    "¿?",
]
_WORDS = [
    "bridge",
    "yes",
    "42",
    "Zürich",
    "tax",
    "水",
    "photosynthesis",
    "ok",
    "recipe",
    "a",
    "GPU",
    "left-handed",
]


def varied(count: int) -> list[str]:
    """`count` different texts of many kinds, always the same ones: words, questions, sentences in some twenty languages,
    code, numbers, and documents of up to some thousand words."""
    random = Random(0)
    known = sentences() + _OTHER_SENTENCES
    plain = sentences()
    makers: list[Callable[[], str]] = [
        lambda: " ".join(random.sample(_WORDS, random.randint(1, 4))),
        lambda: random.choice(known),
        lambda: random.choice(_OTHER_SENTENCES),
        lambda: " ".join(random.choice(plain).split()[: random.randint(2, 9)]) + "?",
        lambda: " ".join(random.sample(plain, 2)),
        lambda: " ".join(random.sample(known, random.randint(3, 8))),
        lambda: " ".join(random.sample(_OTHER_SENTENCES, random.randint(2, 12))),
        lambda: "\n".join(random.choices(known, k=random.randint(10, 80))),
        lambda: " ".join(random.sample(" ".join(plain).split(), random.randint(5, 60))),
    ]
    made: dict[str, None] = {}
    turn = 0
    while len(made) < count:
        made[makers[turn % len(makers)]()] = None
        turn += 1
    return list(made)


SHORT_WORDS = 24
"""Of the longest of the demo's sentences that is no paragraph."""


def short(count: int, salt: str) -> list[str]:
    """`count` different texts of 1 to 24 words; another `salt` gives other texts."""
    known = [line for line in sentences() if len(line.split()) <= SHORT_WORDS]
    return [f"{known[i % len(known)]} {salt}{i // len(known)}" for i in range(count)]


def any_length(count: int, salt: str) -> list[str]:
    """`count` different texts whose lengths spread as those of real documents do (log-normal, 3 to 120 words, half of them above 12),
    in no order; of English words, so that MiniLM reads each whole; another `salt` gives other texts."""
    random = Random(salt)
    words = [word for word in " ".join(sentences()).split() if word.isascii()]
    made = []
    for number in range(count):
        length = min(120, max(3, round(random.lognormvariate(2.5, 0.8))))
        start = random.randrange(len(words) - length)
        made.append(" ".join([*words[start : start + length], f"{salt}{number}"]))
    return made
