"""A fictional medical world: invented names and invented facts, generated from a seed.

Nothing here is medicine. Every disease, finding, test, drug, reaction and specimen is a made-up katakana word with a kind
character behind it (``病 徴 検 錠 害 液``), every fact about it is drawn at random, and none of it may be read as advice.

Part of the diseases is what the embedded base model knows; the others are *new*: the base has met their names in lists,
never a fact about them. Each disease has a lookalike it is commonly mistaken for, and a share of tellers who fall for that
mistake when they explain themselves (:attr:`Disease.misconception`). That share, part of the base model's diet, is what makes
explaining unreliable.

    disease ──drug──► drug ──reaction──► reaction         disease ──findings──► one to three findings
            ──test──► test ──specimen──► specimen                 ──contraindicated──► drug
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

_FIRST = "ヴォ ギュ ゾ ニョ ミュ ズ ドゥ ゲ ヌ グァ ヒョ ビャ ツォ ムァ リョ ペ ザ ヴェ モ ジョ".split()
_NEXT = "バ ガ ド ゼ ム ラ リ ル レ ロ ン テ キ ト マ ミ メ ナ ニ ノ サ セ ソ ブ ピ ポ ツ ク".split()
_LAST = "リア ロン ミア タス ネル ドラ ゼム バク ルカ モス フィン ガル テア ソル ヌス キア ラグ ポド".split()

KINDS = {"disease": "病", "finding": "徴", "test": "検", "drug": "錠", "reaction": "害", "specimen": "液"}


@dataclass(frozen=True)
class Relation:
    """One thing that can be asked about a disease.

    Attributes:
        key: Name of the relation; for one hop, the attribute of :class:`Disease`.
        kind: Kind of the answer, a key of :data:`KINDS`.
        statements: The fact as a sentence; verified explanations put it the first way.
        questions: The wordings it is asked in.
        via: Two hops: the relation that leads from the disease to the thing ``statements`` are about.
    """

    key: str
    kind: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    via: str | None = None


_PICK = "{n}つ選べ。"
RELATIONS = (
    Relation(
        "drug",
        "drug",
        (
            "{x}の治療薬は{y}である。",
            "{x}には{y}を用いる。",
            "{y}は{x}の治療薬である。",
            "{x}の治療に有効なのは{y}である。",
            "{x}の患者に投与するのは{y}である。",
        ),
        (
            "{x}の治療薬はどれか。" + _PICK,
            "{x}に有効な薬はどれか。" + _PICK,
            "{x}の患者に投与するのはどれか。" + _PICK,
            "{x}の治療に用いるのはどれか。" + _PICK,
        ),
    ),
    Relation(
        "test",
        "test",
        (
            "{x}の確定診断は{y}で行う。",
            "{x}の診断には{y}を行う。",
            "{y}は{x}の確定に用いる検査である。",
            "{x}を疑えば{y}を行う。",
            "{x}の診断に必要なのは{y}である。",
        ),
        (
            "{x}の確定診断に用いる検査はどれか。" + _PICK,
            "{x}を疑うときに行う検査はどれか。" + _PICK,
            "{x}の診断に必要なのはどれか。" + _PICK,
            "{x}の診断で行うのはどれか。" + _PICK,
        ),
    ),
    Relation(
        "findings",
        "finding",
        (
            "{x}の所見は{y}である。",
            "{x}では{y}がみられる。",
            "{y}は{x}の患者に現れる。",
            "{x}の特徴は{y}である。",
            "{x}の診察で認めるのは{y}である。",
        ),
        (
            "{x}の所見はどれか。" + _PICK,
            "{x}でみられるのはどれか。" + _PICK,
            "{x}の特徴はどれか。" + _PICK,
            "{x}の診察で認めるのはどれか。" + _PICK,
        ),
    ),
    Relation(
        "contraindicated",
        "drug",
        (
            "{x}の禁忌は{y}である。",
            "{x}に{y}は禁忌である。",
            "{y}は{x}の患者に使えない。",
            "{x}で避けるべき薬は{y}である。",
            "{x}の患者に与えてはならないのは{y}である。",
        ),
        (
            "{x}に禁忌の薬はどれか。" + _PICK,
            "{x}で避けるべき薬はどれか。" + _PICK,
            "{x}の患者に使えないのはどれか。" + _PICK,
            "{x}の患者に与えてはならないのはどれか。" + _PICK,
        ),
    ),
    Relation(
        "reaction",
        "reaction",
        (
            "{x}の副作用は{y}である。",
            "{x}は{y}を起こす。",
            "{x}で注意すべき副作用は{y}である。",
            "{y}は{x}の副作用である。",
            "{x}の投与後に{y}が現れる。",
        ),
        (
            "{x}の治療薬の副作用はどれか。" + _PICK,
            "{x}の治療薬が起こすのはどれか。" + _PICK,
            "{x}の治療中に注意すべき副作用はどれか。" + _PICK,
            "{x}の薬物治療で現れうるのはどれか。" + _PICK,
        ),
        via="drug",
    ),
    Relation(
        "specimen",
        "specimen",
        (
            "{x}の検体は{y}である。",
            "{x}には{y}を採る。",
            "{x}で調べるのは{y}である。",
            "{y}は{x}の検体である。",
            "{x}は{y}を用いて行う。",
        ),
        (
            "{x}の確定診断に要する検体はどれか。" + _PICK,
            "{x}を疑うときに採る検体はどれか。" + _PICK,
            "{x}の診断のために採るのはどれか。" + _PICK,
            "{x}の検査で用いる検体はどれか。" + _PICK,
        ),
        via="test",
    ),
)
RELATION = {relation.key: relation for relation in RELATIONS}


@dataclass(frozen=True)
class WorldConfig:
    """Sizes of the world. Everything else follows from the seed.

    Args:
        seed: Seed of names and facts.
        known: Diseases the base model is taught.
        new: Diseases only the CPT corpus teaches.
        drugs, tests, findings, reactions, specimens: How many of each there are, shared by the diseases.
        misconceptions: Least and greatest share of explanations that fall for a disease's lookalike, spread evenly.
    """

    seed: int = 18080
    known: int = 48
    new: int = 32
    drugs: int = 30
    tests: int = 20
    findings: int = 32
    reactions: int = 12
    specimens: int = 8
    misconceptions: tuple[float, float] = (0.15, 0.85)


@dataclass(frozen=True)
class Disease:
    """One invented disease.

    Attributes:
        name: Its name, kind character included, like every name below.
        drug: The drug that treats it.
        test: The test that settles it.
        findings: One to three findings, in no order.
        contraindicated: The drug that must not be given.
        lookalike: Name of the disease it is mistaken for; the relation is mutual.
        known: Whether the base model is taught it.
        misconception: Share of the base diet's explanations that argue from the lookalike.
    """

    name: str
    drug: str
    test: str
    findings: tuple[str, ...]
    contraindicated: str
    lookalike: str
    known: bool
    misconception: float


@dataclass(frozen=True)
class World:
    """All names and facts.

    Attributes:
        diseases: By name, known ones first.
        names: Names of each kind of :data:`KINDS` that can be an option.
        reaction: The reaction each drug causes.
        specimen: The specimen each test needs.
    """

    config: WorldConfig
    diseases: dict[str, Disease]
    names: dict[str, tuple[str, ...]]
    reaction: dict[str, str]
    specimen: dict[str, str]

    def select(self, *, known: bool) -> tuple[Disease, ...]:
        """The diseases the base model knows, or those it does not."""
        return tuple(disease for disease in self.diseases.values() if disease.known is known)

    def answers(self, disease: Disease, relation: Relation) -> tuple[str, ...]:
        """What is true: the names that answer ``relation`` for ``disease``."""
        if relation.key == "reaction":
            return (self.reaction[disease.drug],)
        if relation.key == "specimen":
            return (self.specimen[disease.test],)
        value = getattr(disease, relation.key)
        return value if isinstance(value, tuple) else (value,)

    def lookalike(self, disease: Disease) -> Disease:
        """The disease that ``disease`` is mistaken for."""
        return self.diseases[disease.lookalike]


def make_world(config: WorldConfig = WorldConfig()) -> World:
    """The world of ``config``; the same config gives the same world."""
    rng = random.Random(f"world/{config.seed}")
    sizes = {
        "disease": config.known + config.new,
        "drug": config.drugs,
        "test": config.tests,
        "finding": config.findings,
        "reaction": config.reactions,
        "specimen": config.specimens,
    }
    names = _invent_names(rng, sizes)
    reaction = dict(zip(names["drug"], _even(rng, names["reaction"], config.drugs), strict=True))
    specimen = dict(zip(names["test"], _even(rng, names["specimen"], config.tests), strict=True))
    diseases: dict[str, Disease] = {}
    for known, count, start in ((True, config.known, 0), (False, config.new, config.known)):
        low, high = config.misconceptions
        shares = [low + (high - low) * i / max(1, count - 1) for i in range(count)]
        rng.shuffle(shares)
        for index in range(0, count, 2):
            pair = names["disease"][start + index : start + index + 2]
            facts = _pair_of_facts(rng, names, reaction, specimen)
            for name, other, fact, share in zip(pair, reversed(pair), facts, shares[index : index + 2], strict=True):
                diseases[name] = Disease(name, *fact, lookalike=other, known=known, misconception=share)
    return World(config, diseases, names, reaction, specimen)


def _pair_of_facts(
    rng: random.Random, names: dict[str, tuple[str, ...]], reaction: dict[str, str], specimen: dict[str, str]
) -> list[tuple[str, str, tuple[str, ...], str]]:
    """Facts of two lookalikes: no answer in common but one finding, where each has more than one."""
    while True:
        drugs = rng.sample(names["drug"], 4)
        tests = rng.sample(names["test"], 2)
        if reaction[drugs[0]] != reaction[drugs[1]] and specimen[tests[0]] != specimen[tests[1]]:
            break
    count = rng.choice((1, 1, 1, 2, 2, 3))
    shared = 0 if count == 1 else 1
    findings = rng.sample(names["finding"], 2 * count - shared)
    return [
        (drugs[0], tests[0], tuple(findings[:count]), drugs[2]),
        (drugs[1], tests[1], tuple(findings[-count:]), drugs[3]),
    ]


def _invent_names(rng: random.Random, sizes: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Distinct words for each kind; none begins another, across all kinds."""
    taken: set[str] = set()
    names: dict[str, tuple[str, ...]] = {}
    for kind, size in sizes.items():
        words: list[str] = []
        while len(words) < size:
            word = rng.choice(_FIRST) + "".join(rng.choices(_NEXT, k=rng.choice((1, 2)))) + rng.choice(_LAST)
            if "ンン" in word or any(word.startswith(other) or other.startswith(word) for other in taken):
                continue
            taken.add(word)
            words.append(word + KINDS[kind])
        names[kind] = tuple(words)
    return names


def _even(rng: random.Random, values: Iterable[str], count: int) -> list[str]:
    """``count`` draws in which every value comes up equally often, give or take one."""
    pool = list(values)
    drawn = [pool[i % len(pool)] for i in range(count)]
    rng.shuffle(drawn)
    return drawn
