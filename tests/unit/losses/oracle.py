"""Every loss, recomputed from the papers' formulas: plain loops over responses, in 120-digit arithmetic.

Nothing here calls the package. A group is a dict of lists over its responses (padding left out): logp, ref,
S, label, length, tokens, ref_tokens. `evaluate(name, groups, p)` gives one number per group, or None for a
group that carries no contrast; `p` is any object with the hyper-parameters as attributes.
"""

from fractions import Fraction

from mpmath import exp, log, mp, mpf, sqrt

mp.dps = 120


def sigma(x):
    return 1 / (1 + exp(-x))


def log_sigma(x):
    return -log(1 + exp(-x))


def mean(values):
    return sum(values) / mpf(len(values))


def log_ratios(g):
    return [mpf(a) - mpf(b) for a, b in zip(g["logp"], g["ref"], strict=True)]


def token_means(g):
    return [mpf(a) / n for a, n in zip(g["logp"], g["length"], strict=True)]


def tangent_exp(x):
    """e^x with a straight tail beyond 20, the documented deviation for unbounded ratios."""
    return exp(x) if x <= 20 else exp(mpf(20)) * (1 + x - 20)


# ------------------------------------------------------------------------------------------ sets, pairs,
# rankings


def preference(g):
    """(index, score) of the responses that can be ordered."""
    if g["S"] is not None:
        return [(i, Fraction(s)) for i, s in enumerate(g["S"])]
    return [(i, Fraction(label)) for i, label in enumerate(g["label"]) if label >= 0]


