"""Small word problems with a worked solution, for reasoning distillation: question, thought, answer from random numbers."""

import random
from collections.abc import Callable
from typing import NamedTuple


class Problem(NamedTuple):
    """`answer` contains `answer_key`, the string that makes a reply right."""

    category: str
    question: str
    thought: str
    answer: str
    answer_key: str


NAMES = ("小明", "小红", "小刚", "小丽", "小华", "小军")
THINGS = (("苹果", "个"), ("铅笔", "支"), ("书", "本"), ("糖", "颗"), ("橘子", "个"), ("气球", "只"))
WEEKDAYS = "一二三四五六日"
DAYS_IN_MONTH = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def addition(rng: random.Random) -> Problem:
    name, (thing, unit) = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    question = rng.choice(
        (
            f"{name}有{a}{unit}{thing}，妈妈又给了{b}{unit}，现在一共有多少{unit}{thing}？",
            f"篮子里有{a}{unit}{thing}，{name}又放进{b}{unit}，一共有多少{unit}？",
        )
    )
    thought = f"原来有{a}{unit}，又增加了{b}{unit}，求总数用加法。{a}+{b}={a + b}。"
    return Problem("addition", question, thought, f"一共有{a + b}{unit}{thing}。", f"有{a + b}{unit}")


def subtraction(rng: random.Random) -> Problem:
    name, (thing, unit) = rng.choice(NAMES), rng.choice(THINGS)
    a = rng.randint(8, 40)
    b = rng.randint(2, a - 2)
    question = rng.choice(
        (
            f"{name}有{a}{unit}{thing}，送给同学{b}{unit}，还剩多少{unit}{thing}？",
            f"桌上有{a}{unit}{thing}，{name}拿走了{b}{unit}，还剩多少{unit}？",
        )
    )
    thought = f"原来有{a}{unit}，减少了{b}{unit}，求剩下的用减法。{a}-{b}={a - b}。"
    return Problem("subtraction", question, thought, f"还剩{a - b}{unit}{thing}。", f"剩{a - b}{unit}")


def multiplication(rng: random.Random) -> Problem:
    thing, unit = rng.choice(THINGS)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    question = rng.choice(
        (
            f"每盒有{a}{unit}{thing}，{b}盒一共有多少{unit}{thing}？",
            f"一个袋子装{a}{unit}{thing}，{b}个袋子一共装多少{unit}？",
        )
    )
    thought = f"每份有{a}{unit}，有{b}份，求总数用乘法。{a}×{b}={a * b}。"
    return Problem("multiplication", question, thought, f"一共有{a * b}{unit}{thing}。", f"有{a * b}{unit}")


def division(rng: random.Random) -> Problem:
    thing, unit = rng.choice(THINGS)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    question = rng.choice(
        (
            f"把{a * b}{unit}{thing}平均分给{a}个小朋友，每人得到多少{unit}？",
            f"{a * b}{unit}{thing}平均装进{a}个盒子，每个盒子装多少{unit}？",
        )
    )
    thought = f"一共有{a * b}{unit}，平均分成{a}份，求每份用除法。{a * b}÷{a}={b}。"
    return Problem("division", question, thought, f"每份有{b}{unit}{thing}。", f"有{b}{unit}")


def shopping(rng: random.Random) -> Problem:
    name, (thing, unit) = rng.choice(NAMES), rng.choice(THINGS)
    price, count = rng.randint(2, 9), rng.randint(2, 6)
    total = price * count
    paid = rng.choice([note for note in (20, 50, 100) if note > total])
    question = f"{name}买了{count}{unit}{thing}，每{unit}{price}元，付了{paid}元，应该找回多少元？"
    thought = f"先算一共花了多少元：{price}×{count}={total}。再算找回多少元：{paid}-{total}={paid - total}。"
    return Problem("two steps", question, thought, f"应该找回{paid - total}元。", f"找回{paid - total}元")


def comparison(rng: random.Random) -> Problem:
    first, second = rng.sample(NAMES, 2)
    a, b = rng.sample(range(5, 40), 2)
    older, difference = (first, a - b) if a > b else (second, b - a)
    question = f"{first}今年{a}岁，{second}今年{b}岁，谁的年龄大？大几岁？"
    thought = f"比较{a}和{b}，{max(a, b)}更大，所以{older}的年龄大。{max(a, b)}-{min(a, b)}={difference}。"
    return Problem(
        "comparison", question, thought, f"{older}的年龄大，大{difference}岁。", f"{older}的年龄大，大{difference}岁"
    )


