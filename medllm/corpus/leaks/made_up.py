"""Made-up exam problems in Japanese and English, for measuring a search for copies. None of it is medicine.

Cases are put together from stock sentences, findings and laboratory values at random, as exams do it; what is asked about are
invented names. Many problems therefore share sentences, questions and options, and none is another's copy.
"""

from __future__ import annotations

import random

from medllm.exam.problem import Problem

_SYLLABLES = "ロ ミ タ ネ ゾ ギュ ヴァ ド リ ケ ノ パ セ ブ ラ モ シ テ ル ビ".split()
_ROOTS = "ven tal mor dex lin quor bas nep zil fra cor tem plu sar vin".split()
_COMPLAINTS = (
    "発熱 咳嗽 腹痛 頭痛 胸痛 呼吸困難 めまい 下痢 嘔吐 関節痛 皮疹 浮腫 動悸 倦怠感 体重減少 血尿 耳鳴 複視 嚥下困難 不眠"
).split()
_COURSES = (
    "{n}日前から{a}が出現し、市販薬を服用したが改善しなかった。",
    "{n}か月前から階段を昇ると{a}を自覚するようになった。",
    "{n}週間前に旅行から帰り、その翌日から{a}と{b}が続いている。",
    "健康診断で異常を指摘されたが、{n}年間受診していなかった。",
    "昨夜から{a}が強くなり、今朝は{b}も加わった。",
    "{n}年前に{x}と診断され、近くの診療所で治療を受けている。",
)
_SIGNS = (
    "右下腹部に圧痛を認める。",
    "両側の下肺野に水泡音を聴取する。",
    "左頸部に径2cmのリンパ節を触知する。",
    "手指に左右対称性の腫脹を認める。",
    "項部硬直を認める。",
    "足背動脈の拍動が減弱している。",
    "体幹に紅斑が散在している。",
    "腱反射は亢進している。",
    "肝を右肋骨弓下に3cm触知する。",
    "心尖部に汎収縮期雑音を聴取する。",
)
_STEMS = (
    "治療薬として適切なのはどれか。",
    "次に行う検査はどれか。",
    "最も考えられる疾患はどれか。",
    "認められるのはどれか。",
    "誤っているのはどれか。",
)
_ENGLISH = (
    "A {age}-year-old {sex} comes to the clinic because of a {n}-week history of {a} and {b}. {x} was found {m} years ago and "
    "is treated with {y}. Temperature is {t} C, pulse {p}/min and blood pressure {s}/{d} mm Hg. Examination shows {sign}. "
    "Leukocyte count is {w}/mm3 and serum {z} is {v} mg/dL. Which of the following is the most appropriate next step?"
)
_TROUBLES = (
    "fatigue,night sweats,joint pain,blurred vision,loss of appetite,dry cough,back pain,palpitations,swollen legs,a rash"
).split(",")
_FOUND = (
    "tender nodes in the neck,a firm spleen tip,crackles at both bases,a weak left arm,a grade 2 murmur,pale eyelids".split(",")
)


def made_up_problems(count: int, seed: int = 0) -> list[Problem]:
    """``count`` problems: every fifth in English, of the Japanese ones half with a case and half of a line."""
    chance = random.Random(f"made up/{seed}")
    kinds = (_case, _line, _case, _line, _english)
    return [kinds[number % len(kinds)](chance, f"made-up-{seed}-{number}") for number in range(count)]


def made_up_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of the same words as the problems that ask nothing: what documents are filled with."""
    chance = random.Random(f"text/{seed}")
    return ["".join(_sentences(chance, 12)) + _examination(chance) + "".join(_sentences(chance, 12)) for _ in range(count)]


def _case(chance: random.Random, name: str) -> Problem:
    first, second = chance.sample(_COMPLAINTS, 2)
    opening = f"{chance.randint(18, 92)}歳の{chance.choice(['男性', '女性'])}。{first}と{second}を主訴に来院した。"
    text = opening + "現病歴：" + "".join(_sentences(chance, 2)) + "現症：" + _examination(chance) + chance.choice(_STEMS)
    return Problem(name, text, _options(chance), ("a",))


def _line(chance: random.Random, name: str) -> Problem:
    disease = _name(chance) + chance.choice(["病", "症候群", "炎", "腫"])
    text = f"{disease}の{chance.choice(_COMPLAINTS)}について{chance.choice(_STEMS)}"
    options = tuple(sentence.removesuffix("。") for sentence in _sentences(chance, 3)) + _options(chance)[:2]
    return Problem(name, text, options, ("a",))


def _english(chance: random.Random, name: str) -> Problem:
    first, second = chance.sample(_TROUBLES, 2)
    text = _ENGLISH.format(
        age=chance.randint(18, 92),
        sex=chance.choice(["man", "woman"]),
        n=chance.randint(2, 12),
        m=chance.randint(1, 20),
        a=first,
        b=second,
        x=_latin(chance).capitalize() + " disease",
        y=_latin(chance),
        z=_latin(chance),
        t=round(chance.uniform(36, 40), 1),
        p=chance.randint(55, 130),
        s=chance.randint(90, 190),
        d=chance.randint(50, 110),
        w=chance.randint(2000, 19000),
        v=chance.randint(2, 400),
        sign=chance.choice(_FOUND),
    )
    return Problem(name, text, tuple(_latin(chance).capitalize() for _ in range(5)), ("a",))


def _sentences(chance: random.Random, count: int) -> list[str]:
    drawn = []
    for _ in range(count):
        first, second = chance.sample(_COMPLAINTS, 2)
        drawn.append(chance.choice(_COURSES).format(n=chance.randint(2, 14), a=first, b=second, x=_name(chance) + "病"))
    return drawn


def _examination(chance: random.Random) -> str:
    vital = (
        f"体温{round(chance.uniform(35.5, 40), 1)}℃。脈拍{chance.randint(50, 140)}/分、整。"
        f"血圧{chance.randint(80, 200)}/{chance.randint(40, 110)}mmHg。"
    )
    red, haemoglobin, white = chance.randint(250, 550), round(chance.uniform(6, 17), 1), chance.randint(1, 199) * 100
    blood = f"血液所見：赤血球{red}万、Hb{haemoglobin}g/dL、白血球{white}。"
    return vital + "".join(chance.sample(_SIGNS, 2)) + blood + f"CRP{round(chance.uniform(0, 25), 1)}mg/dL。"


def _options(chance: random.Random) -> tuple[str, ...]:
    kind = chance.choice(["投与", "検査", "切除術", "抗体測定", "療法"])
    return tuple(_name(chance) + kind for _ in range(5))


def _name(chance: random.Random) -> str:
    return "".join(chance.choices(_SYLLABLES, k=chance.randint(3, 5)))


def _latin(chance: random.Random) -> str:
    return "".join(chance.choices(_ROOTS, k=chance.randint(2, 3)))
