"""A few hundred texts of many kinds, always the same: what `embedq verify` compares by default."""

from __future__ import annotations

__all__ = ["sample_texts"]

_SUBJECTS: tuple[tuple[str, ...], ...] = (
    (
        "Bread rises because yeast turns sugar into gas that the dough holds back.",
        "A sourdough starter wants flour and water every day, and a warm place in the kitchen.",
        "Salt slows the yeast down and makes the crumb firmer.",
        "Let the loaf cool before you cut it, or the crumb will stick to the knife.",
        "Rye has little gluten, so a rye loaf stays low and keeps for a week.",
    ),
    (
        "The tide follows the moon, and is highest when sun and moon pull in one line.",
        "A neap tide comes with the half moon and moves the least water.",
        "Harbour pilots plan by tables that list high and low water for every day of the year.",
        "In a narrow bay the tide may climb more than ten metres.",
        "Salt marshes live from being flooded twice a day.",
    ),
    (
        "A consumer group shares the partitions of a topic among its members.",
        "The broker keeps a record until its retention time is over, whether anybody has read it or not.",
        "An offset is committed only after the work behind it is done.",
        "When a member leaves, its partitions go to the others, which is called a rebalance.",
        "Compaction keeps the newest record of each key.",
    ),
    (
        "The patient reported a dry cough for three weeks and no fever.",
        "Antibiotics do nothing against a virus.",
        "Blood pressure is measured at rest, with the arm at the height of the heart.",
        "Vaccines train the immune system with a harmless part of the germ.",
        "The surgeon closed the wound with seven stitches under local anaesthesia.",
    ),
    (
        "The court held that the contract was void because one party was a minor.",
        "Rent is due on the third working day of each month.",
        "Either side may end this agreement with ninety days' notice in writing.",
        "The appeal was dismissed, and each party bears its own costs.",
        "Personal data shall be erased when it is no longer needed for its purpose.",
    ),
    (
        "Shares fell after the central bank raised its rate by half a point.",
        "The company's revenue grew by twelve percent, its profit by three.",
        "A bond's price falls when interest rates rise.",
        "Inflation eats savings that earn nothing.",
        "The invoice is payable within thirty days without deduction.",
    ),
    (
        "The striker scored twice in the last five minutes and the stadium shook.",
        "She won the marathon in two hours and twenty-one minutes.",
        "The match was called off because the pitch was under water.",
        "A rally in badminton may last for more than a hundred strokes.",
        "Their goalkeeper saved a penalty with his left foot.",
    ),
    (
        "Glaciers grind rock into flour, which turns the lakes below them milky blue.",
        "The volcano had slept for four hundred years before it woke.",
        "Granite cools slowly, deep in the earth, so its crystals grow large.",
        "Earthquakes start where two plates are stuck and then let go.",
        "Sandstone remembers the rivers and deserts that laid it down.",
    ),
    (
        "The violin's bridge carries the strings' trembling to the belly of the instrument.",
        "He wrote the quartet in a single summer and never heard it played.",
        "A fugue begins with one voice, and the others answer it in turn.",
        "Jazz lives from what is not written down.",
        "The organ has four thousand pipes, the longest of them ten metres.",
    ),
    (
        "Swifts sleep in the air and land only to breed.",
        "An octopus has three hearts and tastes with its arms.",
        "Bees dance to tell each other where the lime trees are in bloom.",
        "The lynx came back to these woods after two hundred years.",
        "Eels swim across an ocean to spawn where they were born.",
    ),
    (
        "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)",
        "SELECT customer, SUM(amount) FROM orders WHERE paid GROUP BY customer HAVING SUM(amount) > 1000;",
        "for (let i = 0; i < rows.length; i++) { console.log(rows[i].name); }",
        'fn main() { let words = vec!["red", "green"]; println!("{}", words.len()); }',
        "git log --oneline --since=yesterday | wc -l",
    ),
    (
        "Traceback: KeyError: 'user_id' in handler.py, line 42",
        '{"level": "warning", "event": "disk_almost_full", "free_bytes": 1048576, "host": "db-3"}',
        "The service answers 503 since the last deployment; roll it back and tell the team.",
        "Restart the router, wait two minutes, then try again.",
        "How do I change my password if I no longer have the old phone?",
    ),
    (
        "Der Zug nach Innsbruck fährt heute von Gleis sieben ab.",
        "Im Herbst färben sich die Blätter, und morgens liegt Nebel über dem Fluss.",
        "Bitte senden Sie die unterschriebene Vollmacht bis Freitag zurück.",
        "Die Geschwindigkeitsbegrenzung gilt auch für Fahrräder.",
        "Ohne Wasser gäbe es auf der Erde kein Leben.",
    ),
    (
        "Le marché ouvre à huit heures et ferme quand il n'y a plus de poisson.",
        "La bibliothèque prête aussi des instruments de musique.",
        "Il pleut depuis trois jours, et la rivière monte.",
        "Veuillez trouver ci-joint la facture du mois de mars.",
        "El museo cierra los lunes y abre gratis los domingos por la tarde.",
    ),
    (
        "A cidade acorda com o cheiro do café.",
        "Il treno per Bologna è in ritardo di venti minuti.",
        "Pociąg do Krakowa odjeżdża o szóstej rano.",
        "Tren saat dokuzda kalkıyor, biletinizi unutmayın.",
        "Tàu đi Huế khởi hành lúc tám giờ tối.",
    ),
    (
        "今日は朝から雪が降っていて、電車が遅れている。",
        "図書館は九時に開きます。",
        "北京的秋天很短，但是非常美。",
        "请在三十天内付款。",
        "서울에는 오늘 비가 온다고 합니다.",
    ),
    (
        "Поезд отправляется в семь часов утра с третьей платформы.",
        "Зимой озеро покрывается толстым льдом.",
        "Το πλοίο για τη Νάξο φεύγει στις επτά.",
        "القطار إلى الإسكندرية يغادر في الساعة الثامنة.",
        "הספרייה פתוחה עד שמונה בערב.",
    ),
    (
        "आज शाम को बारिश होने की संभावना है।",
        "รถไฟไปเชียงใหม่ออกเวลาสองทุ่ม",
        "E = mc², so a gram of matter holds about 9 × 10¹³ joules.",
        "∑ 1/n² = π²/6",
        "🎉 We shipped it! 🚀 Thanks to everybody who stayed late 🙏",
    ),
    (
        "ok",
        "No.",
        "12,50 €",
        "2024-02-29T23:59:59Z",
        "Order 4711-A, 3 pieces, grey, size M",
    ),
    (
        "The lease, the keys and the meter readings are handed over on the last day.",
        "Solar panels on the roof pay for themselves in about nine years.",
        "A heat pump moves three units of warmth with one unit of current.",
        "Insulate the attic first: warm air rises.",
        "The old boiler was noisy, dirty and surprisingly reliable.",
    ),
)

