"""How people really type: a bare question, with lead-ins, particles, other words, other marks at its end, and typos.

`worded` puts one together at random; the marks, words and slips are independent of each other, so that few lists give
very many wordings. The name the question asks about is never changed: it is all that tells a known from an unknown.
"""

import random
import re

LEAD_INS_ZH = (
    "请问,|请问|问一下,|问一下|想问一下,|我想问一下,|我想问问,|我想知道|想知道|你知道|你知道吗,|你晓得|考考你,|考考你:|考你一下,|"
    "帮我查一下|帮我查查|帮忙看看|麻烦问下,|麻烦告诉我|麻烦你说一下|请告诉我|告诉我|跟我说说|说一下|说说看,|请回答:|回答我,|"
    "你好,|你好,请问|您好,|您好,请问|嗨,|嗨,问你个事,|喂,|哎,|那个,|诶,|老师,|同学,|小助手,|MiniMind,|哥们,|亲,|不好意思,|劳驾,|"
    "我忘了,|我记不清了,|我不太清楚,|突然想到,|我一直想知道,|有个问题,|有个问题想请教,|请教一下,|问题来了,|快问快答:|抢答:|"
    "下一题:|第一题:|再问你一个,|接下来,|那么,|话说,|对了,|其实我想问,|孩子问我,|我女儿问,|作业里有一题:|我在做作业。|我在复习。|"
    "考试要考,|明天要考试了。|老师让我们查,|我和同学打赌,|刚才看书看到的,|我很好奇,|好奇问一下,|我有点好奇。|"
    "我是小学生。|我在准备知识竞赛。|你能告诉我|能不能告诉我|能告诉我|可以告诉我|可不可以告诉我|谁能告诉我|你说|你猜|你还记得|听说过吗,"
).split("|")
TAILS_ZH = (
    ",谢谢|,谢谢你|,谢谢啦|。谢谢|,多谢|,急|,在线等|,拜托了|,求告知|,求解答|,快告诉我|,快说|,说一下|,告诉我|,告诉我一下|,帮我答一下|,"
    "简单说|,简单回答就行|,一句话就行|,直接说答案|。直接告诉我就好|,你知道吗|,知道吗|,你知道不|,你说说|,我忘了|,我想不起来了|,想不起来了|,"
    "考考你|,我不记得了|。我忘记了|,有人知道吗|,麻烦了|,请回答|,请告诉我|,好吗|,行吗"
).split("|")
# Whose question it is: somebody, and how they ask; each with each, so that openings are not a short list to learn.
PEOPLE_ZH = "我妈 我爸 我弟弟 我姐 邻居 班主任 同事 我奶奶 一位朋友 我室友 我家孩子 他们 隔壁大爷 同桌 我的学生 群里有人".split()
ASK_ZH = (
    "问,|问我,|问我:|想知道,|想知道|让我来问,|让我问你,|考我:|刚才问,|一直在问|说不知道,|叫我查,|打赌说你知道,"
).split("|")
PEOPLE_EN = "My mom|My dad|My sister|A colleague|My neighbor|Our teacher|Somebody|A student|My roommate|My kid".split(
    "|"
)
ASK_EN = " asked: | asked me, | asks | wants the answer: | would like to know | made me ask: ".split("|")
PARTICLES_ZH = "呢 呢 呢 呀 呀 啊 啊 哦 呐 来着 哈 嘞 啦".split()
SYNONYMS_ZH = {
    "什么": ("啥", "啥", "神马", "什麼"),
    "哪里": ("哪儿", "哪", "哪里啊", "什么地方"),
    "是谁": ("是哪位", "是哪个人", "是何人", "谁"),
    "为什么": ("为啥", "怎么", "为何", "干嘛"),
    "为啥": ("为什么", "咋"),
    "怎么": ("咋", "如何", "怎样", "咋么"),
    "多少": ("几", "多少个", "多少"),
    "告诉我": ("跟我说", "给我说说", "说说"),
    "知道": ("晓得", "清楚", "知不知道"),
    "哪座城市": ("哪个城市", "哪座城", "哪个市", "什么城市"),
    "哪一年": ("哪年", "几几年", "什么年份"),
    "哪一天": ("哪天", "几号", "什么日子"),
    "叫什么": ("叫啥", "名叫什么", "叫做什么"),
    "请问": ("请问一下", "问问", "想问"),
    "的是": ("是", "的就是"),
    "是什么": ("是啥", "是甚么", "是什么来着", "是"),
    "有哪些": ("有啥", "都有什么", "有哪几个"),
    "哪个": ("哪一个", "哪個"),
    "第几": ("第几个", "排第几"),
}
SLIPS_ZH = {
    "的": ("得", "地", ""), "吗": ("嘛", "麻", ""), "在": ("再", ""), "哪": ("那",), "么": ("麽", "莫"), "是": ("事", "", "时"),
    "首都": ("手都", "首度"), "省会": ("省汇", "省回"), "作者": ("做者", "作着"), "货币": ("货比", "货帀"), "简称": ("简成",),
    "符号": ("符好", "苻号"), "意思": ("意识", "意丝"), "英语": ("英雨", "英与"), "动物": ("动务", "东物"), "节气": ("节汽", "结气"),
    "美食": ("没食", "美时"), "发明": ("发名",), "发现": ("发线",), "皇帝": ("黄帝",), "元素": ("原素", "元数"), "反义词": ("反意词", "反义字"),
    "哪里": ("那里", "哪理"), "多少": ("多小", "多哨"), "谁": ("谁谁", "shui"), "什么": ("什麽", "是么", "sm"), "请问": ("请文", "清问"),
}  # fmt: skip

