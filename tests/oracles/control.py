"""`safe`, its regulator and `paper` once more, naively: whole histories in lists, plain loops, literal numbers."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import Any

Row = tuple[float, float, float]  # reward, kl, entropy


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def squares(values: list[float]) -> float:
    """Sum of the squares of the differences from the mean."""
    centre = mean(values)
    return math.fsum((value - centre) ** 2 for value in values)


def deviation(values: list[float]) -> float:
    """Population deviation; 0 where it is only the rounding of equal values."""
    found = math.sqrt(squares(values) / len(values))
    return found if found > 1e-12 * abs(mean(values)) else 0.0


def halves(values: list[float]) -> tuple[float, float, float]:
    """(rise of the mean from the older half to the newer, its standard error, mean of the newer half)."""
    n = len(values) // 2
    newer = [values[len(values) - 1 - i] for i in range(n)]
    older = [values[len(values) - 1 - n - i] for i in range(n)]
    error = math.sqrt((squares(newer) + squares(older)) / (n - 1) / n)
    return mean(newer) - mean(older), error, mean(newer)


def phase(previous: str, rewards: list[float], kls: list[float], spread: float, budget: float) -> str:
    if len(rewards) < 10:
        return "WARMUP"
    rise, error, _ = halves(rewards)
    kl_rise, kl_error, kl_now = halves(kls)
    errors, least = (1.5, 0.05 * spread) if previous == "CLIMBING" else (3.0, 0.1 * spread)
    if rise > 0 and rise > errors * error and rise > least:
        return "CLIMBING"
    errors, least = (1.5, 0.05 * spread) if previous == "FALLING" else (3.0, 0.1 * spread)
    kl_falls = -kl_rise > 3 * kl_error and -kl_rise > 0.05 * budget
    if -rise > 0 and -rise > errors * error and -rise > least and not kl_falls:
        return "FALLING"
    if kl_now >= 0.9 * budget and kl_rise > 3 * kl_error and kl_rise > 0.1 * budget:
        return "OVEROPTIMISED"
    return "PLATEAU"


def thresholds(rows: list[Row], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Multiple of the budget, phase and PID terms of every step."""
    multiple, name, total, last = 1.0, "WARMUP", 0.0, 0.0
    for step in range(len(rows)):
        start = max(0, step + 1 - settings["window"])
        rewards, kls = [row[0] for row in rows[start : step + 1]], [row[1] for row in rows[start : step + 1]]
        spread = deviation([row[0] for row in rows[: step + 1]])
        name = phase(name, rewards, kls, spread, settings["budget"] * multiple)
        velocity = 0.0
        if len(rewards) >= 10 and spread > 0:
            rise, error, _ = halves(rewards)
            if rise >= 0 or name == "FALLING":
                velocity = math.copysign(min(3.0, max(0.0, abs(rise) - 3 * error) / spread), rise)
        p, d = settings["pid_kp"] * velocity, settings["pid_kd"] * (velocity - last)
        kept = 0.95 * total
        output = p + settings["pid_ki"] * kept + d
        pushes_on = (output >= 0.25 and velocity > 0) or (output <= -0.25 and velocity < 0)
        total = kept if pushes_on else sorted((-5.0, kept + velocity, 5.0))[1]
        i, last = settings["pid_ki"] * total, velocity
        asked = {"WARMUP": 1.0, "CLIMBING": 1.2, "PLATEAU": 1.0, "FALLING": 0.75, "OVEROPTIMISED": 0.75}[name]
        wanted = asked + sorted((-0.25, p + i + d, 0.25))[1]
        wanted = sorted((settings["threshold_min"], wanted, settings["threshold_max"]))[1]
        rate = settings["threshold_rate"]
        up = 0.25 * rate if name == "PLATEAU" and multiple < 1 else rate
        multiple = sorted((multiple * (1 - rate), wanted, multiple * (1 + up)))[1]
        yield {"multiple": multiple, "phase": name, "pid_p": p, "pid_i": i, "pid_d": d}


