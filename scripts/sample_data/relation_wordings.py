"""More ways to ask for the facts of a table: for training only, colloquial, short and reordered ones too.

`|` stands between two wordings, which have no mark at their end (wordings.py adds one, or none). `{s}` is the subject or
another name of it; in the table of discoverers `{do}` is what was done and `{it}` to what: 发明 and 电话.
"""

RELATION_WORDINGS = {
    "country capital": (
        "{s}首都|{s} 首都|首都 {s}|{s}首都是哪|{s}首都是啥|{s}首都在哪|"
        "{s}的首都在哪儿|{s}的首都是什么地方|{s}的首都是哪个城市|{s}的国都是哪里|{s}的都城叫什么|{s}的首都名字|首都在哪，{s}的|首都是哪座城，我说的是{s}|{s}这个国家的首都是哪|"
        "{s}这个国家，首都在什么地方|{s}政府设在哪座城市|{s}把哪座城市定为首都|哪里是{s}的首都|哪个城市是{s}首都|谁知道{s}的首都是哪座城市|关于{s}，它的首都叫什么|"
        "我忘了{s}的首都是哪儿|说说{s}的首都|{s}以哪里为首都|{s}的首府是哪里|如果去{s}的首都，我该飞到哪座城市|地理作业：{s}的首都|写出{s}的首都|{s}，首都|"
        "capital of {s}"
    ),
    "country continent": (
        "{s}在哪个洲|{s}属于哪个洲|{s}是哪个大洲的|{s}在什么洲|{s} 哪个洲|{s}所在的洲|{s}的大洲|{s}属于什么大洲|{s}在亚洲还是欧洲|{s}在欧洲还是非洲|{s}算哪个洲的国家|"
        "哪个大洲有{s}|在哪个洲，{s}|地图上{s}在哪个大洲|七大洲里{s}在哪一个|{s}坐落在哪个大洲|{s}是七大洲中哪个洲的国家|{s}地处哪个大洲|想去{s}，那是哪个洲|"
        "{s}这个国家位于哪个洲|我想找{s}，它在哪个大洲|{s}在世界上哪一洲"
    ),
    "currency": (
        "{s}货币|{s} 货币|{s}用什么钱|{s}花什么钱|{s}的钱叫什么|{s}的钱是什么|{s}人用什么钱|{s}的货币是啥|{s}流通什么货币|{s}用哪种钱|去{s}旅游要换什么钱|"
        "到{s}该换什么钱|去{s}玩换什么货币|{s}官方货币是什么|{s}用的是什么货币|在{s}购物付什么钱|在{s}消费用哪种货币|货币是什么，{s}的|{s}的货币单位|{s}的货币单位是什么|"
        "{s}的钞票叫什么|出差去{s}，要带什么货币|{s}使用的币种"
    ),
    "province capital": (
        "{s}省会|{s} 省会|省会 {s}|{s}省会是哪|{s}省会是哪里|{s}省会在哪|{s}的省会是啥|{s}的省会是哪个城市|{s}的省会在哪儿|{s}的省府在哪|{s}的省政府在哪个城市|"
        "省会在哪，{s}的|省会是哪座城市，我问的是{s}|哪里是{s}的省会|哪个城市是{s}的省会|{s}的省会城市|{s}的省会城市是哪个|{s}省会的名字|{s}把省会设在哪里|{s}以哪座城市为省会|"
        "我忘了{s}的省会是哪|说说{s}的省会|{s}，省会|写出{s}的省会|地理题：{s}的省会|{s}的省会叫啥|中国的{s}，省会是哪里|{s}的首府是哪里"
    ),
    "province short name": (
        "{s}简称|{s} 简称|{s}简称啥|{s}的简称是啥|{s}简称哪个字|{s}的简称是哪个|{s}的一个字简称|{s}用一个字怎么说|{s}缩写成哪个字|{s}的别称是哪个字|{s}车牌|"
        "{s}的车牌是什么|{s}的车牌第一个字|{s}的汽车牌照开头是哪个字|简称是什么，{s}的|{s}叫什么简称|{s}用哪个字代表|哪个字代表{s}|哪个字是{s}的简称|{s}的简称怎么写|"
        "{s}的单字简称|说说{s}的简称|一个字称呼{s}"
    ),
    "landmark": (
        "{s}在哪|{s}在哪儿|{s}在哪个城市|{s}在哪座城|{s}位置|{s}位于哪里|{s}位于哪个城市|{s}在什么城市|{s}坐落在哪里|{s}坐落于哪座城市|{s}地址在哪|"
        "想去{s}，要去哪个城市|想去{s}玩该去哪|去看{s}得买去哪里的票|去哪里能看到{s}|在哪可以看到{s}|到哪个城市能看{s}|哪个城市能看到{s}|哪里有{s}|{s}是哪个城市的景点|"
        "{s}是哪里的景点|{s}是哪座城市的名胜|在哪座城市，{s}|{s} 哪个城市|旅游去{s}，是去哪座城市|{s}所在地|{s}建在哪"
    ),
    "five great mountains": (
        "{s}是啥山|{s}是哪座山|{s}是哪个山|{s}叫什么山|{s} 哪座山|{s}说的是哪座山|{s}是五岳里的哪座|五岳 {s}|五岳的{s}是什么|五岳之{s}|{s}山名|哪座山是{s}|"
        "哪座山叫{s}|哪座山被称作{s}|人们说的{s}是哪|{s}的名字"
    ),
    "element symbol": (
        "{s}的符号|{s}的化学符号|{s} 化学符号|{s}元素符号|{s}的元素符号是啥|{s}的元素符号是什么|{s}元素用什么字母表示|{s}用什么字母表示|{s}在化学里用哪个字母|"
        "{s}的字母符号|{s}在化学中怎么表示|{s}在元素周期表里的符号|{s}的化学符号咋写|{s}的元素符号怎么写|化学符号是什么，{s}的|哪个符号代表{s}|哪个化学符号是{s}|"
        "{s}的化学式怎么写|化学老师问{s}的符号|元素{s}怎么写|元素{s}的符号|写出{s}的元素符号|symbol of {s}"
    ),
    "atomic number": (
        "{s}的原子序数|{s}原子序数|{s} 原子序数|{s}原子序数是几|{s}原子序数多少|{s}的序数是多少|{s}是几号元素|{s}是第几号元素|{s}是第几个元素|{s}在周期表第几位|"
        "{s}在周期表上排第几|{s}在元素周期表中的编号|{s}在周期表里是多少号|{s}的质子数|{s}的质子数是多少|{s}有多少个质子|{s}有几个质子|{s}原子核里有几个质子|"
        "原子序数是几，{s}的|元素周期表里{s}的位置|元素周期表第几个是{s}|{s}的核电荷数是多少"
    ),
    "planet": (
        "{s}第几|{s}是第几颗|{s}排第几|{s}离太阳第几近|{s}距离太阳第几近|{s}离太阳排第几|{s}在八大行星里排第几|{s}在八大行星中是第几个|{s}是太阳系第几颗行星|"
        "{s}在太阳系的位置|{s}在太阳系中的次序|按离太阳的距离，{s}排第几|从太阳开始数，{s}是第几个|由近到远数，{s}是第几颗行星|八大行星里{s}是第几个|太阳系里{s}排老几|"
        "第几颗行星是{s}|{s} 第几颗行星|从内到外{s}是第几个行星"
    ),
    "addition": (
        "{s}|{s}=|{s}等于|{s}等于啥|{s}是几|{s}是多少|{s}得几|{s}得多少|{s}得数|{s}的得数是多少|{s}的和是多少|{s}一共是多少|{s}算出来是几|{s}答案是什么|"
        "算{s}|算一下{s}|帮我算{s}|计算{s}|{s}你会算吗|口算{s}|{s}结果|数学题，{s}等于几"
    ),
    "festival date": (
        "{s}哪天|{s}几号|{s}日期|{s} 日期|{s}是几月几号|{s}是几月几日|{s}在哪天|{s}在什么时候|{s}什么时候过|{s}什么时候|{s}是什么日子|{s}在几月|{s}定在哪一天|"
        "{s}的日子是哪天|{s}在每年的几月几号|每年几月几号过{s}|几月几号是{s}|哪一天是{s}|哪天过{s}|什么时候是{s}|什么时候过{s}|是几号，{s}|人们在哪天过{s}|"
        "{s}的具体日期|{s}的时间"
    ),
    "festival food": (
        "{s}吃啥|{s}吃什么好|{s}要吃啥|{s}的食物|{s}的美食|{s} 吃什么|{s}那天吃什么|{s}当天吃啥|{s}习俗吃什么|{s}习惯吃什么|{s}传统上吃什么|{s}的传统美食是什么|"
        "{s}的节日食品|{s}的代表食物|{s}家家户户吃什么|{s}家里都吃什么|在{s}大家吃什么|到了{s}该吃什么|中国人{s}吃什么|什么是{s}吃的|吃什么，{s}|{s}有什么吃的"
    ),
    "next solar term": (
        "{s}之后|{s}后面|{s}下一个|{s}完了是什么|{s}过后是什么|{s}过了是什么节气|{s}后面是哪个|{s}后面那个节气是啥|{s}后一个节气|{s}之后的节气|{s}之后是啥节气|"
        "{s}接下来是什么节气|{s}接着是哪个节气|{s}下一个节气|{s}下个节气叫什么|{s}紧接着的节气|下一个节气，{s}的|哪个节气在{s}后面|哪个节气紧跟着{s}|什么节气在{s}之后|"
        "二十四节气{s}的下一个|节气里{s}之后是谁|过完{s}是什么节气|{s}再往后是哪个节气"
    ),
    "city food": (
        "{s}美食|{s} 美食|{s}特产|{s}小吃|{s}吃什么|{s}有啥好吃的|{s}有什么好吃的|{s}什么好吃|{s}什么东西最好吃|{s}的名吃|{s}的招牌菜是什么|{s}的特色小吃|"
        "{s}的代表美食|{s}的特色菜|{s}有名的菜|{s}出名的美食是什么|{s}哪种小吃有名|{s}必吃的是什么|去{s}玩吃什么|去{s}旅游必吃什么|到{s}一定要吃什么|来{s}应该尝什么|"
        "好吃的，{s}的|推荐{s}的美食|推荐一个{s}的小吃|{s}人爱吃什么|{s}当地有什么特色美食"
    ),
    "event year": (
        "{s}年份|{s} 哪年|{s}哪年|{s}哪一年|{s}是哪年|{s}在哪年|{s}是哪年的事|{s}什么时候|{s}是什么时候|{s}发生在什么时候|{s}在什么时间|{s}的时间|"
        "{s}的年份是多少|{s}是几几年|{s}是几几年的事|{s}具体是哪一年|{s}发生于哪一年|何年{s}|哪年{s}|什么时候{s}|几几年{s}|历史上{s}是哪一年|历史题：{s}的年份|"
        "哪一年，{s}|说说{s}是哪年|{s}，这是哪一年的事|{s}距今的年份，是哪一年"
    ),
    "dynasty founder": (
        "{s}开国皇帝|{s} 开国皇帝|{s}的创立者|{s}创始人|{s}谁建立的|{s}是谁建立的|{s}是谁创建的|{s}是谁打下的江山|{s}的开国君主是谁|{s}开国的人是谁|{s}的第一位皇帝|"
        "{s}第一个皇帝叫什么|{s}的首位皇帝是谁|{s}的始皇帝是谁|{s}的开创者|{s}由谁建立|谁开创了{s}|谁创立了{s}|谁建的{s}|谁是{s}的第一个皇帝|谁是{s}的开国皇帝|"
        "哪个皇帝建立了{s}|哪个人建立了{s}|开国皇帝是谁，{s}的"
    ),
    "discoverer": (
        "谁{s}|谁{s}的|谁{do}了{it}|谁{do}{it}|{it}谁{do}的|{it}是谁{do}的|{it}是哪个人{do}的|{it}是哪位科学家{do}的|{it}由谁{do}|"
        "{it}最早是谁{do}的|{it}的{do}者|{it}的{do}者是谁|{it} 谁{do}|{it}是什么人{do}的|{do}{it}的人|{do}{it}的科学家|{do}{it}的是哪位|"
        "{do}{it}的是谁|{do}了{it}的人叫什么|哪个人{do}了{it}|哪位科学家{do}了{it}|什么人{do}了{it}|是谁{do}了{it}|是哪位{do}了{it}|"
        "谁最先{do}{it}|{it}跟哪位科学家有关|因{s}而出名的是谁"
    ),
    "author": (
        "{s}作者|{s} 作者|{s}作者是谁|{s}谁写的|{s}是谁的书|{s}是谁的作品|{s}是谁的小说|{s}是哪个作家写的|{s}是哪个人写的|{s}是哪位写的|{s}出自谁的手|"
        "{s}出自谁之手|{s}出自哪位作家|{s}的作者叫什么|{s}的作者叫啥|{s}的作家是谁|{s}这本书谁写的|{s}这部作品的作者|{s}这部书的作者是谁|谁写的{s}|谁是{s}的作者|"
        "谁创作了{s}|哪个作家写了{s}|哪位作家写的{s}|作者是谁，{s}的|写{s}的是谁|写{s}的作家叫什么|名著{s}的作者"
    ),
    "poet": (
        "{s}作者|{s} 作者|{s}谁写的|{s}是谁写的|{s}是谁的诗|{s}是谁作的|{s}是哪个诗人的|{s}是哪个诗人写的|{s}是哪位诗人的作品|{s}的诗人|{s}的诗人是谁|"
        "{s}的作者叫什么|{s}这首诗谁写的|{s}这首诗的作者是谁|{s}这首诗是谁作的|{s}出自哪位诗人|{s}出自谁之手|谁写了{s}|谁写的{s}|谁是{s}的作者|谁作的{s}|"
        "哪位诗人写了{s}|哪个诗人写的{s}|作者是谁，{s}这首诗|古诗{s}谁写的|背诗：{s}的作者"
    ),
    "idiom": (
        "{s}|{s}意思|{s}啥意思|{s}是啥意思|{s}什么意思|{s} 意思|{s}的含义|{s}的含义是什么|{s}的解释|{s}怎么解释|{s}怎么讲|{s}怎么理解|{s}指什么|"
        "{s}指的是什么|{s}说的是什么|{s}说明什么道理|{s}讲了什么道理|{s}形容什么|{s}形容的是什么|{s}代表什么意思|{s}有什么含义|{s}这个词啥意思|{s}这个成语什么意思|"
        "成语{s}|解释{s}|解释成语{s}|什么叫{s}|什么是{s}|什么意思，{s}"
    ),
    "opposite": (
        "{s}的反义词|{s}反义词|{s} 反义词|{s}的反义词是啥|{s}的反义词是哪个|{s}的反面是什么|{s}的反面|{s}的相反词|{s}相反的词|{s}的对立面是什么|{s}相反是什么|"
        "{s}反过来是什么|{s}反着说是什么|{s}的反话怎么说|跟{s}相反的是什么|跟{s}相反的词|和{s}相对的词是哪个|和{s}意思相反的是哪个词|什么词和{s}相反|什么是{s}的反义词|"
        "哪个词跟{s}相反|反义词，{s}的|反义词是什么，{s}|语文题：{s}的反义词|写一个{s}的反义词|找出{s}的反义词|不{s}是什么"
    ),
    "word zh to en": (
        "{s}英语|{s} 英语|{s}英文|{s}的英语|{s}的英文|{s}英语怎么说|{s}英语咋说|{s}英文怎么说|{s}英文怎么写|{s}的英文怎么说|{s}的英文单词|{s}的英语怎么写|"
        "{s}的英语单词是什么|{s}翻译成英文|{s}翻译成英语|{s}用英文怎么讲|{s}用英文怎么说|{s}用英语怎么讲|{s}在英语里叫什么|{s}在英语里怎么说|英语里{s}怎么说|"
        "英语里面{s}是什么|英语{s}怎么写|英文的{s}|怎么用英语说{s}|把{s}译成英语|把{s}翻译成英文|翻译{s}|翻译一下{s}，英语|{s} in English|{s}的英语怎么拼"
    ),
    "animal class": (
        "{s}是哪类|{s}属于哪类|{s}属于哪类动物|{s}属于什么动物|{s}属于什么类别|{s}属于啥动物|{s}是哪一类动物|{s}是哪种动物|{s}是什么类动物|{s}是什么类型的动物|"
        "{s} 哪类动物|{s}分类|{s}的分类|{s}的类别|{s}的动物分类|{s}归哪一类|{s}归到哪一类|{s}算什么动物|{s}算哪类动物|{s}在生物学上属于哪类|{s}按分类是什么动物|"
        "生物课上{s}属于哪类|动物里{s}是什么类|哪类动物，{s}|是什么动物，{s}|{s}是鸟类还是鱼类|{s}是鱼还是哺乳动物|{s}是昆虫还是别的动物"
    ),
    "capital (English)": (
        "capital of {s}|{s} capital|{s}'s capital|{s} capital city|capital city of {s}|"
        "the capital city of {s}|name the capital of {s}|what is {s}'s capital|what is {s}'s capital city|"
        "what's {s}'s capital|what city is the capital of {s}|which city is {s}'s capital|"
        "which is the capital of {s}|where is the capital of {s}|I forgot the capital of {s}|"
        "I'd like to know the capital of {s}|give me the capital of {s}|the capital of {s} is what|"
        "what's the capital of {s}|for {s}, what is the capital|In {s}, which city is the capital|"
        "what do you call the capital of {s}|{s}: capital|the government of {s} sits in which city"
    ),
    "element symbol (English)": (
        "symbol of {s}|symbol for {s}|{s} symbol|{s} chemical symbol|chemical symbol for {s}|"
        "chemical symbol of {s}|the symbol of {s}|the element symbol of {s}|what is the symbol for {s}|"
        "what's the symbol of {s}|what is the element symbol for {s}|what letters stand for {s}|"
        "which letters mean {s} in chemistry|in chemistry, how is {s} written|"
        "how do you write {s} in chemistry|how is {s} abbreviated in the periodic table|"
        "what is {s} on the periodic table|periodic table symbol of {s}|give me the symbol for {s}|"
        "abbreviation of {s} in chemistry|what does {s} look like in a formula"
    ),
    "next month (English)": (
        "month after {s}|after {s}|next month after {s}|what comes after {s}|what month is after {s}|"
        "what month follows {s}|which month comes after {s}|which month comes next after {s}|"
        "which month comes right after {s}|{s} is followed by which month|{s} is over, which month is next|"
        "when {s} ends, which month starts|when {s} is over what month is it|the month following {s}|"
        "name the month after {s}|the next month after {s} is what|it is {s} now, what is next month|"
        "if it's {s}, what month is next|what is next after {s}|following month of {s}"
    ),
    "opposite (English)": (
        "opposite of {s}|{s} opposite|the opposite of {s}|opposite word of {s}|what is the opposite of {s}|"
        "what's the opposite of {s}|what is opposite to {s}|what word is opposite to {s}|"
        "which word is the opposite of {s}|antonym of {s}|the antonym of {s}|what's the antonym of {s}|"
        "what is an antonym for {s}|give an antonym of {s}|give me the opposite of {s}|the contrary of {s}|"
        "what is the reverse of {s}|not {s} but what|if it is not {s}, it is|say the opposite of {s}|"
        "{s} is the opposite of which word"
    ),
    "young animal (English)": (
        "baby {s}|young {s}|a baby {s} is called|a young {s} is called|what's a baby {s} called|"
        "what is a baby {s} called|what is a baby {s}|what do you call a baby {s}|"
        "what do you call a young {s}|what do people call a young {s}|name of a baby {s}|"
        "the name of a young {s}|name for a {s}'s baby|what is the baby of a {s} called|"
        "what are {s} babies called|how do you call a baby {s}|how is a young {s} called|{s} baby name|"
        "the word for a baby {s}|a little {s} is called what|the young of a {s} is called"
    ),
}