_QUESTIONS = (
    "why does {} matter",
    "{}: an introduction for beginners",
    "what is the difference between {} and {}",
    "history of {}",
    "best book about {}",
)
_TOPICS = (
    "sourdough bread",
    "spring tides",
    "consumer groups",
    "blood pressure",
    "rental contracts",
    "interest rates",
    "marathon training",
    "glaciers",
    "string quartets",
    "bird migration",
    "database indexes",
    "disk failures",
    "railway timetables",
    "fish markets",
    "coffee growing",
    "snowfall in Japan",
    "frozen lakes",
    "monsoon rains",
    "time zones",
    "heat pumps",
)


def sample_texts() -> list[str]:
    """Single sentences, questions, paragraphs and long documents, in ten scripts, code among them; no two are equal."""
    sentences = [sentence for subject in _SUBJECTS for sentence in subject]
    questions = [
        form.format(topic, _TOPICS[(n + 7) % len(_TOPICS)])
        for n, topic in enumerate(_TOPICS)
        for form in _QUESTIONS
    ]
    paragraphs = [
        " ".join((*subject[turn:], *subject[:turn])[:length])
        for subject in _SUBJECTS
        for turn, length in ((0, 2), (1, 3), (3, 4), (2, 5))
    ]
    # Each document begins at another sentence, and is three sentences longer than the one before.
    documents = [
        " ".join(sentences[(7 * n + i) % len(sentences)] for i in range(8 + 3 * n)) for n in range(24)
    ]
    return [*sentences, *questions, *paragraphs, *documents]