def gates(rows: list[Row], settings: dict[str, Any]) -> list[tuple[float, float | None, bool]]:
    """Gate and floor of every step, and whether the coefficient may relax."""
    found: list[tuple[float, float | None, bool]] = []
    for step in range(len(rows)):
        start = mean([row[2] for row in rows[:5]])
        if not settings["gate_on"] or step < 5 or settings["gate_fraction"] * start <= 0:
            found.append((1.0, None, True))
            continue
        floor, recent, slow = settings["gate_fraction"] * start, start, start
        for row in rows[5 : step + 1]:
            recent, slow = 0.5 * recent + 0.5 * row[2], 0.9 * slow + 0.1 * row[2]
        gate = settings["gate_max"] if recent <= 0 else (floor / recent) ** settings["gate_power"]
        gate = max(1.0, min(settings["gate_max"], gate))
        found.append((gate, floor, gate == 1 or recent >= 0.95 * slow))
    return found


def regulator(settings: dict[str, Any], log_coef: float) -> Generator[dict[str, float], tuple[float, ...], None]:
    """Takes (KL, its error, budget, whether it may relax), gives coefficient, share, filters and predicted KL."""
    taken: list[float] = []
    ratios: list[float] = []
    held = math.inf
    seconds, jumped, wild = 0.0, False, 0
    trust, side = 1.0, 0
    kl, kl_error, budget, may_relax = yield {}
    short = long = kl
    while True:
        sigma = kl_error or seconds * math.sqrt(math.pi / 12)
        beyond = 0.5 * max(budget, short) + 5 * sigma
        now = 1 if kl > short + beyond else -1 if kl < short - beyond else 0
        if len(taken) >= 2 and now != 0 and now != wild:
            wild, jumped = now, True
        else:
            taken.append(kl)
            if len(taken) >= 3 and not jumped:
                seconds = 0.9 * seconds + 0.1 * abs(taken[-1] - 2 * taken[-2] + taken[-3])
            short, long = (short * 0.67 + kl) / 1.67, (long * 2 + kl) / 3
            wild = now if wild != 0 else 0
            jumped = wild != 0
        predicted = short + settings["lead"] * (short - long) / (2 - 0.67)
        ratio = short / budget
        ratios.append(ratio)
        trust = min(1.0, 1.002 * trust)
        crossed = 4 * kl_error / budget
        here = 1 if ratio > 1.12 and ratio > 1 + crossed else -1 if ratio < 1 / 1.12 and ratio < 1 - crossed else 0
        if here * side == -1:
            trust = max(0.15, 0.85 * trust)
        side = here or side
        e = max(-1.0, min(1.0, math.log(ratio))) if ratio > 0 else -1.0
        if 0.9 <= ratio <= 1 / 0.9 and abs(short - long) / (2 - 0.67) <= 0.1 * budget:
            held = log_coef
        if e > 0:
            e *= 2
        elif log_coef <= held:
            e *= min(1.0, (max(0.0, ratio) / 0.9) ** 4)
        if e < 0 and not may_relax:
            e = 0.0
        log_coef += trust * settings["gain"] * min(1.0, 30 / max(1.0, rise_of(ratios))) * e
        log_coef = sorted((math.log(settings["min_coef"]), log_coef, math.log(settings["max_coef"])))[1]
        share = min(math.exp(2), (max(0.0, predicted) / budget) ** (2.25 * trust))
        figures = {"coefficient": math.exp(log_coef), "share": share, "short": short, "long": long}
        kl, kl_error, budget, may_relax = yield {**figures, "predicted": predicted}


def rise_of(ratios: list[float]) -> float:
    """The shortest of the rollouts between two levels, each by its share of the way; 0 while there is none.

    The way is measured by roots, from 0.25 to 0.949. A level counts from the first rollout after the KL was last at or
    below 1/16, up to the first above 0.9.
    """
    levels = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.9]
    done = next((i for i, ratio in enumerate(ratios) if ratio > 0.9), len(ratios) - 1)
    seen: list[float] = []
    start = 0
    for end in range(done + 1):  # every climb, of which all but the last fell back to 1/16
        if ratios[end] <= 1 / 16:
            seen, start = seen + stages(ratios[start:end], levels), end + 1
    seen += stages(ratios[start : done + 1], levels)
    return min(seen, default=0.0)