LEAD_INS_EN = (
    "Please tell me: |Please tell me |Tell me, |Tell me |Can you tell me |Could you please tell me |Do you know |Do you happen to know |"
    "I want to know |I would like to know |I wonder |I was wondering, |I forgot, |I can't remember, |Quick question: |Question: |"
    "One question: |A question for you: |Hi, |Hi! |Hello, |Hello! |Excuse me, |Sorry, |Ok, |So, |Well, |Now, |Next question: |For my homework: |"
    "My teacher asks: |My son asks, |Quiz time! |Let me test you: |Just curious, |Help me out, |Please, |MiniMind, |Yo, |By the way, |Any idea "
).split("|")
TAILS_EN = (
    ", please| please| pls|, thanks|. Thanks!|, do you know|, can you tell me|, I forgot|, quick|. Short answer please|, any idea|"
    ", if I may ask|, again| exactly|, right now please|. Just tell me| then|, my friend"
).split("|")
SYNONYMS_EN = {
    "what is": ("what's", "whats", "what was", "wat is"),
    "what's": ("whats", "what is"),
    "do you know": ("do u know", "you know"),
    "tell me": ("give me", "say"),
    "which": ("what",),
    "called": ("named", "callled"),
    "the": ("", "teh"),
    "how many": ("how much", "howmany"),
    "please": ("pls", "plz"),
    "capital": ("capitol", "capital city", "captial"),
    "color": ("colour",),
}

END_MARKS = ["？"] * 9 + [""] * 8 + ["?"] * 3 + ["。", "。", "？？", "?!", "！", "~", "…", "?"]


def is_english(text: str) -> bool:
    return text.isascii()


def bare(question: str) -> str:
    """A question without the marks at its end."""
    return question.rstrip("？?。.！! ")


def essence(question: str) -> str:
    """Only letters, digits and signs of arithmetic, in lower case: what two wordings share that are the same question."""
    return "".join(c for c in question.lower() if c.isalnum() or c in "+-×÷#")


def worded(body: str, name: str, rng: random.Random) -> str:
    """`body`, a bare question, as somebody might type it; `name`, where it occurs, is left as it is."""
    english = is_english(body) and not re.fullmatch(r"[\d+= ]*", body)
    mark = "\0"  # stands for the name meanwhile
    text = body.replace(name, mark) if name else body
    if rng.random() < 0.35:
        text = reworded(text, SYNONYMS_EN if english else SYNONYMS_ZH, rng)
    if not english and rng.random() < 0.2 and text[-1] not in "吗呢呀啊=":
        text += rng.choice(PARTICLES_ZH)
    if rng.random() < 0.4:
        text = lead_in(english, rng) + (text[0].lower() + text[1:] if english else text)
    if rng.random() < 0.15:
        text += rng.choice(TAILS_EN if english else TAILS_ZH)
    text += rng.choice(END_MARKS)
    slips = rng.random()
    if slips < 0.08:
        text = slipped(text, rng)
    elif slips < 0.16 and not english:
        text = reworded(text, SLIPS_ZH, rng)
    if english:
        text = text.replace("？", "?").replace("。", ".").replace("！", "!").replace("…", "...")
        if rng.random() < 0.45:
            text, name = text.lower(), name.lower()
    else:
        text = text.replace(",", rng.choice("，，， ,")).replace(":", rng.choice("：：:"))
    return re.sub(" +", " ", text.replace(mark, name)).strip()


def lead_in(english: bool, rng: random.Random) -> str:
    people, ask, lead_ins = (PEOPLE_EN, ASK_EN, LEAD_INS_EN) if english else (PEOPLE_ZH, ASK_ZH, LEAD_INS_ZH)
    return rng.choice(people) + rng.choice(ask) if rng.random() < 0.2 else rng.choice(lead_ins)


def reworded(text: str, others: dict[str, tuple[str, ...]], rng: random.Random) -> str:
    """One of the words that `others` knows, by one of its others."""
    found = [word for word in others if word in text.lower()]
    if not found:
        return text
    word = rng.choice(found)
    return re.sub(re.escape(word), rng.choice(others[word]), text, count=1, flags=re.IGNORECASE) or text


def slipped(text: str, rng: random.Random) -> str:
    """One slip of the finger: a character left out, doubled, or swapped with the next one; never in the name."""
    i = rng.randrange(len(text))
    if len(text) < 5 or "\0" in text[i : i + 2]:
        return text
    left_out, doubled = text[:i] + text[i + 1 :], text[:i] + text[i] + text[i:]
    swapped = text[:i] + text[i + 1 : i + 2] + text[i] + text[i + 2 :]
    return rng.choice((left_out, doubled, swapped))
