"""Names that no table knows: invented ones in great numbers, and real ones of which the corpus says nothing.

`unknown_names(category, ...)` draws names of the kind that a table's subjects are, so that a known and an unknown one
are asked about in the same words and only the name tells them apart.
"""

import random
from collections.abc import Callable

SYLLABLES = (
    "卡 鲁 比 莫 拉 维 诺 塔 西 里 安 波 萨 米 尔 哈 斯 顿 图 兰 特 瓦 科 洛 加 贝 尼 索 纳 阿 巴 克 林 多 雷 伊 迪 赫 奥 罗 费 格 "
    "佐 艾 琳 玛 戈 坎 达 萝 瑟 帕 肯 亚 佩 蒂 乌 丁 桑 普 皮 布 菲 朗 凯 娜 德 泽"
).split()
ENGLISH_SYLLABLES = (
    "zor bla van kor dra mi lo quen ter fi ga lum ba re no sha wi pel tor gri ma xan el do vi ka tu ran be os plo fen zu ri mon tal "
    "ark ze ny gor wa kin ost bel cro du lan phi sto"
).split()
THINGS = (
    "月亮 蓝莓 糖果 云朵 彩虹 香蕉 巧克力 星光 影子 棉花糖 西瓜 蘑菇 水晶 风车 雪花 珊瑚 蜗牛 柠檬 梦境 石头 铁锅 雨伞 萤火虫 橡皮 饼干 纽扣 "
    "火焰 黑雾 银狐 沙丘 琥珀 紫藤 白鹭 青铜 飞鱼 南瓜 羽毛 面条 海浪 冰糖 土豆 松果 魔法 天空 玻璃 玫瑰 金龙 小熊 袜子 泡泡"
).split()
SCENES = (
    "青 云 龙 凤 白 鹿 玉 泉 天 马 紫 霞 金 沙 银 月 飞 雪 红 枫 翠 竹 黑 石 碧 海 星 河 落 花 灵 山 望 江 北 溪 东 林 南 塘 西 岭 古 松"
).split()
COUNTRY_ENDS = ["", "", "", "国", "王国", "王国", "共和国", "联邦", "帝国", "公国", "岛国"]

REAL = {
    "country": "阿根廷 智利 墨西哥 肯尼亚 尼日利亚 沙特阿拉伯 以色列 爱尔兰 冰岛 奥地利 比利时 捷克 乌克兰 罗马尼亚 保加利亚 新加坡 印度尼西亚 缅甸 老挝 斯里兰卡 孟加拉国 "
    "哥伦比亚 委内瑞拉 南非 摩洛哥 埃塞俄比亚 突尼斯 约旦 叙利亚 哈萨克斯坦 塞尔维亚 克罗地亚 玻利维亚 厄瓜多尔 牙买加 斐济 卢森堡 也门 阿富汗 坦桑尼亚",
    "province": "台湾省 内蒙古 新疆 西藏 广西 宁夏",
    "landmark": "悉尼歌剧院 比萨斜塔 泰姬陵 金门大桥 吴哥窟 岳阳楼 滕王阁 少林寺 大雁塔 卢浮宫 白宫 圣家堂 雷峰塔 东方明珠 天坛 斗兽场",
    "element": "锂 铍 硼 氟 氖 硅 磷 钾 锌 铅 汞 碘 铀 钛 锰 镍 钨 铂 铬 钡 氩 溴 钴 镭 锡",
    "planet": "冥王星 谷神星 月球 北极星 天狼星 哈雷彗星 织女星 阋神星",
    "festival": "感恩节 万圣节 情人节 父亲节 母亲节 愚人节 复活节 建军节 建党节 护士节 泼水节 中元节 寒食节 世界读书日 消费者权益日",
    "city": "成都 苏州 天津 大连 青岛 沈阳 贵阳 哈尔滨 南昌 合肥 福州 海口 宁波 烟台 扬州 太原",
    "event": "罗马帝国灭亡|日本明治维新开始|甲午战争爆发|清朝灭亡|元朝建立|拿破仑去世|哥白尼出生|柏林墙倒塌|泰坦尼克号沉没|苏联成立|郑和下西洋|安史之乱爆发",
    "dynasty": "清朝 商朝 周朝 南宋 晋朝 夏朝 辽朝 金朝 后唐 北魏",
    "discoverer": "发明电灯 发明互联网 发现DNA 发明照相机 发明自行车 发明望远镜 发明电视 发现细胞 发明汽车 发明冰箱 提出量子论 发明拉链 发现南极 发明洗衣机",
    "author": "《哈利波特》 《小王子》 《三体》 《平凡的世界》 《家》 《呐喊》 《茶馆》 《傲慢与偏见》 《简爱》 《飘》 《聊斋志异》 《儒林外史》 《浮士德》 《变形记》 《白鹿原》 《巴黎圣母院》",
    "poet": "《望岳》 《将进酒》 《悯农》 《山行》 《清明》 《凉州词》 《出塞》 《早发白帝城》 《长恨歌》 《黄鹤楼》 《相思》 《琵琶行》",
    "idiom": "画龙点睛 塞翁失马 愚公移山 卧薪尝胆 破釜沉舟 鹤立鸡群 望梅止渴 指鹿为马 纸上谈兵 七上八下 开门见山 井井有条 马到成功 南辕北辙 朝三暮四 如鱼得水",
    "opposite": "桌子 胖 冷 甜 硬 干净 热闹 桥 香 软 亮 贵 苹果 紧张 开心 圆 蓝色 香蕉 跑步 聪明",
    "word": "键盘 冰箱 大象 窗户 手套 火车 月亮 桌子 铅笔 牛奶 警察 森林 厨房 雨伞 葡萄 蜡烛 城堡 司机 胡萝卜 邮局 眼镜 剪刀 黄色 护士",
    "animal": "老虎 狮子 兔子 章鱼 螃蟹 虾 蜗牛 蚯蚓 水母 海星 蝎子 骆驼 松鼠 刺猬 蜈蚣 珊瑚 袋鼠 鸵鸟 孔雀 壁虎",
    "capital (English)": "Brazil|Mexico|Kenya|India|Australia|Argentina|Ireland|Iceland|Austria|Belgium|Poland|Finland|Denmark|Cuba|Peru|Vietnam|Nigeria|Chile|Hungary|South Korea",
    "element symbol (English)": "helium|nitrogen|zinc|lead|mercury|calcium|chlorine|neon|nickel|tin|potassium|silicon|uranium|lithium",
    "opposite (English)": "table|red|soft|rich|clean|sweet|loud|early|banana|full|thin|wet|brave|cheap|run|purple",
    "young animal (English)": "goat|pig|bear|frog|kangaroo|deer|swan|rabbit|whale|owl|elephant|eagle|fox|wolf",
}  # fmt: skip


