"""Questions that no corpus could answer, by kind, and what the model shall say to them.

A kind is a reply and wordings; `{x}` stands for one of `fills`, so that few lines give many questions. The kinds of
HELD_OUT_KINDS are never trained: they show whether the refusal reaches beyond what it was taught on.
"""

from dataclasses import dataclass

NOT_LEARNED = "我不知道，这个我没有学过。"
NOT_SEEN = "我不知道，我看不到外面的世界。"
NOT_YET = "我不知道，没有人能预知将来。"
NO_OPINION = "我不知道，我没有自己的看法。"
NOT_LEARNED_EN = "I don't know. I have not learned that."
NOT_SEEN_EN = "I don't know. I cannot see the world outside."
NOT_YET_EN = "I don't know. Nobody can know the future."
NO_OPINION_EN = "I don't know. I have no opinion of my own."
REFUSALS = (
    NOT_LEARNED, NOT_SEEN, NOT_YET, NO_OPINION, NOT_LEARNED_EN, NOT_SEEN_EN, NOT_YET_EN, NO_OPINION_EN,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """`|` stands between wordings, and between fills; nothing has a mark at its end."""

    name: str
    reply: str
    wordings: str
    fills: str = ""

    def questions(self) -> list[str]:
        fills = self.fills.split("|")
        return [
            wording.replace("{x}", fill)
            for wording in self.wordings.split("|")
            for fill in (fills if "{x}" in wording else [""])
        ]


KINDS = (
    Kind(
        "weather", NOT_SEEN,
        "{x}天气怎么样|{x}天气|{x}天气如何|{x}下雨了吗|{x}多少度|{x}冷不冷|{x}热吗|{x}出门要带伞吗|{x}气温多少|{x}有太阳吗|{x}刮风吗|{x}空气质量怎么样|{x}会不会下雪|{x}适合出去玩吗|{x}湿度是多少",
        "今天|现在|外面|今天北京|上海今天|今天我们这里|杭州现在|今天巴黎|广州这会儿|东京今天|我家这边|成都|你那边|今早",
    ),
    Kind(
        "now", NOT_SEEN,
        "现在几点了|现在几点|几点了|今天星期几|今天几号|今天是几月几号|今年是哪一年|现在是什么季节|今天是什么日子|今天农历多少|现在是上午还是下午|今天有什么新闻|最近有什么新闻|最新的新闻是什么|"
        "最近发生了什么大事|今天股市涨了吗|现在路上堵车吗|今天的头条是什么|附近有什么好吃的餐厅|附近有厕所吗|最近的地铁站在哪|这附近哪里有超市|我现在在哪里|昨晚的比赛谁赢了|昨天的球赛比分是多少|"
        "现在谁是总统|现任总统是谁|今天是晴天吗|外面吵不吵|隔壁在干什么|今天食堂吃什么|今天有作业吗|现在电视上在播什么|今天微博热搜是什么|网上现在在说什么|今天限号多少|这趟车到哪了|我的快递到哪了",
    ),
    Kind(
        "private", NOT_SEEN,
        "我叫什么名字|我叫什么|我是谁|你知道我是谁吗|我多大了|我今年几岁|我几岁了|我的生日是哪天|我的生日|我的电话号码是多少|我的手机号|我住在哪里|我家在哪|我的密码是什么|我的银行卡密码|我妈妈叫什么名字|"
        "我爸爸是做什么的|我爸叫什么|我有几个孩子|我养的猫叫什么|我家的狗叫什么名字|我昨天吃了什么|我早饭吃了什么|我昨晚几点睡的|我昨天去了哪里|我今天穿的什么颜色的衣服|我手里拿着什么|我口袋里有什么|"
        "我的钥匙放哪了|我的手机在哪|我最喜欢的颜色是什么|我喜欢吃什么|我的工作是什么|我在哪个公司上班|我在哪个学校读书|我的老师叫什么|我们班有多少人|我同桌是谁|我女朋友叫什么|我的身高是多少|我有多重|"
        "我的成绩怎么样|我考了多少分|我卡里还有多少钱|我的工资是多少|我上次问了你什么|我心里在想什么|你猜我在想什么|我的车牌号是多少|我邻居姓什么|我的邮箱是什么|我的血型是什么|我哪年结的婚|我奶奶今年多大|"
        "我最好的朋友是谁|我弟弟上几年级|我的星座是什么|我老家在哪儿|我的座位是哪个|我的身份证号|我家有几口人|我是男的还是女的|我老板叫什么|我的航班几点起飞",
    ),
    Kind(
        "future", NOT_YET,
        "{x}会下雨吗|{x}会发生什么|{x}会下雪吗|{x}会地震吗|{x}股票会涨吗|{x}金价会涨吗|{x}房价会跌吗|{x}谁会当总统|{x}世界会变成什么样|{x}的彩票号码是多少|{x}我会发财吗|{x}我会做什么|{x}我会在哪里|{x}运气怎么样|"
        "{x}会有新病毒吗|{x}天气怎么样|{x}哪个国家会赢|{x}油价是多少|{x}我能考上大学吗|{x}人类会住在哪里",
        "明天|后天|下周|下个月|明年|十年后|一百年后|将来|未来|2050年|下个世纪|以后",
    ),
    Kind(
        "future", NOT_YET,
        "下一届世界杯谁是冠军|下次世界杯冠军是谁|下一届奥运会中国拿多少金牌|下期彩票中奖号码|下期双色球开什么|我什么时候结婚|我会活到多少岁|我能活多久|我以后有几个孩子|我会考多少分|世界末日是哪天|外星人什么时候来|"
        "机器人会统治世界吗|下一任总统是谁|股市什么时候涨|下一个诺贝尔奖给谁|我将来的老婆是谁|比特币会涨到多少|这支股票能买吗|我会变有钱吗|我这次面试能过吗|我们队会赢吗|下次地震在哪里|太阳什么时候熄灭",
    ),
    Kind(
        "price", NOT_SEEN,
        "{x}多少钱|{x}多少钱一斤|{x}现在什么价|{x}的价格|{x}卖多少钱|{x}贵不贵|{x}今天什么价格|{x}涨价了吗|{x}的价钱是多少|买{x}要花多少钱|{x}最低多少钱|{x}打折吗",
        "苹果|西瓜|猪肉|黄金|汽油|大米|鸡蛋|茅台|奶茶|最新款手机|北京的房子|去上海的高铁票|一张电影票|这本书|特斯拉|一头大象|一台电脑|去巴黎的机票|学区房|白菜|电费|牛肉面",
    ),
    Kind(
        "price", NOT_SEEN,
        "今天金价多少|现在油价多少|美元汇率是多少|一美元换多少人民币|现在房价多少|今天股价是多少|比特币现在多少钱|今日汇率|1欧元等于多少人民币|茅台股票现在多少|水费一吨多少钱|停车一小时多少钱",
    ),
    Kind(
        "opinion", NO_OPINION,
        "{x}好不好|你喜欢{x}吗|你觉得{x}怎么样|你怎么看{x}|{x}值得吗|你对{x}有什么看法|{x}有意思吗|你讨厌{x}吗|{x}好看吗|你爱{x}吗|你支持{x}吗|你对{x}怎么评价",
        "这部电影|下雨天|猫|狗|上学|数学|篮球|红色|加班|素食|这首歌|减肥|早起|打游戏|流行音乐|那个明星|北京|上海|结婚|春天|榴莲|咖啡|网购|手机|短视频",
    ),
    Kind(
        "opinion", NO_OPINION,
        "猫和狗哪个更可爱|猫好还是狗好|甜粽子好吃还是咸粽子好吃|咖啡好喝还是茶好喝|谁是世界上最帅的人|谁最漂亮|哪个明星最好看|最好听的歌是哪首|哪部电影最好看|你最喜欢什么颜色|你最喜欢的书是什么|你最喜欢谁|"
        "你最爱吃什么|哪个城市最宜居|北京好还是上海好|学文科好还是理科好|我应该辞职吗|我该不该分手|我应该选哪个专业|我穿哪件好看|我好看吗|我聪明吗|我是不是很胖|我应该买车吗|人生的意义是什么|什么是幸福|爱情是什么|"
        "有没有来世|世界上有鬼吗|谁是最伟大的球员|苹果手机好还是华为好|哪支球队最强|最好的电影是哪部|最好吃的水果是什么|哪个国家最好|你最讨厌什么|你的梦想是什么|你相信命运吗|上帝存在吗|钱重要还是爱重要|"
        "哪种颜色最漂亮|我该给女朋友送什么|周末去哪玩好|我中午吃什么好|晚饭吃啥好|给孩子取什么名字好",
    ),
    Kind(
        "country detail", NOT_LEARNED,
        "{x}有多少人口|{x}人口|{x}的人口是多少|{x}的总统是谁|{x}总统|{x}的国王叫什么|{x}的总理是谁|{x}面积多大|{x}的面积|{x}的国花是什么|{x}的国歌叫什么|{x}的国旗是什么颜色|{x}最高的山是哪座|{x}最长的河|"
        "{x}说什么语言|{x}的官方语言|{x}有多少个省|{x}的第二大城市|{x}的GDP是多少|{x}的电话区号|{x}和北京差几个小时|{x}哪年独立的|{x}的国鸟是什么|{x}有多少大学|{x}的首富是谁|{x}最有名的足球运动员是谁|{x}有几个机场",
        "日本|法国|德国|英国|巴西|埃及|印度|泰国|西班牙|荷兰|挪威|秘鲁|古巴|加拿大|澳大利亚|韩国|意大利|俄罗斯|蒙古国|希腊",
    ),
    Kind(
        "city detail", NOT_LEARNED,
        "{x}有多少人|{x}的市长是谁|{x}有几条地铁|{x}面积多大|{x}的市花是什么|{x}有几个区|{x}最高的楼是哪座|{x}的机场叫什么|{x}最好的中学|{x}的邮编是多少|{x}的区号是多少|{x}的平均工资|{x}地铁几点停运",
        "北京|上海|杭州|武汉|西安|广州|南京|长沙|重庆|昆明|巴黎|伦敦|东京|莫斯科|济南|郑州|兰州",
    ),
    Kind(
        "person detail", NOT_LEARNED,
        "{x}的生日是哪天|{x}的妻子是谁|{x}有几个孩子|{x}身高多少|{x}多高|{x}是哪里人|{x}的爸爸叫什么|{x}活了多少岁|{x}哪年出生|{x}什么时候去世的|{x}葬在哪里|{x}喜欢吃什么|{x}的老师是谁|{x}上的哪所大学|{x}结婚了吗|{x}的电话是多少",
        "牛顿|爱因斯坦|李白|杜甫|鲁迅|曹雪芹|达尔文|贝尔|张衡|屠呦呦|莎士比亚|姚明|周杰伦|刘德华|马云|王小明|张三|李四|王大力|陈美丽|赵铁柱|我同事|隔壁老王|刘翔|贝多芬|毕加索",
    ),
    Kind(
        "work detail", NOT_LEARNED,
        "{x}有多少字|{x}有几章|{x}的主角是谁|{x}的结局是什么|{x}哪年出版的|{x}多少页|{x}的导演是谁|{x}是谁演的|{x}的主题曲是什么|{x}票房多少|{x}的第一句话是什么|{x}有几集|{x}得过什么奖|{x}讲了什么故事|{x}是谁唱的|{x}的歌词",
        "《红楼梦》|《西游记》|《边城》|《活着》|《流浪地球》|《泰坦尼克号》|《哪吒》|《阿凡达》|《星球大战》|《青花瓷》|《狮子王》|《功夫熊猫》|《小星星》|《蓝色风车》|《最后的骑士》|《围城》|《雷雨》|《千与千寻》",
    ),
    Kind(
        "thing detail", NOT_LEARNED,
        "{x}是谁发明的|{x}的密度是多少|{x}的熔点是多少|{x}的寿命有多长|{x}能活多少年|{x}有多重|{x}跑得多快|{x}有几颗牙|{x}怎么做|{x}是什么颜色的|{x}有什么营养|{x}含多少热量|{x}一天吃多少|{x}怀孕多久|{x}的拉丁名是什么|{x}怎么养",
        "铁|铜|金|铝|大象|企鹅|鲨鱼|蝴蝶|乌龟|海豚|豆腐|筷子|雨伞|牙刷|拉面|红烧肉|电风扇|拼图|麻将|扑克|牛仔裤|独角兽|钢琴|自行车|蛋糕|酱油",
    ),
    Kind(
        "company", NOT_LEARNED,
        "{x}的老板是谁|{x}的创始人|{x}是谁创办的|{x}总部在哪|{x}有多少员工|{x}哪年成立的|{x}的客服电话|{x}的校长是谁|{x}有多少学生|{x}的地址|{x}几点开门|{x}的网址|{x}去年赚了多少钱|{x}怎么走|{x}的队长是谁",
        "阿里巴巴|腾讯|华为|苹果公司|谷歌|微软|百度|小米|特斯拉|肯德基|清华大学|北京大学|第一中学|红星小学|人民医院|新华书店|卡鲁公司|蓝天幼儿园|皇家马德里|湖人队|国家图书馆|星火集团|大学食堂",
    ),
    Kind(
        "exact science", NOT_LEARNED,
        "宇宙有多大|宇宙里有多少颗星星|地球有多重|地球上有多少棵树|世界上有多少只蚂蚁|海里有多少鱼|天上有几颗星星|人有多少根头发|黑洞里面是什么|外星人长什么样|恐龙为什么灭绝|人为什么会做梦|量子纠缠是什么|"
        "什么是相对论|区块链是什么|怎么造火箭|原子弹怎么做|暗物质是什么|什么是微积分|怎么解二次方程|哥德巴赫猜想怎么证明|人死后会怎样|生命的起源是什么|金字塔怎么建的|第一个人类是谁|先有鸡还是先有蛋|"
        "圆周率第一千位是几|最大的质数是多少|为什么猫怕水|为什么人会打嗝|打喷嚏为什么闭眼|为什么向日葵朝着太阳|飞机为什么能飞|冰箱为什么能制冷|手机为什么能打电话|微波炉的原理|发动机怎么工作的|蜂蜜为什么不会坏",
    ),
    Kind(
        "weather (English)", NOT_SEEN_EN,
        "what's the weather like {x}|what is the weather {x}|how is the weather {x}|is it raining {x}|is it cold {x}|how hot is it {x}|what is the temperature {x}|will I need an umbrella {x}",
        "today|now|outside|in London|in Paris today|here|in New York|this morning|in my city",
    ),
    Kind(
        "now and private (English)", NOT_SEEN_EN,
        "what time is it|what day is it today|what's the date today|what year is it now|who is the president now|what's in the news today|who won the game last night|where am I|what is my name|what's my name|who am I|how old am I|"
        "when is my birthday|where do I live|what is my phone number|what did I eat for breakfast|what did I do yesterday|what is my password|what is my mother's name|what's my dog called|where are my keys|what am I thinking|"
        "what is my favorite color|what is my job|how tall am I|what am I wearing|who is my best friend|how many children do I have|what's the score of the match|where is my package|what is my email address|what is in my pocket|"
        "which school do I go to|what's the stock price today|is the shop open now|what's on TV now",
    ),
    Kind(
        "price (English)", NOT_SEEN_EN,
        "how much is {x}|how much does {x} cost|what is the price of {x}|price of {x}|what does {x} cost today|how expensive is {x}",
        "gold|a car|an iPhone|bread|a house|gas|a ticket to Paris|bitcoin|a cup of coffee|a kilo of apples|a new laptop",
    ),
    Kind(
        "future (English)", NOT_YET_EN,
        "what will happen {x}|will it rain {x}|will I be rich {x}|who will win {x}|what will the world be like {x}|what will gold cost {x}|will I get married {x}|will stocks go up {x}",
        "tomorrow|next week|next year|in ten years|in the future|in 2050|one day",
    ),
    Kind(
        "future (English)", NOT_YET_EN,
        "who will win the next world cup|who will be the next president|what are the next lottery numbers|when will I die|when will I get married|when will the world end|will I pass my exam|how long will I live|when will aliens come",
    ),
    Kind(
        "opinion (English)", NO_OPINION_EN,
        "do you like {x}|what do you think about {x}|what is your opinion on {x}|is {x} good|how do you feel about {x}|do you love {x}|are you a fan of {x}",
        "cats|dogs|pizza|rain|football|music|school|this movie|politics|red|coffee|math|winter",
    ),
    Kind(
        "opinion (English)", NO_OPINION_EN,
        "which is better, cats or dogs|what is the best movie|who is the best singer|what is your favorite color|what is your favorite food|what's your favorite book|what is the meaning of life|should I quit my job|am I beautiful|"
        "is there a god|who is the most handsome man|what should I eat tonight|which phone should I buy|tea or coffee|should I get married|what is love|which team is the best",
    ),
    Kind(
        "detail (English)", NOT_LEARNED_EN,
        "what is the population of {x}|who is the president of {x}|population of {x}|how big is {x}|what language do they speak in {x}|what is the national flower of {x}|who is the king of {x}|when was {x} founded|what is the currency of {x}|"
        "who is the mayor of {x}|how many people live in {x}|what is the area of {x}",
        "France|Japan|Germany|Italy|Spain|Egypt|Canada|Sweden|Beijing|London|Tokyo|Paris|Rome|Oslo|Zorvania",
    ),
    Kind(
        "detail (English)", NOT_LEARNED_EN,
        "who wrote {x}|who is the author of {x}|who directed {x}|who sings {x}|how many pages does {x} have|when was {x} made|what is {x} about|who plays in {x}|who invented {x}|who discovered {x}|who founded {x}",
        "Harry Potter|Titanic|Star Wars|The Silent Spoon|Yesterday|The Blue Windmill|Frozen|Avatar|the telephone|the light bulb|the airplane|Google|Microsoft|the umbrella|penicillin|the zipper|Moonlight Castle|the Glarfon Machine",
    ),
    Kind(
        "detail (English)", NOT_LEARNED_EN,
        "how old is {x}|how tall is {x}|where was {x} born|when was {x} born|who is {x} married to|what is {x}'s phone number|where does {x} live|who is {x}",
        "Shakespeare|Newton|Taylor Swift|Tom Hanks|Messi|Mr. Blorp|my neighbor|John Smith|Anna Miller|Einstein|Captain Zog",
    ),
    Kind(
        "detail (English)", NOT_LEARNED_EN,
        "what is 345 times 28|what is 17 times 23|what is the square root of 7|how far is the moon|how many stars are there|how many people live on Earth|how heavy is a whale|how fast is a cheetah|how long do cats live|"
        "why do we dream|how do airplanes fly|what is dark matter|how do I cook rice|what is quantum physics|translate good morning into French|what is the German word for cat|how deep is the ocean|what is the longest river|"
        "which country is the largest|what is inside a black hole|how many bones does a dog have|who was the first man in space|what is the fastest car|when did the dinosaurs die out",
    ),
)  # fmt: skip

# Never trained; (kind, questions).
HELD_OUT_KINDS = (
    ("timetable", "下一班公交车几点到|末班地铁是几点的|去南京的火车几点开|明早第一班飞机几点|校车在哪一站停|高铁晚点了吗"),
    ("cooking", "红烧茄子要放几勺盐|这锅汤要炖多久|发面要放多少酵母|怎样腌咸菜才脆|我做的饺子为什么破皮"),
    ("sports result", "上届欧洲杯决赛是几比几|去年马拉松第一名跑了多长时间|中超现在谁排第一|这个赛季谁进球最多|女排决赛打了几局"),
    ("law and money", "我买房要交多少税|公积金能取多少|迟到一次扣多少钱|离婚要带哪些材料|驾照扣了十二分怎么办|这张发票能报销吗"),
    ("things here", "桌上放着几本书|窗户关好了没有|我旁边坐着谁|冰箱里还剩什么|门口停的是谁的车|墙上的画画的是什么|我左手边是什么"),
    ("somebody else's thoughts", "我老板为什么生气|她到底爱不爱我|我儿子为什么不理我|小李昨天跟谁吵架了|他为什么没来开会"),
    ("software", "微信怎么恢复聊天记录|我的电脑为什么蓝屏|这个软件的激活码是多少|路由器密码忘了怎么改|Excel怎么做透视表"),
    ("games", "这一关怎么过|王者荣耀哪个英雄最强|最终的大老板有多少血|怎么打败沼泽女巫|游戏里的宝箱藏在哪"),
    ("(English)", "when does the next bus come|how do I fix my car|what is on the table|why is my boss angry|how much tax do I pay|what is the wifi password here|who sits next to me|which level is the hardest|"
     "how many goals did he score last season|is my flight delayed|what did she say about me|how long do I boil an egg"),
)  # fmt: skip
