"""Charts of the ISR as SVG: by method, by prompt, against lambda and against the budget."""

import html
import math

from ..judging.intervals import Estimate
from . import gains
from .figures import PROMPTS, figures, interval_text, judges_in, name_of, paper


def charts(groups):
    """Yield the charts that the results allow, as SVG."""
    budgets = {}
    for group in groups:
        suite = group["plan"]["suite"]
        for target in dict.fromkeys(arm["target"] for arm in group["arms"]):
            arms = [arm["name"] for arm in group["arms"] if arm["target"] == target and not arm["attack"]]
            cells = [cell for cell in group["cells"] if cell["target"] == target and not cell["attack"]]
            judges = judges_in(cells)
            if not judges:
                continue
            by_arm = figures(cells, judges, arms)
            where = f"{target}, {len({cell['image_id'] for cell in cells})} pictures"
            if suite == "lambda":
                rates = {arm.partition(" ")[2]: by_arm[arm, "original"].rate.isr for arm in arms if arm.startswith("lambda ")
                         and (arm, "original") in by_arm}
                theirs = {f"{row['lam']:g}": row["original"]["isr"] for row in paper()["tables"]["VII"]["rows"]}
                series = {"ours": rates, "the paper, sd3": {lam: Estimate(theirs[lam], None, None, "") for lam in rates
                                                            if lam in theirs}}
                yield chart(f"ISR against lambda: {where}", list(rates), series)
                continue
            kinds = [kind for kind in PROMPTS if any((arm, kind) in by_arm for arm in arms)]
            series = {PROMPTS[kind]: {name_of(arm): by_arm[arm, kind].rate.isr for arm in arms
                                             if (arm, kind) in by_arm} for kind in kinds}
            yield chart(f"ISR, {suite}: {where}", [name_of(arm) for arm in arms], series)
            own = [arm for arm in group["arms"] if arm["target"] == target and arm["name"] in arms]
            if gained := gains.gains(cells, judges, own, by_arm):
                places = list(dict.fromkeys(name_of(one.arm) for one in gained))
                yield chart(f"What each gains in ISR, {suite}: {where}", places, {
                    PROMPTS[kind]: {name_of(one.arm): one.paired.result.difference for one in gained if one.prompts == kind}
                    for kind in kinds}, least=-1)
            prompts = list(dict.fromkeys(cell["prompt_id"] for cell in cells))
            if len(prompts) > 1:
                by_prompt = {prompt: figures([cell for cell in cells if cell["prompt_id"] == prompt], judges, arms)
                             for prompt in prompts}
                yield chart(f"ISR against prompts: {where}", prompts, {
                    name_of(arm): {prompt: own.rate.isr for prompt in prompts
                                   for (name, _), own in by_prompt[prompt].items() if name == arm} for arm in arms})
            if suite == "white-box":
                eps = f"{math.floor(255 * group['plan']['eps'] + 1e-9)}/255"
                for arm in arms:
                    if (arm, "original") in by_arm:
                        budgets.setdefault(target, {}).setdefault(name_of(arm), {})[eps] = by_arm[arm, "original"].rate.isr
    for target, series in budgets.items():
        steps = sorted({eps for rates in series.values() for eps in rates}, key=lambda eps: int(eps.partition("/")[0]))
        if len(steps) > 1:
            yield chart(f"ISR against the budget: {target}", steps, series)


WIDTH, HEIGHT, LEFT, TOP, FOOT = 660, 310, 66, 12, 80


def chart(title, places, series, *, least=0):
    """One chart: at each place along the axis a point with its interval for every series, name -> {place: Estimate}.

    least: the lower end of the axis, 0, or -1 for differences.
    """
    step, rows = (WIDTH - LEFT - 10) / max(1, len(places)), max(1, math.ceil(len(series) / 4))
    total = HEIGHT + 18 * rows

    def y(value):
        return TOP + (1 - value) / (1 - least) * (HEIGHT - TOP - FOOT)
    drawn = []
    for tenth in range(10 * least, 11, 2 if not least else 5):
        height = y(tenth / 10)
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{height:.1f}" y2="{height:.1f}" stroke="var(--line)"/><text '
                     f'x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end" fill="currentColor">{tenth * 10}%</text>')
    for i, place in enumerate(places):
        x = LEFT + step * (i + 0.5)
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - FOOT + 16}" text-anchor="end" fill="currentColor" '
                     f'transform="rotate(-35 {x:.1f} {HEIGHT - FOOT + 16})">{html.escape(place)}</text>')
    for k, (name, values) in enumerate(series.items()):
        colour = f"var(--s{k % 10})"
        for i, place in enumerate(places):
            estimate = values.get(place)
            if estimate is None or estimate.value is None:
                continue
            x = LEFT + step * (i + 0.5) + (k - (len(series) - 1) / 2) * min(12, step * 0.7 / len(series))
            tooltip = html.escape(f"{name}, {place}: {interval_text(estimate)}")
            bar = "" if estimate.low is None else (f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(estimate.low):.1f}" '
                                                   f'y2="{y(estimate.high):.1f}" stroke="{colour}" stroke-width="2"/>')
            drawn.append(f'<g><title>{tooltip}</title>{bar}<circle cx="{x:.1f}" cy="{y(estimate.value):.1f}" r="4" '
                         f'fill="{colour}"/></g>')
        row, column = divmod(k, 4)
        drawn.append(f'<circle cx="{LEFT + 155 * column}" cy="{HEIGHT + 18 * row}" r="4" fill="{colour}"/><text x="'
                     f'{LEFT + 155 * column + 9}" y="{HEIGHT + 18 * row + 4}" fill="currentColor">{html.escape(name)}</text>')
    return (f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {total}" role="img" aria-label="'
            f'{html.escape(title)}">{"".join(drawn)}</svg></figure>')