def syllables(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.sample(SYLLABLES, rng.randint(low, high)))


def english_word(rng: random.Random, ends: tuple[str, ...]) -> str:
    return "".join(rng.sample(ENGLISH_SYLLABLES, rng.randint(2, 3))) + rng.choice(ends)


def scene(rng: random.Random) -> str:
    return "".join(rng.sample(SCENES, 2))


def country(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(THINGS) + rng.choice(("国", "王国", "共和国", "帝国", "联邦"))
    return syllables(rng, 2, 4) + rng.choice(COUNTRY_ENDS)


def thing(rng: random.Random) -> str:
    """An invented device, substance or law."""
    return rng.choice(
        (
            f"{syllables(rng, 2, 3)}{rng.choice('石 素 机 定律 射线 粒子 方程 疫苗'.split())}",
            f"{rng.choice(THINGS)}{rng.choice('机 定律 引擎 原理 飞车 电池 病毒 射线'.split())}",
            rng.choice("时光机 隐身衣 永动机 任意门 反重力鞋 读心术 飞行汽车 自动写作业机 传送门 催眠帽".split()),
        )
    )


def book(rng: random.Random) -> str:
    title = rng.choice(
        (
            f"{rng.choice('沉默 孤独 蓝色 遥远 最后 疯狂 失落 会飞 午夜 忧伤 第七个 消失 透明 老去 温柔'.split())}的{rng.choice(THINGS)}",
            f"{rng.choice(THINGS)}{rng.choice('传 奇谈 之歌 往事 日记 历险记 与我 战争 城堡 的秘密'.split())}",
            f"{syllables(rng, 2, 3)}{rng.choice('传 之歌 王朝 编年史 的女儿'.split())}",
        )
    )
    return f"《{title}》"


def poem(rng: random.Random) -> str:
    return f"《{rng.choice('题 过 咏 登 夜泊 送别 忆 春游 宿 望 秋日 游 赠 别'.split())}{scene(rng)}{rng.choice(['', '', '山', '寺', '楼', '亭'])}》"


def four_characters(rng: random.Random) -> str:
    """Verb, noun, verb, noun, like an idiom: 追云打鼓."""
    verbs = rng.sample("追 打 偷 煮 抱 看 画 摸 卖 买 骑 吃 洗 种 背 拉 推 藏 摘 听".split(), 2)
    nouns = rng.sample("云 鼓 鱼 桥 瓜 虎 猫 灯 锅 雨 羊 船 豆 刀 树 墙 鸡 花 雪 鞋".split(), 2)
    return verbs[0] + nouns[0] + verbs[1] + nouns[1]


def big_sum(rng: random.Random) -> str:
    high = rng.choice((99, 99, 999, 9999))
    a, b = rng.randint(11, high), rng.randint(11, high)
    return f"{a}{rng.choice('++-×÷加减乘')}{b}"


def city(rng: random.Random) -> str:
    return rng.choice((syllables(rng, 2, 3), scene(rng))) + rng.choice(("", "市", "城", "镇", "市"))


INVENTED: dict[str, Callable[[random.Random], str]] = {
    "country": country,
    "province": lambda rng: rng.choice((scene(rng), syllables(rng, 2, 2))) + "省",
    "landmark": lambda rng: rng.choice((scene(rng), syllables(rng, 2, 3), rng.choice(THINGS)))
    + rng.choice("塔 宫 寺 桥 楼 阁 园 山庄 大教堂 广场 博物馆 城堡 神庙 大厦".split()),
    "mountain": lambda rng: rng.choice("上 前 后 左 右 天 海 外 内 古 小 大 远 新".split()) + "岳",
    "element": lambda rng: rng.choice((syllables(rng, 2, 3), rng.choice(THINGS), scene(rng)))
    + rng.choice("素 金 石 晶 元素 合金 钢 气".split()),
    "planet": lambda rng: rng.choice((syllables(rng, 2, 3), rng.choice(THINGS), scene(rng))) + "星",
    "festival": lambda rng: rng.choice((rng.choice(THINGS), scene(rng), syllables(rng, 2, 2))) + "节",
    "solar term": lambda rng: rng.choice("立 大 小 初 中 末 微 寒 暖 白".split()) + rng.choice("云 风 雾 沙 星 月 虫 花 雷 冰".split()),
    "city": city,
    "event": lambda rng: rng.choice(
        (
            f"{country(rng)}{rng.choice(('成立', '独立', '灭亡', '解体'))}",
            f"{rng.choice(SCENES)}朝建立",
            f"第{rng.choice('三四五六七')}次世界大战{rng.choice(('爆发', '结束'))}",
            f"{country(rng)}{rng.choice(('大战爆发', '革命爆发', '举办奥运会', '发明火车'))}",
            f"人类首次登上{rng.choice(('火星', '木星', '太阳', syllables(rng, 2, 2) + '星'))}",
        )
    ),
    "dynasty": lambda rng: rng.choice((rng.choice(SCENES), scene(rng), syllables(rng, 2, 2))) + rng.choice(("朝", "朝", "王朝", "汗国")),
    "discoverer": lambda rng: rng.choice(("发明", "发现", "提出", "发明", "改进")) + thing(rng),
    "author": book,
    "poet": poem,
    "idiom": four_characters,
    "opposite": lambda rng: rng.choice((rng.choice(THINGS), syllables(rng, 2, 2))),
    "word": lambda rng: rng.choice((rng.choice(THINGS), syllables(rng, 2, 3))),
    "animal": lambda rng: rng.choice((rng.choice(THINGS), syllables(rng, 2, 3), scene(rng))) + rng.choice("兽 怪 龙 鸟 兽 虫 鱼 猴 犬".split()),
    "sum": big_sum,
    "capital (English)": lambda rng: english_word(rng, ("ia", "land", "stan", "", "onia", "ria")).capitalize(),
    "element symbol (English)": lambda rng: english_word(rng, ("ium", "ium", "on", "ite", "")),
    "next month (English)": lambda rng: english_word(rng, ("uary", "ember", "ust", "ober")).capitalize(),
    "opposite (English)": lambda rng: english_word(rng, ("y", "ish", "", "ful")),
    "young animal (English)": lambda rng: english_word(rng, ("", "beast", "fish", "bird")),
}  # fmt: skip

# Which names a table's questions are asked with.
NAMES_OF = {
    "country capital": "country", "country continent": "country", "currency": "country",
    "province capital": "province", "province short name": "province", "landmark": "landmark",
    "five great mountains": "mountain", "element symbol": "element", "atomic number": "element", "planet": "planet",
    "addition": "sum", "festival date": "festival", "festival food": "festival", "next solar term": "solar term",
    "city food": "city", "event year": "event", "dynasty founder": "dynasty", "discoverer": "discoverer",
    "author": "author", "poet": "poet", "idiom": "idiom", "opposite": "opposite", "word zh to en": "word",
    "animal class": "animal",
}  # fmt: skip

NEAR_MISSES = ("country", "province", "landmark", "festival", "author", "poet", "dynasty")


def real_names(kind: str) -> list[str]:
    names = REAL.get(kind, "")
    return names.split("|") if "|" in names else names.split()


def near_miss(subject: str, rng: random.Random) -> str:
    """A known name with one other character: 巴莫斯坦, 《红石梦》."""
    inside = [i for i, character in enumerate(subject) if character not in "《》省市节星"]
    i = rng.choice(inside)
    return subject[:i] + rng.choice(SYLLABLES + SCENES) + subject[i + 1 :]


def unknown_names(category: str, subjects: list[str], taken: set[str], count: int, rng: random.Random) -> list[str]:
    """`count` new names for the questions of a table; none contains one of `taken`.

    Of four, one is real as long as there are any, and one of eight nearly one of the table's `subjects`; the others are
    invented.
    """
    kind = NAMES_OF.get(category, category)
    long_ones = [subject for subject in subjects if kind in NEAR_MISSES and len(subject) >= 3]
    real = real_names(kind)
    rng.shuffle(real)
    names: dict[str, None] = {}
    for _ in range(20 * count):
        if len(names) == count:
            break
        if real and len(names) % 4 == 3:
            name = real.pop()
        elif long_ones and len(names) % 8 == 5:
            name = near_miss(rng.choice(long_ones), rng)
        else:
            name = INVENTED[kind](rng)
        if name not in taken and not any(len(other) > 1 and other in name for other in taken):
            names[name] = None
    return list(names)