def conversion(rng: random.Random) -> Problem:
    big, small, factor = rng.choice(
        (("千米", "米", 1000), ("米", "厘米", 100), ("千克", "克", 1000), ("小时", "分钟", 60), ("分钟", "秒", 60))
    )
    n = rng.randint(2, 9)
    question = rng.choice((f"{n}{big}等于多少{small}？", f"请换算：{n}{big}是多少{small}？"))
    thought = f"1{big}等于{factor}{small}，{n}{big}就是{n}×{factor}={n * factor}{small}。"
    return Problem(
        "unit conversion", question, thought, f"{n}{big}等于{n * factor}{small}。", f"等于{n * factor}{small}"
    )


def weekday(rng: random.Random) -> Problem:
    today, days = rng.randrange(7), rng.randint(2, 13)
    then = (today + days) % 7
    weeks, rest = divmod(days, 7)
    question = f"今天是星期{WEEKDAYS[today]}，再过{days}天是星期几？"
    if rest == 0:
        thought = f"一周有7天，{days}天正好是{weeks}周，所以还是星期{WEEKDAYS[then]}。"
    else:
        start = f"一周有7天，{days}天是{weeks}周多{rest}天，" if weeks else ""
        thought = f"{start}从星期{WEEKDAYS[today]}往后数{rest}天，是星期{WEEKDAYS[then]}。"
    return Problem("weekday", question, thought, f"是星期{WEEKDAYS[then]}。", f"是星期{WEEKDAYS[then]}")


def date(rng: random.Random) -> Problem:
    month, days = rng.choice((1, 3, 4, 5, 6, 7, 8, 9, 10, 11)), rng.randint(2, 9)
    length = DAYS_IN_MONTH[month - 1]
    day = rng.randint(length - 10, length)
    question = f"今天是{month}月{day}日，再过{days}天是几月几日？"
    if day + days <= length:
        month_then, day_then = month, day + days
        thought = f"{month}月有{length}天，{day}+{days}={day + days}，没有超过{length}，还在{month}月。"
    else:
        month_then, day_then = month + 1, day + days - length
        thought = f"{month}月有{length}天，{day}+{days}={day + days}，超过了{length}，{day + days}-{length}={day_then}，到了{month_then}月。"
    return Problem("date", question, thought, f"是{month_then}月{day_then}日。", f"是{month_then}月{day_then}日")


def clock(rng: random.Random) -> Problem:
    start, hours = rng.randint(1, 20), rng.randint(2, 9)
    then = (start + hours) % 24
    question = f"现在是{start}点，{hours}小时以后是几点？（二十四小时制）"
    total = f"{start}+{hours}={start + hours}。"
    thought = total if start + hours < 24 else f"{total}一天有24小时，{start + hours}-24={then}。"
    return Problem("clock", question, thought, f"是{then}点。", f"是{then}点")


def sequence(rng: random.Random) -> Problem:
    start, step = rng.randint(1, 20), rng.randint(2, 9)
    terms = [start + step * i for i in range(5)]
    question = f"找规律：{'，'.join(map(str, terms[:4]))}，下一个数是多少？"
    thought = f"{terms[1]}-{terms[0]}={step}，每个数比前一个数大{step}。{terms[3]}+{step}={terms[4]}。"
    return Problem("sequence", question, thought, f"下一个数是{terms[4]}。", f"是{terms[4]}。")


def english(rng: random.Random) -> Problem:
    name, thing = rng.choice(("Tom", "Lily", "Jack", "Anna")), rng.choice(("apples", "books", "pens", "balls"))
    a, b = rng.randint(3, 30), rng.randint(2, 20)
    if rng.random() < 0.5 or a < b + 2:
        question = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?"
        thought, result = f"Getting more means adding. {a}+{b}={a + b}.", a + b
    else:
        question = f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?"
        thought, result = f"Giving away means subtracting. {a}-{b}={a - b}.", a - b
    return Problem("English", question, thought, f"The answer is {result} {thing}.", f"is {result} {thing}")


FAMILIES: tuple[Callable[[random.Random], Problem], ...] = (
    addition,
    subtraction,
    multiplication,
    division,
    shopping,
    comparison,
    conversion,
    weekday,
    date,
    clock,
    sequence,
    english,
)


def problems(count: int, rng: random.Random) -> list[Problem]:
    """`count` different questions, the families in turn."""
    found: dict[str, Problem] = {}
    attempts = 0
    while len(found) < count:
        problem = FAMILIES[attempts % len(FAMILIES)](rng)
        found.setdefault(problem.question, problem)
        attempts += 1
    return list(found.values())


def reasoned(problem: Problem) -> str:
    """The reply in the format that reasoning distillation teaches."""
    return f"<think>\n{problem.thought}\n</think>\n<answer>\n{problem.answer}\n</answer>"
