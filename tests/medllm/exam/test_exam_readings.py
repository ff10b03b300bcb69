"""Answers in the forms that models write them in, form by form; the grammar is in docs/answers.md."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medllm.exam.answers import Reading, Readings, extract_answer
from medllm.exam.problem import LETTERS, Problem
from medllm.exam.prompts import curation_response, render_answer

STONES = ("赤い石", "青い石", "黒い砂", "白い砂", "緑の星")
METALS = ("Copper", "Silver", "Gold", "Iron", "Tin")


def _read(text, count=1, explanation=False, options=STONES):
    return extract_answer(text, Problem("x", "", options, tuple(LETTERS[:count])), explanation=explanation)


# (wanted, an explanation was asked for, text, letters or why there are none[, options])
FORMS = [
    (1, False, "<think>\nまず考える。答え: a\n</think>\n\n答え: d", "d"),
    (1, False, "考える。答え: a</think>\n\nd", "d"),
    (1, True, "<thinking>a?</thinking>\n解説。\n答え: d", "d"),
    (1, False, "<think>考える", "cut_off"),
    (1, False, "<think>考える</think>", "empty"),
    (1, False, "<think></think>", "empty"),
    (1, False, "[THINK]b[/THINK]d", "d"),
    (1, False, "<|channel|>analysis<|message|>answer: b<|end|><|start|>assistant<|channel|>final<|message|>d<|return|>", "d"),
    (1, False, "<unused94>thought\nanswer: b<unused95>d", "d"),
    (1, False, "<|START_THINKING|>b<|END_THINKING|><|START_RESPONSE|>d<|END_RESPONSE|>", "d"),
    (1, False, "analysisWe think b.assistantfinal【回答】d", "d"),
    (1, False, "<|im_start|>assistant\nd<|im_end|>", "d"),
    (1, False, "d</s>", "d"),
    (1, False, "d<end_of_turn>\n<start_of_turn>user\n次は?\n答え: a", "d"),
    (1, False, "d<｜end▁of▁sentence｜>", "d"),
    (2, False, "b, d<|endoftext|>問題: 次\n答え: a", "bd"),
    (1, False, "<s> d </s>", "d"),
    (1, False, "[/INST] d", "d"),
    (1, False, "<|start_header_id|>assistant<|end_header_id|>\n\nd<|eot_id|>", "d"),
    (1, False, "<answer>d</answer>", "d"),
    (1, True, "理由。\n<answer>\nd\n</answer>", "d"),
    (1, False, "<|begin_of_box|>d<|end_of_box|>", "d"),
    (1, False, '{"answer": "d"}', "d"),
    (1, False, '{"answer": "d: 白い砂"}', "d"),
    (1, False, '{"reasoning": "a is wrong", "answer": "D"}', "d"),
    (2, False, '```json\n{\n  "answer": ["B", "D"],\n  "confidence": 0.9\n}\n```', "bd"),
    (2, False, '{"answer": "b,d"}', "bd"),
    (2, False, '{"回答": "b、d"}', "bd"),
    (1, False, '{"answer": "D", "explanation": "途中で切', "d"),
    (1, False, "{'answer': 'd'}", "d"),
    (1, False, '{"answer": 4}', "d"),
    (1, False, '{"answer": "d"}\n\n{"answer": "a"}', "d"),
    (1, False, '{"choice": "d"}', "d"),
    (1, False, '{"answer": ""}', ""),
    (1, False, '{"final_answer": "d"}', "d"),
    (1, False, "【回答】d", "d"),
    (1, False, "【回答】：d", "d"),
    (1, False, "【解答】\n\n**d**", "d"),
    (1, True, "説明。\n\n### 解答\n\nd", "d"),
    (1, True, "説明。\n\n**Final Answer**\n\n**D: 白い砂**", "d"),
    (1, False, "### 答え\nd: 白い砂\n\n### 解説\naは誤り。", "d"),
    (2, False, "## 正解\n- b\n- d", "bd"),
    (1, False, "[正解] d", "d"),
    (1, True, "...\n\n### 正解：**d**", "d"),
    (1, False, "**正解**\n正解は **d** です。", "d"),
    (1, False, "■解答\nd", "d"),
    (1, True, "説明\n最終回答：d", "d"),
    (1, True, "説明\n\n**最終的な答え：d**", "d"),
    (1, True, "x.\n\n**Correct Answer:** D", "d"),
    (1, True, "x.\n\nThe correct answer is:\n\n**D. Iron**", "d", METALS),
    (1, True, "d。", "d"),
    (1, True, "(d)", "d"),
    (2, True, "b、d", "bd"),
    (1, True, "白い砂", "d"),
    (1, True, "d. 白い砂", "d"),
    (1, True, "**d**", "d"),
    (2, True, "b\nd", "bd"),
    (1, False, "正解は **d** です。", "d"),
    (1, False, "正解は「d: 白い砂」です。", "d"),
    (1, False, "**d: 白い砂** が正解です。", "d"),
    (1, False, "正解は**d**です", "d"),
    (1, False, "正答は **(d) 白い砂** です。理由は…", "d"),
    (2, False, "正解は **b: 青い石** と **d: 白い砂** です。", "bd"),
    (1, False, "答えは「白い砂」です。", "d"),
    (1, False, "この問題の正解は **d 白い砂** です。", "d"),
    (3, False, "正解は a、b、d です。", "abd"),
    (3, False, "答え: a, b, d", "abd"),
    (3, False, "a・b・d", "abd"),
    (2, False, "答え: bとd(順不同)", "bd"),
    (2, False, "b. 青い石, d. 白い砂", "bd"),
    (3, False, "a: 赤い石、b: 青い石、d: 白い砂", "abd"),
    (2, False, "b（青い石）とd（白い砂）", "bd"),
    (2, False, "答え: b, d の2つ", "bd"),
    (2, False, "b と d が正解です。", "bd"),
    (2, False, "正解は b, d の2つです。", "bd"),
    (2, False, "b) Silver and d) Iron", "bd", METALS),
    (2, False, "B and D", "bd", METALS),
    (2, False, "Both B and D", "bd", METALS),
    (2, False, "答え：b（青い石）、d（白い砂）", "bd"),
    (1, False, "a, b, d", "too_many"),
    (1, False, "d（白い砂）", "d"),
    (1, False, "d - 白い砂", "d"),
    (1, False, "d – white sand", "d"),
    (1, False, "d「白い砂」", "d"),
    (1, False, "選択肢d（白い砂）", "d"),
    (1, False, "D) Iron (Fe)", "d", METALS),
    (1, False, "Option D: Iron", "d", METALS),
    (1, False, "d 白い砂（細粒）", "d"),
    (1, False, "The answer is D (iron, the hard one).", "d", METALS),
    (1, False, "d：白い細かい砂", "d"),
    (1, True, "x\n\nTherefore, the most likely answer is D.", "d", METALS),
    (1, True, "x\n\nThe answer is probably D.", "d", METALS),
    (1, True, "x\n\nThus, the best answer is likely D) Iron.", "d", METALS),
    (1, False, "正解はおそらくdです。", "d"),
    (1, False, "答えはdだと思われます。", "d"),
    (1, False, "答えはdと考えられる。", "d"),
    (1, True, "x\n\nHence the correct option is D.", "d", METALS),
    (1, True, "x.\n\nSo, the correct answer would be D.", "d", METALS),
    (1, True, "x.\n\nThe most appropriate choice is D: Iron.", "d", METALS),
    (1, True, "x.\n\nTherefore, the answer is D, not B.", "d", METALS),
    (1, False, "I would choose D.", "d", METALS),
    (1, False, "The answer should be option D.", "d", METALS),
    (1, False, "It is most likely D.", "d", METALS),
    (2, False, "b\n\nd", "bd"),
    (2, False, "- b: 青い石\n- d: 白い砂", "bd"),
    (2, False, "正解は以下の2つです。\n- b. 青い石\n- d. 白い砂", "bd"),
    (2, False, "1. b\n2. d", "bd"),
    (2, False, "答え:\nb\nd", "bd"),
    (2, False, "青い石\n白い砂", "bd"),
    (2, False, "1. 青い石\n2. 白い砂", "bd"),
    (1, False, "以下の通りです。\n\n**d**", "d"),
    (2, False, "正解は次の通りです：\n\n**b. 青い石**\n\n**d. 白い砂**\n\n解説: …", "bd"),
    (1, False, "a: 赤い石\nb: 青い石\nc: 黒い砂\nd: 白い砂\ne: 緑の星", "too_many"),
    (1, False, "d\n\n問題: 次はどれか。\na 血\n答え: a", "d"),
    (1, False, "答え: d\nuser\n次の問題。\nassistant\n答え: b", "d"),
    (1, False, "d\n\nQuestion: which?\nAnswer: B", "d", METALS),
    (1, False, "Answer: D\n\nHuman: another\nAssistant: Answer: B", "d", METALS),
    (1, False, "答え: d\n\n### 問題2\n次はどれか。\n答え: b", "d"),
    (1, False, "d\n次の問題を解け。\n答え: a", "d"),
    (1, False, "答え: d\n\n次の文を読んで答えよ。適切なのはどれか。\na: 血\nb: 骨\n答え: b", "d"),
    (1, False, "答え: d\n\n問2 次はどれか。\n答え: b", "d"),
    (1, False, "d\n\nQ: which?\nA: b", "d", METALS),
    (1, False, "answer: d\n<|im_start|>user\nanswer: b", "d"),
    (1, True, "説明。\n答え: d\n\n### Instruction:\nfoo\n### Response:\n答え: b", "d"),
    (1, False, "答え: d\n【問題】次は\n答え: b", "d"),
    (
        1,
        True,
        "解説。\n答え: d\n\n診断はどれか。\na: 血\nb: 骨\n必ずa,b,cの中からちょうど1個選んでください。\n答え: b",
        "d",
    ),
    (1, False, "答え: d\n\n35歳の男性。診断はどれか。\na: 血\nb: 骨\nc: 皮\n答え: b", "d"),
    (1, False, "4", "d"),
    (1, False, "④", "d"),
    (1, False, "(4)", "d"),
    (1, False, "4番", "d"),
    (2, False, "2, 4", "bd"),
    (2, False, "2、4", "bd"),
    (2, False, "②と④", "bd"),
    (1, False, "正解は4です。", "d"),
    (1, False, "答え: 4. 白い砂", "d"),
    (1, False, "選択肢4", "d"),
    (1, False, "Option 4", "d", METALS),
    (1, False, "答え：４", "d"),
    (2, False, "24", "bd"),
    (1, False, "6", ""),
    (1, False, "The answer is 4.", "d", METALS),
    (1, True, "説明。\n\nしたがって、正解はdである。", "d"),
    (1, True, "説明。\n\nよって d", "d"),
    (1, True, "説明。\n以上より、dを選択する。", "d"),
    (1, True, "説明。\n\nd", "d"),
    (1, True, "説明。\n\n**d: 白い砂**", "d"),
    (1, True, "説明。\n\nTherefore, D is correct.", "d", METALS),
    (1, True, "説明。よってd.白い砂が正解となる。", "d"),
    (1, True, "説明。\n\n白い砂", "d"),
    (1, False, "最も考えられるのはd: 白い砂である。", "d"),
    (1, False, "該当するのは d です。", "d"),
    (1, True, "説明。\nしたがって最も適切なのは d 白い砂 である。", "d"),
    (1, False, "正解は選択肢dの白い砂です。", "d"),
    (1, False, "dが最も適切です。", "d"),
    (1, False, "d を選びます。", "d"),
    (1, True, "a は誤り。\nb は誤り。\nしたがって、d が適切である。", "d"),
    (1, True, "aは誤り。\nbは正しい。", ""),
    (1, False, "答え: d\n\n答え:", "d"),
    (1, True, "説明\n答え: d\n答え: ", "d"),
    (1, False, "答え: 答え: d", "d"),
    (1, True, "答え:\n説明する。\n答え: d", "d"),
    (1, False, "$\\boxed{d}$", "d"),
    (1, False, "\\boxed{\\text{(D)}}", "d"),
    (1, True, "x\n\n\\[ \\boxed{\\textbf{D}} \\]", "d"),
    (1, True, "答え: $\\boxed{d: 白い砂}$", "d"),
    (1, False, "わかりません。", "refused"),
    (1, False, "a でも b でもない", ""),
    (1, False, "答え: aかb", "ambiguous"),
    (1, False, "正解は a または b です。", "ambiguous"),
    (1, False, "dではない。", ""),
    (1, False, "The answer is not D.", "", METALS),
    (1, False, "I cannot determine the answer without the image.", "refused", METALS),
    (1, False, "", "empty"),
    (1, False, "答え:", "cut_off"),
    (1, False, "答え: f", ""),
    (1, True, "まず、選択肢aについて考えると", "cut_off"),
    (1, False, "A patient with pain", "", METALS),
    (1, False, "a and b are both possible", "", METALS),
    (1, False, "d: 青い石", "ambiguous"),
    (1, True, "解説。\n正答肢：d", "d"),
    (1, True, "解説。\n〈答え〉d", "d"),
    (1, True, "解説。\n「答え」d", "d"),
    (1, True, "解説。\n答え d", "d"),
    (1, True, "解説。\n答. d", "d"),
    (1, True, "解説。\n解答例：d", "d"),
    (1, True, "解説。\n最適な選択肢：d", "d"),
    (1, True, "解説。\n誤った選択肢：d", ""),
    (2, True, "解説。\n正解の組み合わせ: b, d", "bd"),
    (1, True, "It is a sand.\n\nFinal Answer — **D**", "d"),
    (1, True, "It is a sand.\n\nCorrect option: D", "d"),
    (1, True, "It is a sand.\n\n#### D", "d"),
    (1, True, "Answer: A\n\nNo, that is wrong. Answer: D", "d"),
    (2, True, "解説。\n\\boxed{b}, \\boxed{d}", "bd"),
    (2, True, "解説。\n答え:\n1. b\n2. d", "bd"),
    (3, False, "答え: a,\nb,\nd", "abd"),
    (3, False, "答え: a, b そして d", "abd"),
    (3, False, "答え: a, b、それに d", "abd"),
    (3, False, "答え: a, b、追って d", ""),
    (1, False, "答え: d?", "d"),
    (1, False, "答え：d ※aではない", "d"),
    (1, False, "答え: d/白い砂", "d"),
    (1, False, "答え: d - 白い砂浜", "d"),
    (1, False, "答え: 白い砂（川原の砂）", "d"),
    (1, False, "答え: 白い砂（e）", "ambiguous"),
    (1, False, "答え: 白い砂（d）", "d"),
    (1, True, "考えられるのは白い砂（選択肢d）です。", "d"),
    (1, True, "石の名は白い砂と考えられる。\n結論は白い砂と考えられる。", "d"),
    (1, True, "正解はaではなくdです。", "d"),
    (1, True, "The correct answer is not A but D.", "d"),
    (1, True, "正解は赤い石ではなく白い砂。", "d"),
    (1, True, "正解はdだと思われがちだが、aである。", ""),
    (1, True, "aは違う。bも違う。よってdが正しい。", "d"),
    (1, True, "図がないので判断できませんが、dと考えられます。", "d"),
    (1, False, "I think it's D", "d"),
    (1, False, "a: 誤り。\nb: 誤り。\nc: 誤り。\nd: 正しい。\ne: 誤り。", "d"),
    (1, True, "a. 赤い石 ○\nb. 青い石 ○\nc. 黒い砂 ○\nd. 白い砂 ×\ne. 緑の星 ○", "d"),
    (2, True, "a. 赤い石 ○\nb. 青い石 ○\nc. 黒い砂 ×\nd. 白い砂 ×\ne. 緑の星 ×", "ab"),
    (1, False, "a: 誤り。\nb: 誤り。\nc: 正しい。\nd: 正しい。\ne: 誤り。", "ambiguous"),
    (2, True, "b. 青い石\nd. 白い砂\n\n理由：青と白", "bd"),
    (1, False, '{"answer": {"letter": "d", "text": "白い砂"}}', "d"),
    (1, False, "<ans>d</ans>", "d"),
    (1, False, "[|assistant|]d[|endofturn|]", "d"),
    (1, False, "<seed:think>a</seed:think>d", "d"),
    (1, False, "d\n113A2 次の色は。\na 赤\nb 青\n答え: a", "d"),
    (1, False, "答え: d\n\n例題：\n以下の色\n答え: a", "d"),
    (1, False, "答え: d\n\n2) 次の色はどれか。\n答え: a", "d"),
    (1, False, "Answer: d\n\nA red stone. What is it?\nA. x\nB. y\nAnswer: A", "d"),
    (1, False, "答え：d\n\nこの答えは正しいですか？\n\n答え：a", "d"),
    (1, False, "d<br>次の問題<br>答え: a", "d"),
    (1, False, "d\n\n[問題]\n次の\n[答え]\na", "d"),
    (1, False, "答え：d\n\n以下の問題に答えなさい。\n色\n答え：a", "d"),
    (1, False, "答え：d\n\nあなたは優秀な助手です。\n答え：a", "d"),
    (1, True, "答え: d\n\n25歳の女性。石を拾った。\n\n答え: a", "d"),
    (1, False, "d\n\n### 入力:\n色\n### 応答:\na", "d"),
]

NUMBERS = [
    ("26", "解答: ①2②6", "26"),
    ("26", "①26", "26"),
    ("26", "26 Torr", "26"),
    ("26", "答え: 約26Torr", "26"),
    ("26", "25.7なので四捨五入して26", "26"),
    ("26", "25.7 ≒ 26", "26"),
    ("26", "150-36/0.8-79 = 26", "26"),
    ("146", "解答：146 mg/dL（小数第1位を四捨五入）", "146"),
    ("8.5", "x = 3/4 = 0.75\ny = 8.5", "8.5"),
    ("8.5", "よって、約8.5倍である。", "8.5"),
    ("1.2", "【回答】1.2", "1.2"),
    ("1.2", "①1.②2", "1.2"),
    ("1.2", "① 1 . ② 2", "1.2"),
    ("1.2", "①.②=1.2", "1.2"),
    ("12", "解答: 1.2", "12"),
    ("21", "答え: 2.1 g/日", "21"),
    ("04", "0.4", "04"),
    ("28", "BMI = 84/(1.73)^2 = 28.07 → 28", "28"),
    ("28", "答え: 28 kg/m2", "28"),
    ("28", "答え: 28kg/m^2（小数点以下四捨五入）", "28"),
    ("315", "\\boxed{315}", "315"),
    ("315", "正解は **315 mOsm/kg** です。", "315"),
    ("40", '{"answer": "40"}', "40"),
    ("40", '{"answer": 40}', "40"),
    ("1200", "1,200 mL", "1200"),
    ("26", "①②", ""),
    ("26", "必ず数値で①②に入る", ""),
    ("26", "解答: ①②", ""),
    ("7.5", "体重60kg、1日量 450mg ÷ 60 = 7.5", "7.5"),
    ("26", "計算すると\n36\n79\n26 となる。", "26"),
    ("10", "20%の人口1,000人あたり\n答えは10人", "10"),
    ("60", "1時間=60分\n\n答え 60", "60"),
    ("26", "1つ目は3、2つ目は4", ""),
    ("26", "① 2\n② 6", "26"),
    ("26", "①:2、②:6", "26"),
    ("26", "①に2、②に6", "26"),
    ("-5", "−5", "-5"),
    ("26", "正解は26です。計算は 150-36/0.8 = 105", "26"),
    ("26", "答え: 26^2", ""),
    ("26", "答え: 26、27", ""),
    ("26", "1日あたり 26 個", "26"),
    ("26", "答え: 26個（1回13個）", "26"),
]


@pytest.mark.parametrize("row", FORMS, ids=lambda row: row[2][:24])
def test_every_form_is_read_or_said_not_to_be(row):
    count, explanation, text, wanted, *options = row
    reading = _read(text, count, explanation, *options)
    if wanted and set(wanted) <= set(LETTERS[:5]):
        assert ("".join(reading.answer), reading.reason) == (wanted, "")
    else:
        assert (reading.answer, reading.rule) == ((), "")
        assert reading.reason == wanted or not wanted


@pytest.mark.parametrize(("gold", "text", "number"), NUMBERS)
def test_numbers_are_read_in_every_form(gold, text, number):
    assert "".join(extract_answer(text, Problem("x", "", (), (gold,)), explanation=False).answer) == number


@pytest.mark.parametrize(("question", "right"), [("解答：①．②g", True), ("解答：①②g", False), ("何gか。", False)])
def test_a_gold_answer_hides_a_point_only_where_the_question_prints_one(question, right):
    problem = Problem("x", question, (), ("21",))
    assert (extract_answer("2.1", problem, explanation=False).answer == ("21",)) == right


_PARTS = (
    "赤い石|答え:|a|b,|(d)|正解は|です|。|\n|<think>|</think>|\\boxed{|}|4|①| or |または|【回答】|"
    '{"answer": |"d"|user\n|問題:| '
).split("|")
words = st.lists(st.sampled_from(_PARTS), max_size=12)


@given(words.map("".join) | st.text(max_size=60), st.booleans(), st.integers(1, 3), st.booleans())
def test_a_reading_is_letters_of_the_problem_by_a_rule_or_a_reason(text, explanation, count, numeric):
    problem = Problem("x", "", () if numeric else STONES[:3], ("26",) if numeric else tuple(LETTERS[:count]))
    reading = extract_answer(text, problem, explanation=explanation)
    assert bool(reading.answer) == bool(reading.rule) == (not reading.reason)
    if not numeric:
        assert list(reading.answer) == sorted(set(reading.answer) & set("abc"))
        assert len(reading.answer) <= count


said = st.sampled_from(
    ["{}", "答え: {}", "正解は{}です。", "【回答】{}", "Answer: {}", "The answer is {}.", "\\boxed{{{}}}", '{{"answer": "{}"}}']
)


@given(st.permutations(range(5)), st.integers(0, 4), said, st.sampled_from(["letters", "text", "both"]))
def test_options_in_another_order_give_the_answer_in_that_order(order, option, said, form):
    def answer(options, index):
        letter, text = LETTERS[index], options[index]
        written = {"letters": letter, "text": text, "both": f"{letter}: {text}"}[form]
        return _read(said.format(written), options=options).answer

    moved = tuple(STONES[index] for index in order)
    assert answer(STONES, option) == (LETTERS[option],)
    assert answer(moved, moved.index(STONES[option])) == (LETTERS[moved.index(STONES[option])],)


@given(st.sets(st.sampled_from(LETTERS[:5]), min_size=1, max_size=3), st.sampled_from(["letters", "text"]))
def test_an_answer_as_prompts_render_it_comes_back_in_every_template(letters, form):
    chosen = tuple(sorted(letters))
    problem = Problem("x", "どれか。", STONES, chosen, explanation="石の色から考える。")
    assert extract_answer(render_answer(problem, chosen, form), problem, explanation=False).answer == chosen
    assert extract_answer(f"解説。\n答え:{render_answer(problem, chosen, form)}", problem, explanation=True).answer == chosen
    assert extract_answer(curation_response(problem, answer_as=form), problem, explanation=True).answer == chosen


@given(
    st.lists(
        st.sampled_from(["赤い石は重い。", "青い石は誤り。", "The sky is red.", "星は3個ある。", "a: 重い。"]), max_size=6
    ),
    st.booleans(),
)
def test_an_explanation_before_a_labelled_answer_changes_nothing(lines, explanation):
    text = "\n".join([*lines, "答え: d"])
    assert _read(text, explanation=explanation) == Reading(("d",), "label")


@pytest.mark.parametrize("filling", ["あ", "[", "答え:\n", "<think>", "the ", "a, b "])
def test_ten_megabytes_are_read_in_no_time(filling):
    text = filling * (10_000_000 // len(filling.encode())) + "\n"
    began = time.process_time()
    _read(f"{text}答え: d", explanation=True)
    assert time.process_time() - began < 5  # a tenth of it on a machine of its own; what is quadratic takes hours


def test_readings_are_counted_by_name():
    counted = Readings.count([_read("答え: d"), _read("答え: a"), _read("d"), _read("わかりません。")])
    assert counted == Readings({"label": 2, "only": 1}, {"refused": 1})
    assert counted.words() == "read by label 2, only 1; not read: refused 1"
    assert Readings.from_json({"rules": {"only": 1}, "reasons": {}}) == Readings({"only": 1}, {})
    assert Readings.from_json(None) is None
