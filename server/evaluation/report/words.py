"""The sentences of the run report, by key (see common/i18n.py)."""

from __future__ import annotations

from common import cohort_table
from common.arms import (
    FEDERATED_CLIPPED,
    FEDERATED_DP,
    FEDERATED_FROZEN,
    IQM_FOREST,
    IQM_LOGISTIC,
    LOCAL_CLIPPED,
    LOCAL_DP,
    LOCAL_FROZEN,
)
from common.i18n import Languages
from server.evaluation.report.words_zh import CHINESE

ENGLISH: dict[str, str] = {
    "page.title": "fedqc report: {plan}",
    "page.report": "Evaluation report",
    "page.no_question": "Plan {plan}",
    "page.run": "run",
    "page.contents": "Contents",
    "page.plan": "plan",
    "status.completed": "completed",
    "status.partial": "partial",
    "status.missing": "What is missing",
    # privacy
    "privacy.none.title": "NOT PRIVATE",
    "privacy.none": "No model of this run was trained under differential privacy. Its models may reveal "
    "who was in the training data.",
    "privacy.none.planned": "A private arm was planned and did not run.",
    "privacy.refused": "{sites} refused [{code}]: {reason}.",
    "privacy.none.no_patients": "No hospital patient took part: every training site is of kind {kinds}.",
    "privacy.mixed.title": "Private: only {private}",
    "privacy.mixed": "{others} trained without noise on the same patients. Those models are NOT PRIVATE, "
    "and so is the run as a whole.",
    "privacy.hole.title": "NO GUARANTEE at {sites}",
    "privacy.hole": "The private arm used updates of these sites without a finite epsilon.",
    "privacy.void": "{sites}: no claim, this cohort also trained without noise.",
    "privacy.all.title": "Trained under differential privacy",
    "privacy.all": "Every model that saw a site's patients carries the guarantee stated beside its scores.",
    "privacy.scores_exact": (
        "Epsilon covers the private model. The scores on this page are exact counts of test patients, "
        "outside that guarantee."
    ),
    "privacy.scores_noised": "{sites}: part of what the plan costs a patient there.",
    "privacy.scores_exact_at": "The scores at {sites} are exact counts, outside that guarantee.",
    "noised.tag": "scored with noise, ε {epsilon}",
    "privacy.tag": "ε {epsilon}, δ {delta}, per {unit}, {adjacency}",
    "privacy.tag.short": "ε {epsilon}",
    "privacy.tag.range": "{low} to {high} by site",
    "privacy.tag.none": "NO GUARANTEE",
    "privacy.not_private": "not private",
    "privacy.untouched": "saw no site's patients",
    "privacy.section": "Privacy",
    "privacy.lead": (
        "What private training ({arms}) guarantees at each site, over the whole run. The unit is one {unit}; "
        "neighbouring data sets differ by one {unit} ({adjacency})."
    ),
    "privacy.not_planned": "The plan has no private arm, so there is no epsilon to report.",
    "privacy.column.site": "Site",
    "privacy.column.epsilon": "ε",
    "privacy.column.epsilon_pld": "ε (PLD)",
    "privacy.column.delta": "δ",
    "privacy.column.noise": "Noise multiplier",
    "privacy.column.unit": "Unit, adjacency",
    "privacy.column.state": "State",
    "privacy.state.spent": "took part",
    "privacy.state.void": "no claim: this cohort also trained without noise",
    "privacy.state.silent": "no update, no claim",
    "privacy.state.held_out": "held out: never trained",
    "privacy.state.refused": "refused [{code}]: {reason}",
    "privacy.note": "ε covers all that the plan asks of one patient: private arms and noised evaluation. PLD "
    "accounts the same fixed schedule numerically. Both are rounded up.",
    "privacy.alternatives": "In this simulation the private arms are alternatives: each costs ε as if it "
    "were run alone. A hospital that ran all of them would spend more.",
    # settings of the private arms
    "tuning.section": "How the settings of the private arms were chosen",
    "tuning.lead": (
        "On {count} public rehearsals, phantoms that look other than what the starting weights were trained "
        "on, with the noise of ε {epsilon} at {sites} sites of {patients} patients each. No site was asked, "
        "and nothing was charged. The smallest gain over the rehearsals decided."
    ),
    "tuning.foreign.title": "Not the choice of this plan",
    "tuning.foreign": "The digest of tuning.json is not the one that privacy.origin of the plan names.",
    "tuning.figure": (
        "Smallest gain of macro AUROC over the rehearsals, by rate and steps per round; in the ring, the "
        "choice. Rate is learning rate times clip. Of settings that are nearly as good as the best, the one "
        "that depends least on the noise was taken. Large losses are drawn at the lower edge. Clip and "
        "averaged rounds are the same on all lines; other clips were tried at the choice."
    ),
    "tuning.alt": (
        "Line chart of the smallest gain over the rehearsals by rate, one line a number of steps per round, "
        "with the chosen setting in a ring. The tables below hold the numbers of the choice."
    ),
    "tuning.axis.rate": "rate (learning rate × clip), logarithmic",
    "tuning.axis.gain": "smallest gain of macro AUROC",
    "tuning.chosen": "chosen",
    "tuning.one_step": "1 step per round",
    "tuning.steps": "{count} steps per round",
    "tuning.gains": "Macro AUROC of the starting weights, and the gain of the chosen setting, by rehearsal.",
    "tuning.column.rehearsal": "Rehearsal",
    "tuning.column.start": "Starting weights",
    "tuning.column.gain": "Gain",
    "tuning.is_worst": "the smallest: it decided",
    "tuning.settings": "The chosen setting.",
    "tuning.clip": "Clip",
    "tuning.learning_rate": "Learning rate",
    "tuning.rate": "Rate",
    "tuning.steps_per_round": "Steps per round",
    "tuning.average_rounds": "Rounds whose models are averaged",
    "tuning.worst": "Smallest gain",
    "tuning.spread": "Standard deviation between draws of the noise",
    "tuning.digests": "Origin: these numbers come from tuning.json in the same folder.",
    "tuning.start": "Starting weights, SHA-256",
    "tuning.digest": "All that was tried, SHA-256",
    "tuning.origin": "As the plan states it",
    "tuning.no_origin": "not stated in the plan",
    # arms
    "arm.public": "starting weights, not trained further",
    "arm.local": "each site alone",
    f"arm.{LOCAL_DP}": "each site alone under differential privacy",
    "arm.federated": "trained together, no noise",
    f"arm.{FEDERATED_DP}": "trained together under differential privacy",
    f"arm.{LOCAL_CLIPPED}": f"as {LOCAL_DP}, with noise 0",
    f"arm.{FEDERATED_CLIPPED}": f"as {FEDERATED_DP}, with noise 0",
    f"arm.{LOCAL_FROZEN}": f"as local, only the layers of {LOCAL_DP}",
    f"arm.{FEDERATED_FROZEN}": f"as federated, only the layers of {FEDERATED_DP}",
    "arm.pooled": "all images in one place (simulation only)",
    f"arm.{IQM_LOGISTIC}": "each site alone: logistic regression on image-quality metrics, no network",
    f"arm.{IQM_FOREST}": "each site alone: random forest on image-quality metrics, no network",
    "arm.other": "",
    "who.public": "the starting weights",
    "who.local": "sites training alone",
    f"who.{LOCAL_DP}": "sites training alone in private",
    "who.federated": "the federated model",
    f"who.{FEDERATED_DP}": "the private federated model",
    f"who.{LOCAL_CLIPPED}": "sites training alone as in private, with noise 0",
    f"who.{FEDERATED_CLIPPED}": "the same training with noise 0",
    f"who.{LOCAL_FROZEN}": "sites training the private arm's layers alone, without privacy",
    f"who.{FEDERATED_FROZEN}": "all sites training the private arm's layers, without privacy",
    "who.pooled": "the pooled model",
    f"who.{IQM_LOGISTIC}": "logistic regression on image-quality metrics",
    f"who.{IQM_FOREST}": "random forests on image-quality metrics",
    "who.other": "{arm}",
    "arm.no_model": "no model: did not run",
    "arm.refused": "no model: refused",
    # names
    "list.separator": ", ",
    "list.and": "{first} and {last}",
    "list.or": "{first} or {last}",
    "list.more": "{count} more",
    "word.hospital": "hospital",
    "word.public": "public",
    "word.synthetic": "synthetic",
    "word.patient": "patient",
    "word.study": "study",
    "word.add/remove": "add/remove",
    # the first screen
    "ask.home": "How good is it at my hospital?",
    "ask.unseen": "How good is it at a hospital it never saw?",
    "ask.privacy": "What did privacy cost?",
    "ask.missing": "Who was missing?",
    "answer.home": (
        "At the {count} training sites {who} scores a macro AUROC of {value} on average ({interval}), from "
        "{low} at {worst} to {high} at {best}."
    ),
    "answer.home.one": (
        "At {worst}, the one training site with a score, {who} scores a macro AUROC of {value} ({interval})."
    ),
    "answer.home.none": "No model could be scored at a training site.",
    "answer.point": (
        "{arm} at the operating point, chosen on public data, over {cells} pairs of site and artifact: "
        "median sensitivity {sensitivity}, the lowest {least_sensitivity} ({worst_sensitivity}); median "
        "specificity {specificity}, the lowest {least_specificity} ({worst_specificity})."
    ),
    "answer.gap": (
        "{arm}, unseen − home: {difference} on {artifacts}, which every place can estimate; k = {count} "
        "held-out hospitals."
    ),
    "answer.gap.none": "Unseen − home is not defined: no artifact is estimable at every place.",
    "answer.next": (
        "{arm}: the next hospital's observed score, on about as many patients as these had, is to be "
        "expected from {low} to {high} (95 % prediction interval)."
    ),
    "answer.next.few": (
        "{arm}: the next hospital's observed score, on about as many patients as these had, is to be "
        "expected from {low} to {high} (95 % prediction interval); of so few hospitals it says little."
    ),
    "answer.next.none": "Fewer than {least} give no prediction interval for the next hospital.",
    "answer.cost": "{arm} ({tag}) − {other} {where}: {difference}.",
    "answer.cost.parts": (
        "Of this, layers that are frozen, clipping and another number of steps: {rest}; noise: {noise}."
    ),
    "answer.cost.parts_all": (
        "Nothing is frozen. Of this, clipping and another number of steps: {rest}; noise: {noise}."
    ),
    "answer.cost.all_parts": (
        "Of this, layers that are frozen: {layers}; clipping and another number of steps: {clip}; "
        "noise: {noise}."
    ),
    "answer.cost.whole": "What of it is noise was not measured: that needs the arm {needed}.",
    "answer.cost.none": "{arm} ({tag}): its price was not measured. That needs the arm {needed}.",
    "answer.cost.refused": "Not measured: no private arm has a model.",
    "answer.cost.no_arm": "Not measured: no arm trained in private.",
    "answer.missing.none": (
        "Nobody: all {training} training sites are in every round, and all {count} sites sent scores."
    ),
    "answer.missing.no_score": "All {count} sites sent scores, {training} of them training sites.",
    "answer.missing.rounds": "{site} is in {counted} of {rounds} rounds of {arms} ({why}).",
    "answer.missing.no_code": "no answer",
    "answer.missing.score": "Without a score: {sites}.",
    # operating points
    "operating.section": "Decisions at an operating point",
    "operating.lead": (
        "The threshold of a model is chosen on public patients, never on a site's: of the thresholds that "
        "find at least {share} % of those with the artifact, the one with the largest sensitivity plus "
        "specificity. Origin: {origin}. True and false positives are counted exactly at an edge of the "
        "site's bins."
    ),
    "operating.origin.phantoms": "{patients} public phantoms, drawn from seed {seed}",
    "operating.origin.file": "the public set of the plan, SHA-256 {sha256}…",
    "operating.none": (
        "This evaluation.json does not hold the scores of public patients: an earlier version wrote it, and "
        "no threshold was chosen."
    ),
    "operating.points": "Operating points of {arm}, and what they give on the public patients.",
    "operating.caption": "{arm}, by artifact and site.",
    "operating.others": "The other arms",
    "operating.stated": "{arm} at stated prevalences: predictive value, and alarms per 100 scans.",
    "operating.note": (
        "n: scored patients or studies (with the artifact). Precision is the positive predictive value at "
        "the site's prevalence; alarms are per 100 scans there. Intervals are Wilson's. Few public patients "
        "choose a threshold badly: public_set.patients of the plan gives more."
    ),
    "any.title": "any artifact",
    "any.note": (
        "Any artifact ({artifacts}): patients in whom every artifact that can occur in their modality was "
        "assessed, with one of them or without all. Their score is the highest of the model's scores on a "
        "scale of public quantiles (Gumbel), less the logarithm of their number; so is the threshold. It is "
        "in no mean over artifacts."
    ),
    "operating.grey": "Grey: the counts allow no number, or lie in few coarse bins.",
    "operating.no_point": "too few public patients",
    "operating.noise": "not estimable at this n and ε",
    "operating.one_class": "one class only",
    "operating.few": "fewer than {least} with or without",
    "operating.coarse": "coarse bins: middles",
    "operating.column.n": "n (with)",
    "operating.column.prevalence": "Prevalence",
    "operating.stated.details": "At stated prevalences",
    "operating.column.auroc": "AUROC",
    "operating.column.ap": "Average precision",
    "operating.column.sensitivity": "Sensitivity",
    "operating.column.specificity": "Specificity",
    "operating.column.precision": "Precision (PPV)",
    "operating.column.f1": "F1",
    "operating.column.accuracy": "Accuracy",
    "operating.column.balanced": "Balanced accuracy",
    "operating.column.alarms": "Alarms per 100",
    "operating.column.threshold": "Threshold (logit)",
    "operating.column.public": "Public n (with / without)",
    "operating.column.bins": "Bins",
    "operating.column.ppv_at": "PPV at {prevalence} %",
    "operating.column.alarms_at": "Alarms per 100 at {prevalence} %",
    # calibration
    "calibration.section": "Calibration and decision curves",
    "calibration.lead": (
        "A probability is the score through two parameters that are fitted on the public patients (Platt), "
        "as fedqc predict prints it. At another prevalence it is off by as much: see the intercept."
    ),
    "calibration.caption": "{arm}: how far its probabilities hold.",
    "calibration.column.slope": "Slope (ideal 1)",
    "calibration.column.intercept": "Intercept (ideal 0)",
    "calibration.column.ece": "ECE",
    "calibration.column.brier": "Brier",
    "calibration.column.brier_prevalence": "Brier of the prevalence alone",
    "calibration.note": (
        "Slope of the logistic regression of the label on the logit, 95 % interval; intercept with that "
        "slope held at 1. ECE is over up to {groups} groups of about equal size, and above 0 by chance "
        "alone: read it with n. Where bins are coarse, each patient stands in the middle of a bin."
    ),
    "calibration.figure": "Calibration: share with the artifact (up) over mean probability (right).",
    "calibration.alt": "Calibration plot, share with the artifact over mean probability, {where}.",
    "calibration.x": "mean probability",
    "calibration.y": "share with the artifact",
    "calibration.ideal": "ideal",
    "decision.figure": (
        "Decision curve: net benefit a patient (up) of acting from a probability on (right). Dashed: act on "
        "everybody. Dotted: on nobody. A model below either is of no use there."
    ),
    "decision.alt": "Decision curve, net benefit over threshold probability, {where}.",
    "decision.x": "threshold probability",
    "decision.y": "net benefit",
    "decision.all": "everybody",
    "decision.none": "nobody",
    "width.figure": (
        "Width of the 95 % interval of each AUROC of {arm} over the number of patients of the rarer class. "
        "Dashed: to be expected of an AUROC of .85. Hollow: scored with noise."
    ),
    "width.alt": "Width of the 95 % interval of each AUROC over the number of patients of the rarer class.",
    "width.x": "patients of the rarer class, logarithmic",
    "width.y": "width of the 95 % interval of AUROC",
    "width.guide": "AUROC .85",
    # participation
    "participation.section": "Who took part",
    "participation.caption": "Rounds whose sum holds an update of the site, of the rounds of the arm.",
    "participation.rounds": "{counted} of {rounds}",
    "participation.none": "The records of the rounds are not in this folder.",
    # cohorts
    "cohorts.section": "Who is in the cohorts",
    "cohorts.absent": "Not here: {sites}. Nothing that describes the patients of a site leaves it; there, "
    "fedqc data check shows its Table 1 and flow.",
    # headline
    "headline.section": "Four answers",
    "headline.site": "{site} ({kind})",
    "headline.sentence": "At {sites}, which never trained, {who} scores a macro AUROC of {value} "
    "({interval}){verdicts}.",
    "headline.interval": "95 % interval {low} to {high}",
    "headline.no_interval": "interval not estimable",
    "headline.chance": "chance, 0.5, lies inside the interval",
    "headline.nothing": "This run has no result for an unseen hospital: {reason}.",
    "headline.nothing.none": "no site was held out",
    "headline.nothing.unscored": "{sites} sent no score",
    "headline.nothing.no_score": "no model could be scored at {sites}",
    "headline.better": "better than {others}",
    "headline.worse": "worse than {others}",
    "headline.unclear": "not distinguishable from {others}",
    "headline.evaluates": "An evaluation by itself: the models are those of run {run}, trained at {trained}. "
    "Nothing was trained here.",
    "headline.one_site": (
        "One site was held out. The interval covers that site's test patients; one hospital says nothing "
        "about the next one. Holding out each in turn does: fedqc simulate, or fedqc run start, with "
        "--leave-one-site-out."
    ),
    "headline.few_sites": (
        "{count} sites were held out. The interval covers their test patients, not how much unseen "
        "hospitals differ from each other."
    ),
    "headline.below": (
        "{arm} against {other}, site by site: below it at {below} of {total} training sites ({sites}); after "
        "Holm's correction lower at {certain}."
    ),
    "headline.below.nowhere": (
        "{arm} against {other}, site by site: below it at none of {total} training sites; after Holm's "
        "correction higher at {above}."
    ),
    "headline.untrained": "{other} (which did not train there)",
    "headline.swapped": (
        "At {site}, models rank patients with {artifact} below those without: AUROC {models}. "
        "Significantly below 0.5, one-sided, after Holm's correction for {looks} looks. Exchanged labels "
        "look so."
    ),
    "headline.unlearned": (
        "{model} never learned {artifacts}: it scores every patient alike, which counts as 0.5 in its means."
    ),
    "headline.cells": (
        "The scores average {estimable} of {total} cells, of a site and an artifact, that have two "
        "patients with and two without. In none of them: {missing}."
    ),
    "swapped": "labels swapped?",
    "crowded": "coarse bins",
    "crowded.why": (
        "Grey: the site sent its scores in coarse bins, and one of them holds more than a fifth of a class: "
        "{cells}. Such an AUROC, and a mean that contains it, says little."
    ),
    "unit.patient": "Unit: one score a patient at {sites}.",
    "unit.study": "Unit: one score a study at {sites}; a person with several studies counts several times.",
    "unit.other": "Unit: one score a {unit} at {sites}.",
    "worst.if_equal": "{count} equal sites: {value}",
    "common.caption": (
        "The same on {artifacts}, which every site can estimate. In the table above places average different "
        "artifacts: compare arms there, and places here."
    ),
    "common.none": (
        "Places average different artifacts, and no artifact is estimable at every site: compare arms in "
        "this table, not places."
    ),
    "gain.none": "Private training: no gain over the starting weights is shown {where}: {difference}.",
    "gain.no_control": (
        "Private training gains {difference} over the starting weights {where}. Whether federation is the"
        " cause was not measured: that needs the arm {control}, each hospital alone in private."
    ),
    "gain.either": (
        "Private training gains {difference} over the starting weights {where}. That federation is the "
        "cause is not shown: over {control}, each hospital alone in private, it gains {other}."
    ),
    "gain.alone_better": (
        "Private training gains {difference} over the starting weights {where}, and less than each "
        "hospital alone in private: over {control} {other}."
    ),
    "gain.federation": (
        "Private training gains {difference} over the starting weights {where}, and over {control}, each "
        "hospital alone in private, {other}."
    ),
    "baseline.better": "{arm} beats a cheap baseline, on the same patients, {where}: {differences}.",
    "baseline.not_shown": (
        "{arm} is not shown to beat a cheap baseline, on the same patients, {where}: {differences}."
    ),
    "baseline.worse": "{arm} is worse than a cheap baseline, on the same patients, {where}: {differences}.",
    "baseline.home": "at the training sites",
    "baseline.difference": "over {baseline} {difference}",
    "gain.unseen": "at {sites}, which no model saw",
    "gain.home": "at the training sites, whose patients the starting weights did not see",
    "headline.at_chance": "At {site}, {arm} is not distinguishable from chance on {artifacts}: the "
    "interval includes 0.5.",
    "headline.none_of_them": "none of them",
    "headline.caption": "Macro AUROC by arm, with 95 % intervals. 0.5 is chance, 1 is perfect.",
    "headline.note": (
        "Home: mean over training sites of the score there. Elsewhere: a model at training sites that did"
        " not train it; a shared model trained at all of them, and has such a score only where it is "
        "trained again without each. Unseen: mean over the held-out sites, which no model saw. Worst: the"
        " lowest training site on the artifacts that all have, beside the lowest of as many equal sites "
        "on average, which is below their mean. Intervals are symmetric on the logit scale."
    ),
    "column.arm": "Arm",
    "column.model": "Model",
    "column.privacy": "Privacy",
    "column.home": "Home",
    "column.elsewhere": "Elsewhere",
    "column.unseen": "Unseen",
    "column.worst": "Worst",
    "column.site": "Site",
    "at": "at {site}",
    # sites
    "sites.section": "Hospital by hospital",
    "sites.figure": "Macro AUROC with 95 % intervals",
    "sites.figure.alt": (
        "Forest plot. For each site one row an arm: a marker at the macro AUROC and a line over its 95 % "
        "interval. The table below holds the same numbers."
    ),
    "sites.table": "Macro AUROC by arm and site, with 95 % intervals.",
    "sites.training": "training site",
    "sites.macro_without": "without {artifacts}",
    "sites.held_out": "held out, never trained",
    "sites.patients": "Test patients with and without each artifact (n with / n without).",
    "sites.estimate": "≈ {pos} / {neg} (noise ± {spread})",
    "sites.noised": (
        "Numbers of patients with ≈ are estimates: noise was added, and no exact number left the site."
    ),
    "sites.mean_of": "mean of {count} local models",
    "sites.unseen_mean": "all held-out sites (mean)",
    "sites.macro": (
        "A site's macro AUROC is the mean over the artifacts that every model can estimate there. Sites "
        "with different artifacts are not comparable with each other. public trained at no site, every "
        "other arm at the training sites: there, a difference from public is what training at the same "
        "hospital gives."
    ),
    # matrix
    "matrix.section": "Every model at every site",
    "matrix.caption": (
        "Macro AUROC of each model (row) at each site (column), with 95 % intervals. Outlined: the site's"
        " patients trained the model, which is an advantage there over models that they did not train."
    ),
    "matrix.scale": "Shade: 0.5 (chance) or below to 1",
    "matrix.details": "The same matrix for each artifact",
    "matrix.artifact": "AUROC for {artifact}",
    # roc
    "roc.section": "ROC curves by artifact",
    "roc.training": "Training sites together",
    "roc.unseen": "Held out: {sites}",
    "roc.lead": "True positive rate (up) against false positive rate (right), drawn from the counts that "
    "sites sent.",
    "roc.merged": (
        "For the training sites the counts are added up, which puts scores of different sites, and for "
        "local of different models, on one scale; such a curve may lie below or above those of its sites."
        " The table gives the AUROC at each held-out site, where nothing is added up."
    ),
    "roc.merged.no_unseen": (
        "The counts of the training sites are added up, which puts scores of different sites, and for "
        "local of different models, on one scale; such a curve may lie below or above those of its sites."
        " AUROCs are in the matrix above, site by site."
    ),
    "roc.above": (
        "{artifact}, {arm}: the curve of the merged counts (AUROC {merged}) lies above every site's "
        "({low} to {high}). It is an effect of merging, and the score of no hospital."
    ),
    "roc.local": "local is one line a model at held-out sites.",
    "roc.noised": "No curve is drawn for sites that were scored with noise: {sites}.",
    "roc.alt": "ROC curves, one panel an artifact and one line an arm, {where}.",
    "roc.table": "AUROC by artifact at the held-out site {site}, with 95 % intervals (n with / n without).",
    # curves
    "curves.section": "Over the rounds, on the coordinator's public set",
    "curves.lead": (
        "Measured after every round on the coordinator's own public images. No hospital's patient is in this "
        "set, so these curves show the progress of training, not performance at a hospital."
    ),
    "curves.loss": "Loss",
    "curves.auroc": "Macro AUROC",
    "curves.round": "round",
    "curves.alt": (
        "Two line charts over rounds: loss and macro AUROC on the public set, one line a model. The table "
        "below holds the numbers."
    ),
    "curves.details": "The numbers",
    "curves.table": "Loss and macro AUROC on the public set after each round; round 0 is the start.",
    "curves.none": "No arm was trained, so there is no curve.",
    "curves.private": "The curve of {arm} carries {tag}.",
    # subgroups
    "subgroups.section": "By subgroup of patients",
    "subgroups.lead": (
        "AUROC with its 95 % interval, patients with / without the artifact below it; counted in 20 bins "
        "at public and synthetic sites, nothing at hospitals. A patient is in a level that all of the "
        "patient’s slices that say anything agree on. A severity has its own patients with the artifact, "
        "and all without."
    ),
    "subgroups.caption": "{arm} at {sites}.",
    "subgroups.column": "Subgroup",
    "subgroups.level": "{subgroup}: {level}",
    "subgroups.not_estimable": "not estimable",
    "subgroups.tested": (
        "Differences between two levels of a subgroup, Holm-corrected over this arm: {tested} tested, "
        "{beyond} below .05."
    ),
    "subgroups.difference": "{place}, {artifact}: {one} less {other} is {value} ({low} to {high}), p {p}.",
    "subgroups.home": "training sites",
    "subgroups.unseen": "held-out sites",
    "subgroup.vendor": "vendor",
    "subgroup.field_strength": "field strength",
    "subgroup.tube_voltage": "tube voltage",
    "subgroup.body_part": "body part",
    "subgroup.sex": "sex",
    "subgroup.age": "age",
    "subgroup.severity": "severity",
    "level.siemens": "Siemens",
    "level.ge": "GE",
    "level.philips": "Philips",
    "level.canon": "Canon",
    "level.united_imaging": "United Imaging",
    "level.vendor.other": "other",
    "level.1.5_t": "1.5 T",
    "level.3_t": "3 T",
    "level.field_strength.other": "other",
    "level.to_90_kv": "up to 90 kV",
    "level.91_to_110_kv": "91 to 110 kV",
    "level.111_to_130_kv": "111 to 130 kV",
    "level.over_130_kv": "over 130 kV",
    "level.head": "head",
    "level.neck": "neck",
    "level.chest": "chest",
    "level.abdomen": "abdomen",
    "level.pelvis": "pelvis",
    "level.spine": "spine",
    "level.limb": "limb",
    "level.body_part.other": "other",
    "level.female": "female",
    "level.male": "male",
    "level.under_20": "under 20",
    "level.20_to_39": "20 to 39",
    "level.40_to_59": "40 to 59",
    "level.60_to_79": "60 to 79",
    "level.80_and_over": "80 and over",
    "level.mild": "mild",
    "level.moderate": "moderate",
    "level.severe": "severe",
    # contrasts
    "contrasts.section": "Which differences exceed chance",
    "contrasts.caption": "Differences of macro AUROC, paired over the same test patients and over the same "
    "artifacts.",
    "contrasts.sites": "The same, at each site",
    "contrasts.column.comparison": "Comparison",
    "contrasts.column.where": "Where",
    "contrasts.column.difference": "Difference",
    "contrasts.column.interval": "95 % interval",
    "contrasts.column.picture": "Picture",
    "contrasts.column.words": "In words",
    "contrasts.title": "{arm} − {other}",
    "contrasts.higher": "higher",
    "contrasts.lower": "lower",
    "contrasts.alone": "inconclusive among so many",
    "contrasts.unclear": "inconclusive; includes zero",
    "contrasts.same": "the same in every pair",
    "contrasts.no_interval": "inconclusive; no interval",
    "contrasts.not_estimable": "not estimable",
    "contrasts.many": (
        "{overall} looks here and {sites} at single sites, two families. After Holm's correction for "
        "their number {holding} differ; {alone} more intervals exclude zero alone. The intervals are not "
        "corrected."
    ),
    "price.section": "What privacy cost",
    "price.caption": "{arm}: its price, part by part.",
    "price.column.step": "Part",
    "price.total": "in all",
    "price.clipped": "frozen, clipped, other steps",
    "price.layers": "frozen",
    "price.steps": "clipped, other steps",
    "price.noised": "noised",
    "price.not_attributed": "not attributed",
    "price.no_plain": "{arm}: what privacy cost in all was not measured. That needs the arm {needed}.",
    "price.no_control": (
        "{arm} − {plain} mixes layers that are frozen, clipping, noise and another number of steps, and "
        "is attributed to none of them. To part the noise from the rest needs the arm {needed} "
        "(simulation only)."
    ),
    "price.control": "{control} is the same training with noise 0, and is not private.",
    "price.frozen": (
        "{control} − {plain} mixes frozen layers, clipping and another number of steps. To part the frozen "
        "layers from the rest needs the arm {needed} (simulation only)."
    ),
    "price.is_frozen": (
        "{frozen} is trained as {plain}, but only the layers of the private arm, and is not private. "
        "{control} takes other steps, clipped, and its model is the mean that the plan asks of private arms."
    ),
    "price.nothing_frozen": (
        "Nothing is frozen (privacy.trainable: all): {control} − {plain} mixes clipping and another number "
        "of steps. To part them needs an arm that takes the same steps without clipping, which fedqc does "
        "not have."
    ),
    "contrasts.none": "The plan has no pair of arms to compare.",
    "where.home": "home",
    "where.elsewhere": "elsewhere",
    "where.unseen": "unseen",
    # missing
    "missing.n0": "n = 0",
    "missing.unlearned": "never learned",
    "missing.not_estimable": "not estimable",
    "missing.noise": "not estimable at this n and ε",
    "missing.unscored": "not scored",
    "missing.no_held_out": "no site held out",
    "missing.interval": "interval not estimable",
    "missing.not_defined": "not defined",
    "missing.trained_there": "not defined: it trained there",
    "missing.nothing_common": "no artifact in common",
    # not measured
    "not.section": "What was not measured",
    "not.no_hospital": "Nothing was measured on a hospital's patients: every site is {kinds}.",
    "not.some_hospital": "Not from a hospital's patients: {sites}.",
    "not.stand_in": "{sites}: “patients” are not persons ({text}).",
    "not.one_seed": (
        "One seed ({seed}): how much the scores vary when training is repeated is not in any interval. "
        "fedqc compare pools seeds."
    ),
    "not.no_unseen": "No site was held out, so generalization to an unseen hospital was not measured.",
    "not.one_unseen": "One held-out site: the spread between unseen hospitals was not measured.",
    "not.n0": "{site}: n = 0 for {artifacts}, so no model was measured on them there.",
    "not.one_class": "{site}: patients only with, or only without, {artifacts}, so no AUROC exists there.",
    "not.one_patient": (
        "{site}: fewer than two patients with or without {artifacts}, so they are in no macro score there."
    ),
    "not.macro_differs": "Macro scores average different artifacts at different sites, so sites are not "
    "comparable with each other; places are on the artifacts that all have.",
    "not.macro_nothing_common": (
        "Macro scores average different artifacts at different sites, and none is common to all: neither "
        "sites nor places are comparable with each other."
    ),
    "not.same_patient": (
        "Whether the same patient was seen at two hospitals: not checked. Intervals take sites as "
        "independent, and an unseen site as unseen."
    ),
    "not.noised": (
        "{site}: {tag}, in eight bins. Its intervals include the noise, and treat models and artifacts as "
        "independent. A score that the noise hides is not estimable, and in none of the means."
    ),
    "not.unscored": "{site}: sent no score, and is in none of the means.",
    "not.data_changed": "The data of {sites} changed during the run; the operator accepted that.",
    "not.incomplete": "{line}.",
    "not.arm": "{arm}: no model, so no comparison with it.",
    "not.arm_absent": "No {arm} arm ({what}): no comparison with it.",
    "not.points": (
        "Operating points and calibration: this file does not hold the scores of public patients that they "
        "follow from."
    ),
    "not.any": (
        "“Any artifact” is not reported: sites sent the counts of each artifact by itself, from which the "
        "patients with any of them cannot be counted."
    ),
    "not.any.noised": (
        "Any artifact at {sites}: not asked. Scored with noise, it would be one more row, and the noise of "
        "all others would rise."
    ),
    "not.any.unasked": "Any artifact at {sites}: not counted; the answer is of an earlier version.",
    "not.any.blank": (
        "Any artifact at {sites}: nobody is counted. In nobody was every artifact assessed, or exact numbers "
        "would tell of few patients."
    ),
    "not.readers": "No reader study: scores are against the sites' labels; no human reader was compared.",
    "not.severity": "Severity and place of an artifact are not scored; a patient's score is the expected "
    "highest of three of the slices.",
    "not.audit": "The guarantee is computed, not attacked: no empirical privacy audit is part of this run.",
    # provenance
    "provenance.section": "Provenance",
    "provenance.run": "Run",
    "provenance.plan": "Plan",
    "provenance.labels": "Labels that training used",
    "labels.injected": "label sheets, and artifacts that each site simulated on its own slices",
    "provenance.plan_sha256": "Plan, SHA-256",
    "provenance.initial_sha256": "Starting weights, SHA-256",
    "provenance.seed": "Seed",
    "provenance.rounds": "Rounds, epochs",
    "provenance.threads": "Threads",
    "provenance.cpu": "CPU seconds of the coordinator's process",
    "provenance.wall": "Wall seconds of the last session",
    "provenance.versions": "Versions",
    "provenance.not_stated": "not stated in the plan",
    "provenance.sites": "Sites, as their operators describe them.",
    "provenance.role": "Role",
    "provenance.kind": "Kind",
    "provenance.nominal": "Nominal patients",
    "provenance.version": "Version",
    "provenance.stand_in": "What a “patient” is",
    "provenance.person": "a person",
    "provenance.not_said": "not stated",
    "provenance.details": "The plan in full",
    "provenance.settings": "Every setting of the plan.",
    "provenance.setting": "Setting",
    "provenance.value": "Value",
    "provenance.file": "a file (see its hash)",
    "provenance.artifacts": "The artifacts",
    "provenance.definition": "Definition",
    "provenance.modality": "Modality",
    "provenance.source": "Every number comes from evaluation.json in the same folder; fedqc report makes "
    "this page from it.",
    "column.artifact": "Artifact",
    "dagger": "† “Patients” at {sites} are not persons: {text}.",
}


LANGUAGES: Languages = {"en": cohort_table.ENGLISH | ENGLISH, "zh": cohort_table.CHINESE | CHINESE}
