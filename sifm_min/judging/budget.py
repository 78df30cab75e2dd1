"""Limits on the calls and the cost of a run, kept in its journal over kills and restarts."""

import threading
from datetime import datetime, timezone

from .question import Stop


class Budget:
    """The limits of a run on calls and cost, shared by its clients. A call is made only if its upper bound still fits.

    calls: made so far; cost: USD that the answers state; unknown: calls whose cost is not known; held: USD, the upper
    bounds of those calls, which count against max_cost.

    journal: a Ledger, or None. Each call is written there before it is sent ("intent") and after it has ended
    ("settled"), so that a call in flight when the process is killed still counts in the next run.
    """

    def __init__(self, max_cost=None, max_calls=None, journal=None):
        self.max_cost, self.max_calls, self.journal = max_cost, max_calls, journal
        self.calls, self.cost, self.unknown, self.held = 0, 0.0, 0, 0.0
        self._reserved, self._changed, self._last = {}, threading.Condition(), 0

    def resume(self, rows):
        """Count the calls in the rows of a journal. Returns (calls, USD) of those that never ended: they were in flight.

        A journal that was written before there were intents has the calls in the `attempts` of each answer.
        """
        in_flight = {}
        for row in rows:
            if row.get("kind") == "intent":
                in_flight[row["call"]] = row["bound_usd"] or 0.0
                self.calls += 1
                self._last = max(self._last, row["call"])
            elif row.get("kind") == "settled":
                self._count(row["cost_usd"], in_flight.pop(row["call"], 0.0))
            else:
                earlier = [attempt for attempt in row.get("attempts", ()) if "call" not in attempt]
                self.calls += len(earlier)
                for attempt in earlier:
                    self._count(attempt["cost"], row.get("bound_usd") or 0.0)
        for call, bound in in_flight.items():
            self._count(None, bound)
            self._write({"kind": "settled", "call": call, "status": "in_flight_at_the_end", "cost_usd": None})
        return len(in_flight), sum(in_flight.values())

    def take(self, bound, **about):
        """Reserve a call of at most `bound` USD and return its number; raises Stop where a limit is reached.

        Waits while calls in flight may turn out cheaper than their bounds. `about` is written with the intent.
        """
        with self._changed:
            while self.max_cost is not None and self.cost + self.held + sum(self._reserved.values()) + bound > self.max_cost:
                if not any(self._reserved.values()):
                    unknown = f", up to {self.held:.4f} in calls of unknown cost" if self.held else ""
                    raise Stop("budget", f"the next call could exceed the limit of {self.max_cost} USD "
                                         f"({self.cost:.4f} spent{unknown}); raise it to go on from here")
                self._changed.wait()
            if self.max_calls is not None and self.calls >= self.max_calls:
                raise Stop("budget", f"the limit of {self.max_calls} calls is reached; raise it to go on from here")
            self.calls += 1
            self._last += 1
            call = self._last
            self._reserved[call] = bound or 0.0
        try:
            self._write({"kind": "intent", "call": call, **about, "bound_usd": bound})
        except OSError:                                      # a full disk: the call is not made
            with self._changed:
                self.calls -= 1
                del self._reserved[call]
                self._changed.notify_all()
            raise
        return call

    def settle(self, call, cost, status):
        """End a call: release its reservation. cost: USD, or None where it is not known."""
        with self._changed:
            self._count(cost, self._reserved.pop(call))
            self._changed.notify_all()
        self._write({"kind": "settled", "call": call, "status": status, "cost_usd": cost})

    def _count(self, cost, bound):
        self.cost += cost or 0.0
        self.unknown += cost is None
        self.held += bound if cost is None else 0.0

    def _write(self, row):
        if self.journal is not None:
            self.journal.append({**row, "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds")})


def cost(tokens, price):
    """USD of a call from its token counts, or None where a count or the price is not known."""
    if price is None or any(tokens.get(name) is None for name in ("prompt", "cached", "output", "thoughts")):
        return None
    cached = min(tokens["cached"], tokens["prompt"])
    return ((tokens["prompt"] - cached) * price["input"] + cached * price.get("cached", price["input"])
            + (tokens["output"] + tokens["thoughts"]) * price["output"]) / 1e6


def total(values):
    """The sum, or None where there is no value or one of them is None."""
    values = list(values)
    return None if not values or None in values else sum(values)
