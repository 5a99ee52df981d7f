"""Figures that are not finite, reward servers that fail, clocks that jump: the run goes on, or stops in good order."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from stable_rlhf.checkpoints.store import newest
from stable_rlhf.errors import Exit
from stable_rlhf.runs import incidents
from tests.faults import injections, servers
from tests.faults.checkpoints import MEMORY
from tests.faults.counts import Counts
from tests.faults.servers import answer, misbehaving
from tests.faults.training import LOSSES, STEPS, Tiny, assert_finite, assert_same, result, sentence
from tests.tiny_runs import letters

WHERE = ("reward", "loss", "gradient", "value head", "log-prob", "weight")
WHEN = ((0,), (2,), (3,), (STEPS - 1,), (1, 2), tuple(range(2, 50)))
"""Steps: the first, before and after a snapshot, the last, two in a row, and all from the third on."""


def inject_nan(count: int, seed: int) -> Counts:
    """NaN in each of WHERE at each of WHEN: of each place one, then another of each, until there are `count`."""
    chance = random.Random(seed)
    orders = [chance.sample(WHEN, len(WHEN)) for _ in WHERE]
    cases = [(where, steps) for turn in zip(*orders, strict=True) for where, steps in zip(WHERE, turn, strict=True)]
    survived, lost, ends = 0, [], dict.fromkeys(("went on", "stopped and resumed"), 0)
    with tempfile.TemporaryDirectory(dir=MEMORY) as made:
        tiny = Tiny.make(Path(made))
        expected = result(tiny.train("whole"))
        for number, (where, steps) in enumerate(cases[:count]):
            try:
                ends[_with_nan(tiny, f"nan-{number}", where, steps, expected)] += 1
                survived += 1
            except LOSSES as error:
                lost.append(f"{where} at {steps[:3]}: {error!r}")
    how = ", ".join(f"{number} {name}" for name, number in ends.items())
    return Counts(min(count, len(cases)), survived, tuple(lost), how)


def _with_nan(tiny: Tiny, name: str, where: str, steps: tuple[int, ...], expected: dict[str, bytes]) -> str:
    run = tiny.folder / name
    code, said = tiny.run(tiny.arguments(name), partial(injections.nan, where, steps))
    if code == Exit.DONE:
        assert_finite(run)
        seen = incidents.read(run)
        there = [step for step in steps if step < STEPS]
        assert [incident["step"] for incident in seen] == there, f"the guard has seen it at {seen}"
        return "went on"
    assert code == (Exit.REWARD if where == "reward" else Exit.GUARD), said
    assert f"resume {run}` continues from step" in sentence(said), said
    if steps[0] > 0:  # or there is no row yet
        assert_finite(run)
    code, said = tiny.run(["resume", str(run)])
    assert code == Exit.DONE, said
    assert_finite(run)
    if where == "reward":
        assert_same(run, expected)
    return "stopped and resumed"


# -- reward servers -------------------------------------------------------------------------------------------------


def scored(handler: servers.Handler) -> None:
    """What tests.tiny_runs:letters gives."""
    sent = handler.sent
    texts = [query[len(prompt) :] for query, prompt in zip(sent["query"], sent["prompts"], strict=True)]
    handler.give(200, json.dumps({"rewards": letters(sent["prompts"], texts)}).encode())


FAILURES: dict[str, servers.Act] = {
    "answers 500": answer(b"", 500),
    "hangs": servers.hang,
    "answers garbage": answer(b"<html>\x00\xff"),
    "gives too few": answer({"rewards": []}),
    "closes the connection": servers.close,
    "ends inside its answer": servers.cut,
    "sends a byte at a time": servers.drip,
    "is overloaded": answer(b"", 429),
}
BEFORE = 2
"""Requests of a run before its first step: the trial, and the evaluation."""


def fail_rewards(count: int, seed: int) -> Counts:
    """Each of FAILURES for a while and for good, then a server that is gone."""
    cases = [(name, for_good) for for_good in (False, True) for name in FAILURES]
    random.Random(seed).shuffle(cases)
    cases = [("dies", True), *cases][:count]
    chance, survived, lost = random.Random(seed), 0, []
    with tempfile.TemporaryDirectory(dir=MEMORY) as made:
        tiny = Tiny.make(Path(made))
        for number, (name, for_good) in enumerate(cases):
            act = servers.die if name == "dies" else FAILURES[name]
            at = chance.randrange(1, STEPS)
            try:
                (_fails_for_good if for_good else _fails_for_a_while)(tiny, number, act, at)
                survived += 1
            except LOSSES as error:
                lost.append(f"a server that {name} at step {at}, {'for good' if for_good else 'a while'}: {error!r}")
    return Counts(len(cases), survived, tuple(lost))


def _asking(server: servers.Server, retries: int) -> tuple[str, ...]:
    own = ("--reward.url", server.url, "--reward.functions", '["builtin"]')
    return (*own, "--reward.timeout", "0.3", "--reward.retries", str(retries), "--save_steps", "4")


def _from_now_on(server: servers.Server, *acts: servers.Act) -> None:
    server.requests.clear()
    server.acts = acts


def _fails_for_a_while(tiny: Tiny, number: int, act: servers.Act, at: int) -> None:
    with misbehaving(scored) as server:
        expected = result(tiny.train(f"left-{number}", *_asking(server, 4)))
        _from_now_on(server, *[scored] * (BEFORE + at), act, act, scored)
        run = tiny.train(f"failed-{number}", *_asking(server, 4))
        assert len(server.requests) == BEFORE + STEPS + 2 + 1  # two again, and the evaluation at the end
        assert_same(run, expected)


def _fails_for_good(tiny: Tiny, number: int, act: servers.Act, at: int) -> None:
    name = f"stopped-{number}"
    run = tiny.folder / name
    with misbehaving(scored) as server:
        port = server.server_address[1]
        expected = result(tiny.train(f"left-{number}", *_asking(server, 1)))
        _from_now_on(server, *[scored] * (BEFORE + at), act)
        code, said = tiny.run(tiny.arguments(name, *_asking(server, 1)))
        assert code == Exit.REWARD, said
        assert "2 tries in" in said, said
        assert sentence(said).endswith(f"resume {run}` continues from step {at}."), said
        assert newest(run / "checkpoints") == (run / "checkpoints" / f"step-{at:06d}", [])
        code, said = tiny.run(["resume", str(run)])
        assert code == Exit.REWARD, said  # it still fails at the trial: nothing is loaded, nothing is changed
        assert "a trial before the run begins" in sentence(said), said
    with misbehaving(scored, port=port):
        code, said = tiny.run(["resume", str(run)])
        assert code == Exit.DONE, said
        assert_same(run, expected)


# -- the clock ------------------------------------------------------------------------------------------------------


def clock_jumps(count: int, seed: int) -> Counts:
    """Every reading of the wall clock is a year off, in turn before and after; stopped and resumed on the way."""
    survived, lost = 0, []
    with tempfile.TemporaryDirectory(dir=MEMORY) as made:
        tiny = Tiny.make(Path(made))
        for number in range(count):
            try:
                more = ("--seed", str(seed + number))
                expected = result(tiny.train(f"whole-{number}", *more))
                run, jumps = tiny.folder / f"jumps-{number}", injections.clock_jumps
                stop = partial(injections.nan, "reward", (3,))
                code, said = tiny.run(tiny.arguments(run.name, *more), jumps, stop)
                assert code == Exit.REWARD, said
                code, said = tiny.run(["resume", str(run)], jumps)
                assert code == Exit.DONE, said
                assert_finite(run)
                assert_same(run, expected)
                survived += 1
            except LOSSES as error:
                lost.append(f"seed {seed + number}: {error!r}")
    return Counts(count, survived, tuple(lost))


FAULTS: dict[str, Callable[[int, int], Counts]] = {
    "figures that are NaN": inject_nan,
    "reward servers that fail": fail_rewards,
    "clocks that jump": clock_jumps,
}