def partition(g, p):
    """(Y+, Y−) as lists of indices, or None."""
    if p.partition == "labels":
        plus = [i for i, label in enumerate(g["label"]) if label == 1]
        minus = [i for i, label in enumerate(g["label"]) if label == 0]
        return (plus, minus) if plus and minus else None
    scores = [Fraction(s) for s in g["S"]]
    n = len(scores)
    if len(set(scores)) < 2:
        return None
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    if p.partition == "one_vs_rest":
        return order[:1], order[1:]
    if p.partition == "top_bottom":
        return (order[: p.num_top], order[n - p.num_bottom :]) if n >= p.num_top + p.num_bottom else None
    ascending = sorted(scores)
    if p.partition == "mean":
        kept = ascending
    elif p.partition == "median":
        kept = ascending[(n - 1) // 2 : n // 2 + 1]
    else:
        cut = n // 10
        kept = ascending[cut : n - cut]
    threshold = sum(kept) / len(kept)
    plus = [i for i in range(n) if scores[i] > threshold]
    minus = [i for i in range(n) if scores[i] <= threshold]
    return (plus, minus) if plus and minus else None


def best_index(g):
    return sorted(preference(g), key=lambda item: (-item[1], item[0]))[0][0]


def worse_than_best(g):
    scores = dict(preference(g))
    if not scores:
        return []
    top = scores[best_index(g)]
    return [i for i, s in scores.items() if s < top]


def pairs(g, p):
    scores = dict(preference(g))
    better = [(w, m) for w in scores for m in scores if scores[w] > scores[m]]
    if p.pairing == "all_pairs":
        return better
    if p.pairing == "cross_pairs":
        sets = partition(g, p)
        if sets is None:
            return []
        crossed = [(w, m) for w in sets[0] for m in sets[1]]
        return crossed if p.partition == "labels" else [pair for pair in crossed if pair in better]
    against = [(best_index(g), m) for m in worse_than_best(g)]
    if p.pairing == "best_vs_each" or not against:
        return against
    worst = sorted(scores.items(), key=lambda item: (item[1], item[0]))[0][0]
    return [(best_index(g), worst)]


def ranking(g):
    """Indices from best to worst, or None if all are equal."""
    scores = preference(g)
    if len({s for _, s in scores}) < 2:
        return None
    return [i for i, _ in sorted(scores, key=lambda item: (-item[1], item[0]))]


def over_pairs(g, p, loss):
    chosen = pairs(g, p)
    if not chosen:
        return None
    losses = [loss(w, m) for w, m in chosen]
    return sum(losses) if p.reduction == "sum" else mean(losses)


def likelihood(g, i, normalization):
    return -mpf(g["logp"][i]) / (g["length"][i] if normalization == "token" else 1)


# -------------------------------------------------------------------------------------------------- set-level


def sets_ratio(sets, logits):
    plus, minus = sets
    if not plus or not minus:
        return None
    top = sum(exp(logits[i]) for i in plus)
    return -log(top / (top + sum(exp(logits[i]) for i in minus)))


def mpo(g, p, _):
    sets = partition(g, p)
    return None if sets is None else sets_ratio(sets, [p.beta * s for s in log_ratios(g)])


def wmpo(g, p, _):
    sets = partition(g, p)
    if sets is None:
        return None
    centre = mean([mpf(s) for s in g["S"]])
    shift = [mpf(s) - centre for s in g["S"]]
    if p.deviation == "absolute":
        shift = [abs(d) for d in shift]
    return sets_ratio(sets, [p.beta * s + p.alpha * d for s, d in zip(log_ratios(g), shift, strict=True)])


def swepo(g, p, _):
    sets = partition(g, p)
    if sets is None:
        return None
    ratios = log_ratios(g)
    centre = mean([mpf(s) for s in g["S"]])
    size = [abs(mpf(s) - centre) for s in g["S"]]
    if p.weighting == "listing":
        scores = [(s + p.beta * (d / p.alpha) ** p.p) * p.beta for s, d in zip(ratios, size, strict=True)]
        return sets_ratio(sets, scores)
    weight = [exp(p.alpha * d**p.p) if p.weighting == "exp" else d**p.p for d in size]
    top = sum(weight[i] * exp(p.beta * ratios[i]) for i in sets[0])
    low = sum(weight[i] * exp(p.beta * ratios[i]) for i in sets[1])
    return None if top == 0 or low == 0 else -log(top / (top + low))


def mpo_reference_free(g, p, _):
    sets = partition(g, p)
    if sets is None:
        return None
    logits = [p.beta * m - (p.gamma if i in sets[0] else 0) for i, m in enumerate(token_means(g))]
    return sets_ratio(sets, logits)


# ------------------------------------------------------------------------------------------------------
# reward


def target_distribution(g, alpha):
    weights = [exp((mpf(s) - mpf(max(g["S"]))) / mpf(alpha)) for s in g["S"]]
    return [w / sum(weights) for w in weights]


def infonca(g, p, _):
    if len(g["logp"]) < 2:
        return None
    powers = [exp(p.beta * s) for s in log_ratios(g)]
    return -sum(t * log(q / sum(powers)) for t, q in zip(target_distribution(g, p.alpha), powers, strict=True))


def nca(g, p, _):
    if len(g["logp"]) < 2:
        return None
    rewards = [p.beta * s for s in log_ratios(g)]
    pull = sum(t * log_sigma(r) for t, r in zip(target_distribution(g, p.alpha), rewards, strict=True))
    return -pull - mean([log_sigma(-r) for r in rewards])


def nca_reference_free(g, p, _):
    if len(g["logp"]) < 2:
        return None
    rewards = [p.beta * mpf(a) for a in g["logp"]]
    pull = sum(t * log_sigma(r) for t, r in zip(target_distribution(g, p.alpha), rewards, strict=True))
    supervised = p.sft_weight * likelihood(g, best_index(g), p.sft_normalization) if p.sft_weight else 0
    return -pull - mean([log_sigma(-r) for r in rewards]) + supervised


def nca_pair(g, p, _):
    r = [p.beta * s for s in log_ratios(g)]
    return over_pairs(g, p, lambda w, m: -log_sigma(r[w]) - log_sigma(-r[w]) / 2 - log_sigma(-r[m]) / 2)


# ----------------------------------------------------------------------------------------------------
# pairwise


def smoothed(margin, epsilon):
    return -(1 - mpf(epsilon)) * log_sigma(margin) - mpf(epsilon) * log_sigma(-margin)


def dpo(g, p, _):
    s = log_ratios(g)

    def loss(w, m):
        supervised = likelihood(g, w, p.sft_normalization) if p.sft_weight else 0
        return smoothed(p.beta * (s[w] - s[m]), p.label_smoothing) + p.sft_weight * supervised

    return over_pairs(g, p, loss)


rpo = dpo


def dpo_positive(g, p, _):
    s = log_ratios(g)
    return over_pairs(g, p, lambda w, m: -log_sigma(p.beta * (s[w] - s[m] - p.penalty * max(mpf(0), -s[w]))))


def ipo(g, p, _):
    s = log_ratios(g)
    if p.reading == "length_normalized":
        s = [a / n for a, n in zip(s, g["length"], strict=True)]
    return over_pairs(g, p, lambda w, m: (s[w] - s[m] - 1 / (2 * mpf(p.beta))) ** 2)


def exo(g, p, _):
    s = log_ratios(g)
    epsilon = mpf(p.label_smoothing)

    def loss(w, m):
        q = sigma(p.beta * (s[w] - s[m]))
        other = sigma(p.beta * (s[m] - s[w]))
        return q * log(q / (1 - epsilon)) + other * log(other / epsilon)

    return over_pairs(g, p, loss)


def rdpo(g, p, _):
    s, n = log_ratios(g), g["length"]
    return over_pairs(g, p, lambda w, m: smoothed(p.beta * (s[w] - s[m]) + mpf(p.alpha) * (n[w] - n[m]), p.label_smoothing))


def apo_zero(g, p, _):
    s = log_ratios(g)
    return over_pairs(g, p, lambda w, m: 1 - sigma(p.beta * s[w]) + sigma(p.beta * s[m]))


def sppo(g, p, _):
    s, target = log_ratios(g), 1 / (2 * mpf(p.beta))
    return over_pairs(g, p, lambda w, m: (s[w] - target) ** 2 + (s[m] + target) ** 2)


def simpo(g, p, _):
    r = token_means(g)

    def loss(w, m):
        supervised = likelihood(g, w, p.sft_normalization) if p.sft_weight else 0
        margin = p.beta * r[w] - p.beta * r[m] - p.gamma
        return smoothed(margin, p.label_smoothing) + p.sft_weight * supervised

    return over_pairs(g, p, loss)


def cpo(g, p, _):
    r = [mpf(a) for a in g["logp"]]

    def loss(w, m):
        supervised = likelihood(g, w, p.sft_normalization)
        return smoothed(p.beta * (r[w] - r[m]), p.label_smoothing) + p.sft_weight * supervised

    return over_pairs(g, p, loss)


def orpo(g, p, _):
    r = token_means(g)
    odds = [exp(a) / (1 - exp(a)) for a in r]
    return over_pairs(g, p, lambda w, m: -r[w] - p.beta * log_sigma(log(odds[w] / odds[m])))


def slic(g, p, _):
    r = log_ratios(g) if p.normalized else [mpf(a) for a in g["logp"]]

    def loss(w, m):
        supervised = likelihood(g, w, p.sft_normalization) if p.sft_weight else 0
        return max(mpf(0), p.margin - p.beta * (r[w] - r[m])) + p.sft_weight * supervised

    return over_pairs(g, p, loss)


# ---------------------------------------------------------------------------------- unpaired, with batch
# baselines


def kto(g, p, groups):
    everything = [log_ratios(h)[i] for h in groups if partition(h, p) for part in partition(h, p) for i in part]
    baseline = max(mpf(0), mean(everything))
    sets = partition(g, p)
    if sets is None:
        return None
    s = log_ratios(g)
    good = mean([1 - sigma(p.beta * (s[i] - baseline)) for i in sets[0]])
    bad = mean([1 - sigma(p.beta * (baseline - s[i])) for i in sets[1]])
    return p.desirable_weight * good + p.undesirable_weight * bad


def bco(g, p, groups):
    shift = mpf(0)
    if p.shift == "batch":
        good = [p.beta * log_ratios(h)[i] for h in groups if partition(h, p) for i in partition(h, p)[0]]
        bad = [p.beta * log_ratios(h)[i] for h in groups if partition(h, p) for i in partition(h, p)[1]]
        shift = (mean(good) + mean(bad)) / 2
    sets = partition(g, p)
    if sets is None:
        return None
    r = [p.beta * s - shift for s in log_ratios(g)]
    return -mean([log_sigma(r[i]) for i in sets[0]]) - mean([log_sigma(-r[i]) for i in sets[1]])


# ----------------------------------------------------------------------------------------------------
# listwise


def plackett_luce(g, p, _):
    order = ranking(g)
    if order is None:
        return None
    z = [p.beta * s for s in log_ratios(g)]
    return -sum(z[i] - log(sum(exp(z[j]) for j in order[k:])) for k, i in enumerate(order))


def sdpo(g, p, _):
    s = log_ratios(g)
    if p.form == "ranked":
        scores = dict(preference(g))
        worse = {w: [m for m in scores if scores[m] < scores[w]] for w in scores}
        terms = [-log_sigma(-log(sum(exp(p.beta * (s[m] - s[w])) for m in rest))) for w, rest in worse.items() if rest]
        return sum(terms) if terms else None
    rest = worse_than_best(g)
    if not rest:
        return None
    w = best_index(g)
    return -log_sigma(-log(sum(exp(p.beta * (s[m] - s[w])) for m in rest)))


def mpo_bins(g, p, _):
    order = ranking(g)
    if order is None:
        return None
    z, n = [p.beta * s for s in log_ratios(g)], len(order)
    bins = [[order[k] for k in range(n) if k * p.num_bins // n == b] for b in range(p.num_bins)]
    if n < p.num_bins:
        bins = [[i] for i in order]
    return sum(
        -log(sum(exp(z[i]) for i in own) / sum(exp(z[i]) for later in bins[b:] for i in later)) for b, own in enumerate(bins[:-1])
    )


def mcpo(g, p, _):
    """The deterministic choices: max, min, or any sampling that takes all candidates."""
    rest = worse_than_best(g)
    if not rest:
        return None
    s, first = log_ratios(g), best_index(g)
    if len(rest) > p.num_negatives:
        sign = {"max": -1, "min": 1}[p.sampling]
        rest = sorted(rest, key=lambda i: sign * s[i])[: p.num_negatives]
    return -p.beta * s[first] + log(sum(exp(p.beta * s[i]) for i in [first, *rest]))


rnce = mcpo


# --------------------------------------------------------------------------------------------------------
# soft


def soft_weight(logps, gamma, everything):
    def mass(values):
        return sum(exp(mpf(v)) for v in values) ** mpf(gamma)

    return 2 * sigma(mass(logps) - mean([mass(values) for values in everything]))


def soft_choice(logps, alpha):
    """The first of `logps` chosen among all of them."""
    if alpha == 0:
        return -(mpf(logps[0]) - mean([mpf(v) for v in logps]))
    return -log(exp(alpha * mpf(logps[0])) / sum(exp(alpha * mpf(v)) for v in logps)) / mpf(alpha)


def soft_regularizer(g, p, used):
    if p.regularizer != "importance":
        return 0
    s = log_ratios(g)
    return p.regularizer_weight * mean([tangent_exp(s[i]) * s[i] for i in used])


def spo(g, p, groups):
    logp = g["logp"]
    if p.form == "pairs":
        chosen = pairs(g, p)
        if not chosen:
            return None
        masses = [[h["logp"][w], h["logp"][m]] for h in groups for w, m in pairs(h, p)]
        losses = []
        for w, m in chosen:
            loss = soft_weight([logp[w], logp[m]], p.gamma, masses) * soft_choice([logp[w], logp[m]], p.alpha)
            losses.append(loss - (p.regularizer_weight * mpf(logp[w]) if p.regularizer == "log_prob" else 0))
        total = sum(losses) if p.reduction == "sum" else mean(losses)
        return total + soft_regularizer(g, p, {i for pair in chosen for i in pair})
    order = ranking(g)
    if order is None:
        return None
    rankings = [(h, ranking(h)) for h in groups if ranking(h) is not None]
    total = mpf(0)
    for k in range(1 if p.form == "best_of_n" else len(order) - 1):
        masses = [[h["logp"][i] for i in o[k:]] for h, o in rankings if len(o) > k + 1]
        tail = [logp[i] for i in order[k:]]
        total += mpf(p.eta) ** k * soft_weight(tail, p.gamma, masses) * soft_choice(tail, p.alpha)
    if p.regularizer == "log_prob":
        total -= p.regularizer_weight * mpf(logp[order[0]])
    return total + soft_regularizer(g, p, order)


# ------------------------------------------------------------------------------------- token level,
# supervised


def grpo_offline(g, p, _):
    if len(set(g["S"])) < 2:
        return None
    rewards = [mpf(s) for s in g["S"]]
    spread = sqrt(sum((r - mean(rewards)) ** 2 for r in rewards) / (len(rewards) - 1))
    per_response = []
    for i, n in enumerate(g["length"]):
        advantage = (rewards[i] - mean(rewards)) / spread
        losses = []
        for t in range(n):
            d = mpf(g["tokens"][i][t]) - mpf(g["ref_tokens"][i][t])
            ratio = tangent_exp(d)
            clipped = min(max(ratio, 1 - mpf(p.epsilon)), 1 + mpf(p.epsilon))
            losses.append(-min(ratio * advantage, clipped * advantage) + p.beta * (tangent_exp(-d) + d - 1))
        per_response.append(mean(losses))
    return mean(per_response)


def sft(g, p, _):
    if p.targets == "positives":
        sets = partition(g, p)
        return mean([likelihood(g, i, p.normalization) for i in sets[0]]) if sets else None
    if g["S"] is None and g["label"] is None:
        return likelihood(g, 0, p.normalization) if g["logp"] else None
    if g["S"] is None and 1 not in g["label"]:
        return None
    return likelihood(g, best_index(g), p.normalization) if g["logp"] else None


def evaluate(name, groups, p):
    return [globals()[name](g, p, groups) if g["logp"] else None for g in groups]