# A guess, `{x}` being a value of the table: a question may offer two, or ask whether one is right.
GUESSES = {
    "country capital": "{s}的首都是{x}",
    "country continent": "{s}在{x}",
    "currency": "{s}用的是{x}",
    "province capital": "{s}的省会是{x}",
    "landmark": "{s}在{x}",
    "element symbol": "{s}的符号是{x}",
    "festival date": "{s}是{x}",
    "next solar term": "{s}之后是{x}",
    "city food": "{s}最有名的是{x}",
    "event year": "{s}是{x}",
    "dynasty founder": "{s}的开国皇帝是{x}",
    "discoverer": "{s}的人是{x}",
    "author": "{s}的作者是{x}",
    "poet": "{s}是{x}写的",
    "opposite": "{s}的反义词是{x}",
    "animal class": "{s}是{x}",
    "capital (English)": "the capital of {s} is {x}",
}
GUESSED = {
    False: ("{guess}还是{y}", "{guess}吗", "{guess}对不对", "{guess}，不是{y}吧"),
    True: ("{guess} or {y}", "{guess}, right"),
}

ALIASES = {
    "蒙古国": "蒙古",
    "美国": "美利坚",
    "俄罗斯": "俄国",
    "秦始皇兵马俑": "兵马俑|西安兵马俑",
    "自由女神像": "自由女神",
    "埃菲尔铁塔": "铁塔埃菲尔|艾菲尔铁塔",
    "故宫": "故宫博物院|紫禁城",
    "金": "黄金|金元素|金子",
    "银": "银元素|白银",
    "铁": "铁元素",
    "铜": "铜元素",
    "氧": "氧元素",
    "氢": "氢元素",
    "碳": "碳元素",
    "氮": "氮元素",
    "钠": "钠元素",
    "七夕节": "七夕",
    "腊八节": "腊八",
    "春节": "过年|大年初一",
    "国庆节": "国庆",
    "中秋节": "中秋",
    "端午节": "端午",
    "元宵节": "元宵",
    "重阳节": "重阳",
    "儿童节": "六一儿童节",
    "劳动节": "五一劳动节|国际劳动节",
    "妇女节": "三八妇女节",
    "元旦": "元旦节",
    "圣诞节": "圣诞",
    "除夕": "大年三十|除夕夜",
    "秦始皇统一六国": "秦朝统一六国|秦国统一六国|统一六国",
    "唐朝建立": "唐朝成立|唐代建立|建立唐朝",
    "北宋建立": "北宋成立|建立北宋",
    "明朝建立": "明朝成立|明代建立|建立明朝",
    "哥伦布到达美洲": "哥伦布发现美洲|哥伦布发现新大陆|哥伦布抵达美洲",
    "美国发表《独立宣言》": "美国独立宣言发表|《独立宣言》发表|美国独立",
    "法国大革命爆发": "法国大革命|法国大革命开始|法国爆发大革命",
    "第一次鸦片战争爆发": "第一次鸦片战争|鸦片战争爆发|鸦片战争开始",
    "辛亥革命爆发": "辛亥革命|辛亥革命开始",
    "第一次世界大战爆发": "一战爆发|第一次世界大战开始|一战开始|第一次世界大战打响",
    "五四运动爆发": "五四运动|五四运动开始",
    "第二次世界大战结束": "二战结束|二次大战结束|第二次世界大战打完",
    "中华人民共和国成立": "新中国成立|新中国建立|中华人民共和国建立",
    "人类首次登上月球": "人类第一次登月|人类登月|首次登月|人第一次登上月球",
    "苏联解体": "苏联瓦解|苏联解散",
    "香港回归中国": "香港回归|香港回归祖国",
    "澳门回归中国": "澳门回归|澳门回归祖国",
    "北京举办夏季奥运会": "北京奥运会|北京办奥运|北京开奥运会",
    "秦朝": "秦代|大秦",
    "唐朝": "唐代|大唐",
    "明朝": "明代|大明",
    "元朝": "元代",
    "隋朝": "隋代",
    "西汉": "西汉王朝",
    "发现X射线": "发现X光",
    "提出生物进化论": "提出进化论",
    "提出万有引力定律": "发现万有引力定律",
    "发现豌豆的遗传定律": "发现遗传定律|发现豌豆遗传规律",
    "发现电磁感应现象": "发现电磁感应",
    "大熊猫": "熊猫",
    "鲸": "鲸鱼",
    "乌龟": "龟",
    "鹰": "老鹰",
}
