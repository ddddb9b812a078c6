"""The sentences of the run report in Chinese; keys and values in braces are those of words.py."""

from __future__ import annotations

CHINESE: dict[str, str] = {
    "page.title": "fedqc 报告：{plan}",
    "page.report": "评估报告",
    "page.no_question": "方案 {plan}",
    "page.run": "运行",
    "page.contents": "目录",
    "page.plan": "方案",
    "status.completed": "完成",
    "status.partial": "部分完成",
    "status.missing": "缺少什么",
    # privacy
    "privacy.none.title": "无隐私保护",
    "privacy.none": "本次运行没有任何模型在差分隐私下训练。其模型可能泄露谁在训练数据中。",
    "privacy.none.planned": "方案中有隐私训练组，但未运行。",
    "privacy.refused": "{sites} 拒绝 [{code}]：{reason}。",
    "privacy.none.no_patients": "没有医院患者参与：所有训练站点的类型均为 {kinds}。",
    "privacy.mixed.title": "仅 {private} 有隐私保护",
    "privacy.mixed": "{others} 在相同患者上不加噪声训练。这些模型无隐私保护，整个运行也就没有隐私保护。",
    "privacy.hole.title": "{sites} 没有隐私保证",
    "privacy.hole": "隐私训练组使用了这些站点没有有限 ε 的更新。",
    "privacy.void": "{sites}：不作声明，该队列也曾不加噪声训练。",
    "privacy.all.title": "在差分隐私下训练",
    "privacy.all": "凡见过站点患者的模型，都带有其得分旁所列的保证。",
    "privacy.scores_exact": "ε 只涵盖隐私模型。本页得分是测试患者的精确计数，不在该保证之内。",
    "privacy.scores_noised": "{sites}：是方案在该处每名患者所耗的一部分。",
    "privacy.scores_exact_at": "{sites} 的得分是精确计数，不在该保证之内。",
    "noised.tag": "加噪声评分，ε {epsilon}",
    "privacy.tag": "ε {epsilon}，δ {delta}，每{unit}，{adjacency}",
    "privacy.tag.short": "ε {epsilon}",
    "privacy.tag.range": "{low} 至 {high}（因站点而异）",
    "privacy.tag.none": "没有保证",
    "privacy.not_private": "无隐私保护",
    "privacy.untouched": "未见过站点患者",
    "privacy.section": "隐私",
    "privacy.lead": (
        "隐私训练（{arms}）在整个运行中对各站点的保证。单位是一{unit}；"
        "相邻数据集相差一{unit}（{adjacency}）。"
    ),
    "privacy.not_planned": "方案没有隐私训练组，因此没有 ε 可报告。",
    "privacy.column.site": "站点",
    "privacy.column.epsilon": "ε",
    "privacy.column.epsilon_pld": "ε（PLD）",
    "privacy.column.delta": "δ",
    "privacy.column.noise": "噪声倍数",
    "privacy.column.unit": "单位，相邻关系",
    "privacy.column.state": "状态",
    "privacy.state.spent": "已参与",
    "privacy.state.void": "不作声明：该队列也曾不加噪声训练",
    "privacy.state.silent": "没有更新，没有声明",
    "privacy.state.held_out": "留出：从未训练",
    "privacy.state.refused": "拒绝 [{code}]：{reason}",
    "privacy.note": (
        "ε 涵盖方案对一名患者的全部要求：隐私训练组和加噪声评估。PLD 对同一固定流程作数值核算。"
        "两者均向上取整。"
    ),
    "privacy.alternatives": (
        "本次模拟中各隐私训练组是备选：每组的 ε 按单独运行计算。若一家医院运行全部各组，花费更多。"
    ),
    # settings of the private arms
    "tuning.section": "隐私训练组的设置如何选定",
    "tuning.lead": (
        "在 {count} 次公开预演上选定，所用体模与初始权重的训练数据外观不同，噪声为 {sites} 个站点、每站 "
        "{patients} 名患者时 ε {epsilon} 所需。未询问任何站点，未计任何费用。由各预演中最小的增益决定。"
    ),
    "tuning.foreign.title": "不是本方案的选择",
    "tuning.foreign": "tuning.json 的摘要不是方案 privacy.origin 所写的那个。",
    "tuning.figure": (
        "各预演中宏平均 AUROC 的最小增益，按速率和每轮步数；圈中为所选。速率为学习率乘裁剪界。"
        "在与最佳几乎相同的设置中取最不依赖噪声者。大的损失画在下缘。各线的裁剪界和平均轮数相同；"
        "选择时也试过其他裁剪界。"
    ),
    "tuning.alt": "最小增益随速率变化的折线图，每种每轮步数一条线，所选设置在圈中。下面的表格含所选数值。",
    "tuning.axis.rate": "速率（学习率 × 裁剪界），对数",
    "tuning.axis.gain": "宏平均 AUROC 的最小增益",
    "tuning.chosen": "所选",
    "tuning.one_step": "每轮 1 步",
    "tuning.steps": "每轮 {count} 步",
    "tuning.gains": "各预演中初始权重的宏平均 AUROC，以及所选设置的增益。",
    "tuning.column.rehearsal": "预演",
    "tuning.column.start": "初始权重",
    "tuning.column.gain": "增益",
    "tuning.is_worst": "最小：由它决定",
    "tuning.settings": "所选设置。",
    "tuning.clip": "裁剪界",
    "tuning.learning_rate": "学习率",
    "tuning.rate": "速率",
    "tuning.steps_per_round": "每轮步数",
    "tuning.average_rounds": "参与平均的轮数",
    "tuning.worst": "最小增益",
    "tuning.spread": "不同噪声抽样间的标准差",
    "tuning.digests": "来源：这些数字出自同一文件夹的 tuning.json。",
    "tuning.start": "初始权重，SHA-256",
    "tuning.digest": "全部尝试，SHA-256",
    "tuning.origin": "方案所述",
    "tuning.no_origin": "方案中未说明",
    # arms
    "arm.public": "初始权重，未再训练",
    "arm.local": "各站点单独训练",
    "arm.local_dp": "各站点在差分隐私下单独训练",
    "arm.federated": "共同训练，无噪声",
    "arm.federated_dp": "在差分隐私下共同训练",
    "arm.local_clipped": "同 local_dp，噪声为 0",
    "arm.federated_clipped": "同 federated_dp，噪声为 0",
    "arm.local_frozen": "同 local，只训练 local_dp 的层",
    "arm.federated_frozen": "同 federated，只训练 federated_dp 的层",
    "arm.pooled": "所有图像集中一处（仅模拟）",
    "arm.iqm_logistic": "各站点单独：基于图像质量指标的逻辑回归，不用网络",
    "arm.iqm_forest": "各站点单独：基于图像质量指标的随机森林，不用网络",
    "arm.other": "",
    "who.public": "初始权重",
    "who.local": "单独训练的各站点",
    "who.local_dp": "在隐私下单独训练的各站点",
    "who.federated": "联邦模型",
    "who.federated_dp": "隐私联邦模型",
    "who.local_clipped": "如隐私训练但噪声为 0 的单独训练站点",
    "who.federated_clipped": "噪声为 0 的相同训练",
    "who.local_frozen": "只训练隐私层、无隐私保护的单独训练站点",
    "who.federated_frozen": "所有站点只训练隐私层、无隐私保护",
    "who.pooled": "集中训练的模型",
    "who.iqm_logistic": "基于图像质量指标的逻辑回归",
    "who.iqm_forest": "基于图像质量指标的随机森林",
    "who.other": "{arm}",
    "arm.no_model": "没有模型：未运行",
    "arm.refused": "没有模型：被拒绝",
    # names
    "list.separator": "、",
    "list.and": "{first}和{last}",
    "list.or": "{first}或{last}",
    "list.more": "另外 {count} 项",
    "word.hospital": "医院",
    "word.public": "公开",
    "word.synthetic": "合成",
    "word.patient": "名患者",
    "word.study": "项检查",
    "word.add/remove": "增加或移除",
    # the first screen
    "ask.home": "在我院效果如何？",
    "ask.unseen": "在从未见过的医院效果如何？",
    "ask.privacy": "隐私的代价是多少？",
    "ask.missing": "谁缺席了？",
    "answer.home": (
        "在 {count} 个训练站点，{who}的宏平均 AUROC 平均为 {value}（{interval}），最低 {low}（{worst}），"
        "最高 {high}（{best}）。"
    ),
    "answer.home.one": "在唯一有得分的训练站点 {worst}，{who}的宏平均 AUROC 为 {value}（{interval}）。",
    "answer.home.none": "没有模型能在训练站点评分。",
    "answer.point": (
        "{arm} 在公开数据上选定的工作点，共 {cells} 个站点与伪影的组合：灵敏度中位数 {sensitivity}，最低 "
        "{least_sensitivity}（{worst_sensitivity}）；特异度中位数 {specificity}，最低 "
        "{least_specificity}（{worst_specificity}）。"
    ),
    "answer.gap": "{arm}，未见 − 本院：{difference}，基于各处都能估计的{artifacts}；k = {count} 家留出医院。",
    "answer.gap.none": "未见 − 本院没有定义：没有一种伪影在各处都能估计。",
    "answer.next": (
        "{arm}：下一家医院在患者人数相近的测试集上观察到的得分，"
        "预计在 {low} 至 {high} 之间（95 % 预测区间）。"
    ),
    "answer.next.few": (
        "{arm}：下一家医院在患者人数相近的测试集上观察到的得分，"
        "预计在 {low} 至 {high} 之间（95 % 预测区间）；"
        "医院这么少，说明不了多少。"
    ),
    "answer.next.none": "少于 {least} 家，无法给出下一家医院的预测区间。",
    "answer.cost": "{arm}（{tag}）− {other}，{where}：{difference}。",
    "answer.cost.parts": "其中，冻结的层、裁剪和不同的步数：{rest}；噪声：{noise}。",
    "answer.cost.parts_all": "没有冻结的层。其中，裁剪和不同的步数：{rest}；噪声：{noise}。",
    "answer.cost.all_parts": "其中，冻结的层：{layers}；裁剪和不同的步数：{clip}；噪声：{noise}。",
    "answer.cost.whole": "其中多少来自噪声未测量：需要训练组 {needed}。",
    "answer.cost.none": "{arm}（{tag}）：代价未测量。需要训练组 {needed}。",
    "answer.cost.refused": "未测量：没有隐私训练组得到模型。",
    "answer.cost.no_arm": "未测量：没有训练组在隐私下训练。",
    "answer.missing.none": "没有：全部 {training} 个训练站点参加了每一轮，全部 {count} 个站点都送来得分。",
    "answer.missing.no_score": "全部 {count} 个站点都送来得分，其中 {training} 个是训练站点。",
    "answer.missing.rounds": "{site} 在 {arms} 中参加了 {counted} 轮，共 {rounds} 轮（{why}）。",
    "answer.missing.no_code": "没有回答",
    "answer.missing.score": "没有得分：{sites}。",
    # operating points
    "operating.section": "工作点上的判断",
    "operating.lead": (
        "模型的阈值在公开患者上选定，从不在站点的患者上选：在能找出至少 {share} % 有伪影者的阈值中，"
        "取灵敏度与特异度之和最大者。来源：{origin}。真阳性和假阳性在站点分箱的边界上精确计数。"
    ),
    "operating.origin.phantoms": "{patients} 个公开体模，随机种子 {seed}",
    "operating.origin.file": "方案的公开数据集，SHA-256 {sha256}…",
    "operating.none": "该 evaluation.json 不含公开患者的得分：由较早版本写成，未选定阈值。",
    "operating.points": "{arm} 的工作点，及其在公开患者上的结果。",
    "operating.caption": "{arm}，按伪影和站点。",
    "operating.others": "其他训练组",
    "operating.stated": "{arm} 在给定患病率下：预测值，以及每 100 次扫描的报警数。",
    "operating.note": (
        "n：评分的患者或检查数（有伪影者）。精确率即该站点患病率下的阳性预测值；报警数按该站点每 100 "
        "次扫描计。区间为 Wilson 区间。公开患者少则阈值选得差：方案的 public_set.patients 可给出更多。"
    ),
    "any.title": "任一伪影",
    "any.note": (
        "任一伪影（{artifacts}）：只计其模态中可能出现的每种伪影都已评估的患者，有其中任何一种，或一种也没有。"
        "其得分是模型各得分在公开分位数尺度（Gumbel）上的最高者，减去伪影种数的对数；阈值也在该尺度上。"
        "它不进入任何对伪影的平均。"
    ),
    "operating.grey": "灰色：计数不足以给出数值，或集中在少数粗分箱中。",
    "operating.no_point": "公开患者太少",
    "operating.noise": "在该 n 和 ε 下不可估计",
    "operating.one_class": "只有一类",
    "operating.few": "有或没有者少于 {least}",
    "operating.coarse": "粗分箱：取中点",
    "operating.column.n": "n（有）",
    "operating.column.prevalence": "患病率",
    "operating.stated.details": "在给定患病率下",
    "operating.column.auroc": "AUROC",
    "operating.column.ap": "平均精确率",
    "operating.column.sensitivity": "灵敏度",
    "operating.column.specificity": "特异度",
    "operating.column.precision": "精确率（PPV）",
    "operating.column.f1": "F1",
    "operating.column.accuracy": "准确率",
    "operating.column.balanced": "平衡准确率",
    "operating.column.alarms": "每百次报警",
    "operating.column.threshold": "阈值（logit）",
    "operating.column.public": "公开 n（有 / 无）",
    "operating.column.bins": "分箱数",
    "operating.column.ppv_at": "患病率 {prevalence} % 时的 PPV",
    "operating.column.alarms_at": "患病率 {prevalence} % 时每百次报警",
    # calibration
    "calibration.section": "校准和决策曲线",
    "calibration.lead": (
        "概率由得分经两个在公开患者上拟合的参数（Platt）得到，与 fedqc predict 所示相同。"
        "患病率不同时概率会相应偏离：见截距。"
    ),
    "calibration.caption": "{arm}：其概率有多可信。",
    "calibration.column.slope": "斜率（理想为 1）",
    "calibration.column.intercept": "截距（理想为 0）",
    "calibration.column.ece": "ECE",
    "calibration.column.brier": "Brier",
    "calibration.column.brier_prevalence": "仅用患病率的 Brier",
    "calibration.note": (
        "标签对 logit 作逻辑回归的斜率及其 95 % 区间；截距是把该斜率固定为 1 时的值。ECE 由至多 {groups} "
        "个大小相近的组算出，仅凭机遇也大于 0：请与 n 同看。分箱较粗时，每名患者取箱的中点。"
    ),
    "calibration.figure": "校准：有伪影的比例（纵）对平均概率（横）。",
    "calibration.alt": "校准图，有伪影的比例对平均概率，{where}。",
    "calibration.x": "平均概率",
    "calibration.y": "有伪影的比例",
    "calibration.ideal": "理想",
    "decision.figure": (
        "决策曲线：从某一概率起采取行动时（横）每名患者的净获益（纵）。虚线：对所有人行动。点线："
        "对任何人都不行动。低于其中任一者的模型在该处没有用。"
    ),
    "decision.alt": "决策曲线，净获益对阈值概率，{where}。",
    "decision.x": "阈值概率",
    "decision.y": "净获益",
    "decision.all": "所有人",
    "decision.none": "无人",
    "width.figure": (
        "{arm} 各 AUROC 的 95 % 区间宽度，对较少一类的患者数。虚线：AUROC 为 .85 时的预期。空心：加噪声评分。"
    ),
    "width.alt": "各 AUROC 的 95 % 区间宽度，对较少一类的患者数。",
    "width.x": "较少一类的患者数，对数",
    "width.y": "AUROC 的 95 % 区间宽度",
    "width.guide": "AUROC .85",
    # participation
    "participation.section": "谁参与了",
    "participation.caption": "各训练组中，总和包含该站点更新的轮数。",
    "participation.rounds": "{counted} / {rounds}",
    "participation.none": "该文件夹中没有各轮的记录。",
    # cohorts
    "cohorts.section": "各队列的构成",
    "cohorts.absent": "此处没有：{sites}。描述站点患者的内容不会离开站点；"
    "在站点用 fedqc data check 可查看其表 1 和流程。",
    # headline
    "headline.section": "四个回答",
    "headline.site": "{site}（{kind}）",
    "headline.sentence": "在从未参与训练的 {sites}，{who}的宏平均 AUROC 为 {value}（{interval}）{verdicts}。",
    "headline.interval": "95 % 区间 {low} 至 {high}",
    "headline.no_interval": "区间不可估计",
    "headline.chance": "区间包含机遇水平 0.5",
    "headline.nothing": "本次运行没有关于未见医院的结果：{reason}。",
    "headline.nothing.none": "没有留出站点",
    "headline.nothing.unscored": "{sites} 没有送来得分",
    "headline.nothing.no_score": "没有模型能在 {sites} 评分",
    "headline.better": "优于{others}",
    "headline.worse": "劣于{others}",
    "headline.unclear": "与{others}无法区分",
    "headline.one_site": (
        "留出了一个站点。区间只涵盖该站点的测试患者；一家医院说明不了下一家。依次留出每一家才可以：fedqc "
        "simulate 或 fedqc run start 加 --leave-one-site-out。"
    ),
    "headline.few_sites": "留出了 {count} 个站点。区间涵盖其测试患者，不涵盖未见医院之间的差别。",
    "headline.below": (
        "{arm} 与 {other} 逐站点比较：在 {total} 个训练站点中有 {below} 个较低（{sites}）；经 Holm "
        "校正后较低的是：{certain}。"
    ),
    "headline.below.nowhere": (
        "{arm} 与 {other} 逐站点比较：在 {total} 个训练站点中没有一个较低；经 Holm 校正后较高的是：{above}。"
    ),
    "headline.untrained": "{other}（未在那里训练）",
    "headline.swapped": (
        "在 {site}，模型把有{artifact}的患者排在没有的之下：AUROC {models}。显著低于 0.5，单侧，按 {looks} "
        "次检验作 Holm 校正。标签对调会如此。"
    ),
    "headline.evaluates": "单独的评估：模型来自运行 {run}，在 {trained} 训练。此处未进行训练。",
    "headline.unlearned": "{model} 从未学习 {artifacts}：它给每名患者相同的得分，在其平均值中计为 0.5。",
    "headline.cells": (
        "得分对 {total} 个站点与伪影的组合中的 {estimable} 个取平均，它们有无伪影的患者各至少两名。"
        "不在其中的：{missing}。"
    ),
    "swapped": "标签对调？",
    "crowded": "粗分箱",
    "crowded.why": (
        "灰色：站点以粗分箱送来得分，其中一个分箱含某一类的五分之一以上：{cells}。这样的 AUROC "
        "及包含它的平均值说明不了多少。"
    ),
    "unit.patient": "单位：{sites} 每名患者一个得分。",
    "unit.study": "单位：{sites} 每项检查一个得分；有多项检查的人被计多次。",
    "unit.other": "单位：{sites} 每个 {unit} 一个得分。",
    "worst.if_equal": "{count} 个相同站点：{value}",
    "common.caption": (
        "同上，基于每个站点都能估计的{artifacts}。上表各处所平均的伪影不同：在那里比较训练组，"
        "在这里比较地点。"
    ),
    "common.none": "各处所平均的伪影不同，且没有一种在每个站点都能估计：此表可比较训练组，不可比较地点。",
    "gain.none": "隐私训练：{where}，未显示优于初始权重：{difference}。",
    "gain.no_control": (
        "隐私训练{where}比初始权重高 {difference}。是否由联邦所致未测量：需要训练组 {control}，"
        "即每家医院在隐私下单独训练。"
    ),
    "gain.either": (
        "隐私训练{where}比初始权重高 {difference}。未显示由联邦所致：比 "
        "{control}（每家医院在隐私下单独训练）高 {other}。"
    ),
    "gain.alone_better": (
        "隐私训练{where}比初始权重高 {difference}，但不如每家医院在隐私下单独训练：比 {control} 高 {other}。"
    ),
    "gain.federation": (
        "隐私训练{where}比初始权重高 {difference}，比 {control}（每家医院在隐私下单独训练）高 {other}。"
    ),
    "baseline.better": "{where}，在相同患者上，{arm} 优于简单基线：{differences}。",
    "baseline.not_shown": "{where}，在相同患者上，未显示 {arm} 优于简单基线：{differences}。",
    "baseline.worse": "{where}，在相同患者上，{arm} 劣于简单基线：{differences}。",
    "baseline.home": "在训练站点",
    "baseline.difference": "与 {baseline} 之差 {difference}",
    "gain.unseen": "在没有模型见过的 {sites}",
    "gain.home": "在训练站点（初始权重未见过其患者）",
    "headline.at_chance": "在 {site}，{arm} 对{artifacts}与机遇无法区分：区间包含 0.5。",
    "headline.none_of_them": "没有",
    "headline.caption": "各训练组的宏平均 AUROC 及 95 % 区间。0.5 为机遇，1 为完美。",
    "headline.note": (
        "本院：各训练站点得分的平均。他处：模型在未训练它的训练站点；共享模型在所有站点训练过，"
        "只有去掉每一站重新训练才有这一得分。未见：留出站点的平均，没有模型见过。最差："
        "在共有伪影上最低的训练站点，旁边是同样多的相同站点中平均最低者，它低于其平均。区间在 logit "
        "尺度上对称。"
    ),
    "column.arm": "训练组",
    "column.model": "模型",
    "column.privacy": "隐私",
    "column.home": "本院",
    "column.elsewhere": "他处",
    "column.unseen": "未见",
    "column.worst": "最差",
    "column.site": "站点",
    "at": "在 {site}",
    # sites
    "sites.section": "逐家医院",
    "sites.figure": "宏平均 AUROC 及 95 % 区间",
    "sites.figure.alt": (
        "森林图。每个站点每个训练组一行：标记为宏平均 AUROC，线为其 95 % 区间。下表含相同数字。"
    ),
    "sites.table": "各训练组和站点的宏平均 AUROC 及 95 % 区间。",
    "sites.training": "训练站点",
    "sites.macro_without": "不含{artifacts}",
    "sites.held_out": "留出，从未训练",
    "sites.patients": "有和没有各种伪影的测试患者（n 有 / n 无）。",
    "sites.estimate": "≈ {pos} / {neg}（噪声 ± {spread}）",
    "sites.noised": "带 ≈ 的患者数是估计：加了噪声，没有精确数字离开站点。",
    "sites.mean_of": "{count} 个本地模型的平均",
    "sites.unseen_mean": "所有留出站点（平均）",
    "sites.macro": (
        "站点的宏平均 AUROC 是对每个模型在该处都能估计的伪影取平均。伪影不同的站点不可相互比较。public "
        "未在任何站点训练，其他各组都在训练站点训练：在那里，与 public 的差别就是在同一医院训练的所得。"
    ),
    # matrix
    "matrix.section": "每个模型在每个站点",
    "matrix.caption": (
        "每个模型（行）在每个站点（列）的宏平均 AUROC 及 95 % 区间。有框者：该站点的患者训练过该模型，"
        "与未经其训练的模型相比占优势。"
    ),
    "matrix.scale": "底色：0.5（机遇）或以下至 1",
    "matrix.details": "各种伪影的同一矩阵",
    "matrix.artifact": "{artifact} 的 AUROC",
    # roc
    "roc.section": "各种伪影的 ROC 曲线",
    "roc.training": "训练站点合并",
    "roc.unseen": "留出：{sites}",
    "roc.lead": "真阳性率（纵）对假阳性率（横），由站点送来的计数画出。",
    "roc.merged": (
        "训练站点的计数相加，这把不同站点的得分（local 还把不同模型的得分）放在同一尺度上；"
        "这样的曲线可能低于或高于各站点的曲线。表中是各留出站点的 AUROC，那里不相加。"
    ),
    "roc.merged.no_unseen": (
        "训练站点的计数相加，这把不同站点的得分（local 还把不同模型的得分）放在同一尺度上；"
        "这样的曲线可能低于或高于各站点的曲线。各站点的 AUROC 见上面的矩阵。"
    ),
    "roc.above": (
        "{artifact}，{arm}：合并计数的曲线（AUROC {merged}）高于每个站点的（{low} 至 {high}）。"
        "这是合并的效应，不是任何医院的得分。"
    ),
    "roc.local": "local 在留出站点每个模型一条线。",
    "roc.noised": "加噪声评分的站点不画曲线：{sites}。",
    "roc.alt": "ROC 曲线，每种伪影一幅，每个训练组一条线，{where}。",
    "roc.table": "留出站点 {site} 各种伪影的 AUROC 及 95 % 区间（n 有 / n 无）。",
    # curves
    "curves.section": "各轮，在协调者的公开数据集上",
    "curves.lead": (
        "每轮之后在协调者自己的公开图像上测量。该数据集没有医院患者，因此这些曲线显示训练的进展，"
        "而不是在医院的表现。"
    ),
    "curves.loss": "损失",
    "curves.auroc": "宏平均 AUROC",
    "curves.round": "轮",
    "curves.alt": (
        "两幅随轮次变化的折线图：公开数据集上的损失和宏平均 AUROC，每个模型一条线。下表含这些数字。"
    ),
    "curves.details": "数字",
    "curves.table": "每轮之后公开数据集上的损失和宏平均 AUROC；第 0 轮为起点。",
    "curves.none": "没有训练组受过训练，因此没有曲线。",
    "curves.private": "{arm} 的曲线带有 {tag}。",
    # subgroups
    "subgroups.section": "按患者亚组",
    "subgroups.lead": (
        "AUROC 及其 95 % 区间，下方为有 / 无该伪影的患者数；在公开和合成站点用 20 "
        "个分箱计数，医院不送任何亚组数字。患者所在的层级，是其所有有记录的层面一致给出的层级。每个程度层级包含该程度的有伪影患者和全部无伪影患者。"
    ),
    "subgroups.caption": "{arm}，站点 {sites}。",
    "subgroups.column": "亚组",
    "subgroups.level": "{subgroup}：{level}",
    "subgroups.not_estimable": "无法估计",
    "subgroups.tested": (
        "同一亚组两个层级之间的差别，在该训练组内作 Holm 校正：检验 {tested} 个，{beyond} 个低于 .05。"
    ),
    "subgroups.difference": "{place}，{artifact}：{one} 减 {other} 为 {value}（{low} 至 {high}），p {p}。",
    "subgroups.home": "训练站点",
    "subgroups.unseen": "留出站点",
    "subgroup.vendor": "厂商",
    "subgroup.field_strength": "场强",
    "subgroup.tube_voltage": "管电压",
    "subgroup.body_part": "部位",
    "subgroup.sex": "性别",
    "subgroup.age": "年龄",
    "subgroup.severity": "程度",
    "level.siemens": "西门子",
    "level.ge": "GE",
    "level.philips": "飞利浦",
    "level.canon": "佳能",
    "level.united_imaging": "联影",
    "level.vendor.other": "其他",
    "level.1.5_t": "1.5 T",
    "level.3_t": "3 T",
    "level.field_strength.other": "其他",
    "level.to_90_kv": "90 kV 及以下",
    "level.91_to_110_kv": "91 至 110 kV",
    "level.111_to_130_kv": "111 至 130 kV",
    "level.over_130_kv": "130 kV 以上",
    "level.head": "头部",
    "level.neck": "颈部",
    "level.chest": "胸部",
    "level.abdomen": "腹部",
    "level.pelvis": "盆腔",
    "level.spine": "脊柱",
    "level.limb": "四肢",
    "level.body_part.other": "其他",
    "level.female": "女",
    "level.male": "男",
    "level.under_20": "20 岁以下",
    "level.20_to_39": "20 至 39 岁",
    "level.40_to_59": "40 至 59 岁",
    "level.60_to_79": "60 至 79 岁",
    "level.80_and_over": "80 岁及以上",
    "level.mild": "轻",
    "level.moderate": "中",
    "level.severe": "重",
    # contrasts
    "contrasts.section": "哪些差别超出机遇",
    "contrasts.caption": "宏平均 AUROC 的差别，在相同测试患者和相同伪影上配对。",
    "contrasts.sites": "同上，在各站点",
    "contrasts.column.comparison": "比较",
    "contrasts.column.where": "何处",
    "contrasts.column.difference": "差别",
    "contrasts.column.interval": "95 % 区间",
    "contrasts.column.picture": "图示",
    "contrasts.column.words": "文字",
    "contrasts.title": "{arm} − {other}",
    "contrasts.higher": "较高",
    "contrasts.lower": "较低",
    "contrasts.alone": "在这么多比较中不能定论",
    "contrasts.unclear": "不能定论；包含零",
    "contrasts.same": "每一对都相同",
    "contrasts.no_interval": "不能定论；没有区间",
    "contrasts.not_estimable": "不可估计",
    "contrasts.many": (
        "此处 {overall} 次检验，各站点 {sites} 次，分为两族。按其数目作 Holm 校正后有 {holding} 处不同；"
        "另有 {alone} 个区间单独看不含零。区间未校正。"
    ),
    "price.section": "隐私的代价",
    "price.caption": "{arm}：代价，逐部分。",
    "price.column.step": "部分",
    "price.total": "总计",
    "price.clipped": "冻结、裁剪、不同步数",
    "price.layers": "冻结",
    "price.steps": "裁剪、不同步数",
    "price.noised": "噪声",
    "price.not_attributed": "未归因",
    "price.no_plain": "{arm}：隐私的总代价未测量。需要训练组 {needed}。",
    "price.no_control": (
        "{arm} − {plain} 混合了冻结的层、裁剪、噪声和不同的步数，不归因于其中任何一项。要把噪声与其余分开，"
        "需要训练组 {needed}（仅模拟）。"
    ),
    "price.control": "{control} 是噪声为 0 的相同训练，没有隐私保护。",
    "price.frozen": (
        "{control} − {plain} 混合了冻结的层、裁剪和不同的步数。要把冻结的层与其余分开，"
        "需要训练组 {needed}（仅模拟）。"
    ),
    "price.is_frozen": (
        "{frozen} 与 {plain} 同样训练，但只训练隐私训练组的层，没有隐私保护。{control} 的步数不同且经过裁剪，"
        "其模型是方案对隐私训练组要求的平均。"
    ),
    "price.nothing_frozen": (
        "没有冻结的层（privacy.trainable: all）：{control} − {plain} 混合了裁剪和不同的步数。要分开它们，"
        "需要一个步数相同而不裁剪的训练组，fedqc 没有。"
    ),
    "contrasts.none": "方案没有可比较的一对训练组。",
    "where.home": "本院",
    "where.elsewhere": "他处",
    "where.unseen": "未见",
    # missing
    "missing.n0": "n = 0",
    "missing.unlearned": "从未学习",
    "missing.not_estimable": "不可估计",
    "missing.noise": "在该 n 和 ε 下不可估计",
    "missing.unscored": "未评分",
    "missing.no_held_out": "没有留出站点",
    "missing.interval": "区间不可估计",
    "missing.not_defined": "没有定义",
    "missing.trained_there": "没有定义：曾在那里训练",
    "missing.nothing_common": "没有共同的伪影",
    # not measured
    "not.section": "没有测量的",
    "not.no_hospital": "没有在医院患者上测量任何东西：每个站点都是{kinds}。",
    "not.some_hospital": "并非来自医院患者：{sites}。",
    "not.stand_in": "{sites}：“患者”不是人（{text}）。",
    "not.one_seed": (
        "一个随机种子（{seed}）：重复训练时得分变化多大，不在任何区间之内。fedqc compare 可合并多个种子。"
    ),
    "not.no_unseen": "没有留出站点，因此没有测量对未见医院的泛化。",
    "not.one_unseen": "一个留出站点：没有测量未见医院之间的差别。",
    "not.n0": "{site}：{artifacts} 的 n = 0，因此没有模型在那里测量。",
    "not.one_class": "{site}：患者全有或全没有{artifacts}，因此那里没有 AUROC。",
    "not.one_patient": "{site}：有或没有{artifacts}的患者少于两名，因此不在那里的宏平均之内。",
    "not.macro_differs": "不同站点的宏平均所含伪影不同，因此站点不可相互比较；各处的比较基于共有的伪影。",
    "not.macro_nothing_common": "不同站点的宏平均所含伪影不同，且没有共有的：站点和各处都不可相互比较。",
    "not.same_patient": "同一患者是否在两家医院出现：未检查。区间把站点视为独立，把未见站点视为未见。",
    "not.noised": (
        "{site}：{tag}，八个分箱。其区间包含噪声，并把模型和伪影视为独立。被噪声掩盖的得分不可估计，"
        "也不在任何平均之内。"
    ),
    "not.unscored": "{site}：没有送来得分，不在任何平均之内。",
    "not.data_changed": "{sites} 的数据在运行中改变过；操作者接受了。",
    "not.incomplete": "{line}。",
    "not.arm": "{arm}：没有模型，因此没有与它的比较。",
    "not.arm_absent": "没有训练组 {arm}（{what}）：没有与它的比较。",
    "not.points": "工作点和校准：该文件不含所需的公开患者得分。",
    "not.any": "不报告“任一伪影”：站点分别送来每种伪影的计数，由此数不出有任一伪影的患者。",
    "not.any.noised": "{sites} 的任一伪影：未询问。加噪声评分时它是多出的一行，会使其余各行的噪声增大。",
    "not.any.unasked": "{sites} 的任一伪影：未计数；该答复来自较早的版本。",
    "not.any.blank": "{sites} 的任一伪影：无人被计入。没有患者的每种伪影都已评估，或精确数字会透露少数患者。",
    "not.readers": "没有阅片者研究：得分以站点的标签为准；没有与人比较。",
    "not.severity": "伪影的程度和位置不评分；患者的得分是其三个层面中最高者的期望。",
    "not.audit": "保证是计算出来的，未经攻击检验：本次运行不含经验性隐私审计。",
    # provenance
    "provenance.section": "来源",
    "provenance.run": "运行",
    "provenance.plan": "方案",
    "provenance.labels": "训练所用的标签",
    "labels.injected": "标签表，以及各站点在自己层面上模拟的伪影",
    "provenance.plan_sha256": "方案，SHA-256",
    "provenance.initial_sha256": "初始权重，SHA-256",
    "provenance.seed": "随机种子",
    "provenance.rounds": "轮数，周期数",
    "provenance.threads": "线程",
    "provenance.cpu": "协调者进程的 CPU 秒",
    "provenance.wall": "最后一次会话的实际秒数",
    "provenance.versions": "版本",
    "provenance.not_stated": "方案中未说明",
    "provenance.sites": "站点，按其操作者的描述。",
    "provenance.role": "角色",
    "provenance.kind": "类型",
    "provenance.nominal": "名义患者数",
    "provenance.version": "版本",
    "provenance.stand_in": "“患者”是什么",
    "provenance.person": "一个人",
    "provenance.not_said": "未说明",
    "provenance.details": "完整方案",
    "provenance.settings": "方案的每项设置。",
    "provenance.setting": "设置",
    "provenance.value": "值",
    "provenance.file": "一个文件（见其摘要）",
    "provenance.artifacts": "伪影",
    "provenance.definition": "定义",
    "provenance.modality": "模态",
    "provenance.source": "每个数字都出自同一文件夹的 evaluation.json；fedqc report 由它生成本页。",
    "column.artifact": "伪影",
    "dagger": "† {sites} 的“患者”不是人：{text}。",
}