def stages(climb: list[float], levels: list[float]) -> list[float]:
    """Rollouts of each stage of a climb, scaled to the whole way."""
    reached = [next((i for i, ratio in enumerate(climb) if ratio > level), None) for level in levels]
    way = math.sqrt(0.9) - math.sqrt(1 / 16)
    return [
        (later - first) * way / (math.sqrt(high) - math.sqrt(low))
        for first, later, low, high in zip(reached, reached[1:], levels, levels[1:], strict=False)
        if first is not None and later is not None
    ]


def safe(rows: list[Row], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure of every decision, without its reason."""
    still = {"multiple": 1.0, "phase": "NONE", "pid_p": 0.0, "pid_i": 0.0, "pid_d": 0.0}
    moving = thresholds(rows, settings)
    each = next(moving) if settings["threshold_on"] else still
    first = settings["initial_coef"] * (0.3 / (settings["budget"] * each["multiple"])) ** 0.75
    plant = regulator(settings, math.log(sorted((settings["min_coef"], first, settings["max_coef"]))[1]))
    next(plant)
    found = []
    for step, (gate, floor, may_relax) in enumerate(gates(rows, settings)):
        budget = settings["budget"] * each["multiple"]
        seen = plant.send((rows[step][1], 0.0, budget, may_relax))
        short = seen["short"]
        acts = min(seen["share"] * seen["coefficient"], settings["max_coef"])
        found.append(
            {
                "kl_coef": gate * max(acts, min(gate - 1, 1.0) * seen["coefficient"]),
                "threshold": budget,
                "excess": max(0.0, short - budget),
                "kl_short": short,
                "kl_long": seen["long"],
                "gate": gate,
                "phase": each["phase"],
                "pid_p": each["pid_p"],
                "pid_i": each["pid_i"],
                "pid_d": each["pid_d"],
                "entropy_floor": floor,
                "update_kl": settings["update_share"]
                * budget
                * sorted((0.15, (0.8 * budget / max(short, 0.8 * budget)) ** 12, 1.0))[1],
            }
        )
        if settings["threshold_on"] and step + 1 < len(rows):
            each = next(moving)
    return found


def paper(rows: list[Row], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure of every decision of `paper`, without its reason."""
    short = long = velocity = total = error = 0.0
    found = []
    for step, (reward, kl, entropy) in enumerate(rows):
        short, long = 0.9 * short + 0.1 * kl, 0.99 * long + 0.01 * kl
        p = i = d = 0.0
        if step > 0:
            share = settings["velocity_keep"]
            velocity = share * velocity + (1 - share) * (reward - rows[step - 1][0])
            last, error = error, velocity - settings["velocity_target"]
            limit = settings["pid_integral_limit"]
            total = sorted((-limit, total + error, limit))[1]
            p, i, d = settings["pid_kp"] * error, settings["pid_ki"] * total, settings["pid_kd"] * (error - last)
        seen = [row[0] for row in rows[: step + 1]]
        name, multiplier = "PLATEAU", 0.8
        if step + 1 < 50:
            name, multiplier = "WARMUP", 1.5
        elif step + 1 >= 100 and mean(seen[-50:]) - mean(seen[-100:-50]) > 0.01:
            name, multiplier = "CLIMBING", 1.2
        elif math.sqrt(squares(seen[-50:]) / 50) < 0.02 and mean(seen[-50:]) > 0.7:
            name, multiplier = "CONVERGED", 1.0
        wanted = (settings["base_threshold"] + p + i + d) * multiplier
        threshold = sorted((settings["threshold_min"], wanted, settings["threshold_max"]))[1]
        excess, gate = max(0.0, short - threshold), 1.0
        if excess > 0:
            gate = max(settings["gate_min"], settings["entropy_floor"] / (entropy + 0.1))
        found.append(
            {
                "kl_coef": 2 * settings["penalty_scale"] * gate * excess,
                "threshold": threshold,
                "excess": excess,
                "kl_short": short,
                "kl_long": long,
                "gate": gate,
                "phase": name,
                "pid_p": p,
                "pid_i": i,
                "pid_d": d,
                "entropy_floor": settings["entropy_floor"],
            }
        )
    return found
