"""Whether the reply topic is still the one that was opened. Pure: answers of brokers in, news out."""

from __future__ import annotations

from typing import Final, Literal

from embedq_shared.kafka import TopicFacts

GONE_S: Final = 5.0
"""For so long brokers must have said that there is no such topic: who deletes one to make it anew does so within seconds, and a
broker that has just started may not know it yet."""

News = Literal["same", "made anew", "gone"]


class ReplyTopic:
    """Knows a topic by its id, which another one of the same name never has.

    Invariant: an id that was replaced never counts again, so a broker that lags behind cannot bring a topic back.
    """

    def __init__(self) -> None:
        self._id = ""
        self._former: set[str] = set()
        self._missing_since: float | None = None

    def note(self, facts: TopicFacts | None, now: float) -> News:
        """What it means that a broker says this of the topic's name, None: that there is none."""
        if facts is None:
            if self._missing_since is None:
                self._missing_since = now
            return "gone" if now - self._missing_since >= GONE_S else "same"
        self._missing_since = None
        if facts.id in ("", self._id, *self._former):
            return "same"
        former, self._id = self._id, facts.id
        if not former:
            return "same"
        self._former.add(former)
        return "made anew"
