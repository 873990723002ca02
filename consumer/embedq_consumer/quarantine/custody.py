"""What the committed offset of a partition says of the process that works there, and what its death means. Pure.

It is the metadata of the group's own offset commits: it travels with the partition, changes together with the offset,
and only the partition's present owner can write it. All offsets here are of the partition; a range ends before its
`until`, and begins at the committed offset.
"""

from __future__ import annotations

from typing import Final

import msgspec

from embedq_consumer.intake.records import Death

MOST_DEATHS: Final = 8
"""Of a partition's history, the newest: four convict a record, and a commit's metadata may have 4,096 bytes."""
ALONE_DEATHS: Final = 2
"""Deaths alone that condemn a record. One would be enough if nothing but records killed processes; but an operator's SIGKILL
meets one record or another that runs alone, and the same one twice hardly ever."""
_MOST_NAME: Final = 64
"""Characters of a replica's name in the history; the default names have fewer."""


class Claimant(msgspec.Struct, frozen=True, kw_only=True):
    """A process that works on partitions."""

    owner: str
    """No other process has it, not even the same replica's next one."""
    replica: str
    span: int
    """Records of a partition that it may have read and not committed."""


class Custody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who works on a partition, and which of its records are suspects.

    Invariants:
        - `owner` is written before any record of the partition is worked on, and removed when it is given up in order.
          So another process that finds it knows that the owner died.
        - Records below `condemned_until` killed processes while they ran alone: they never run again.
        - The record right below `accused_until` killed `accusations` processes while it ran alone.
        - Records below `alone_until` ran at two deaths: each runs alone, with nothing else on the device.
        - Records below `careful_until`, and at most `careful_left` of them, may have run at one death: they run in small
          groups, and the partition's other records wait.
        - While suspects run, the range of them is below `trial_until`, and no other record of the partition runs.
    """

    owner: str = ""
    replica: str = ""
    span: int = 0
    deaths: tuple[Death, ...] = ()
    condemned_until: int = 0
    accused_until: int = 0
    accusations: int = 0
    alone_until: int = 0
    careful_until: int = 0
    careful_left: int = 0
    trial_until: int = 0
    alone: bool = False
    """Whether the trial under way is one record with nothing else on the device."""

    def has_suspects(self, committed: int) -> bool:
        """Whether records from this offset on are under suspicion."""
        careful = self.careful_left > 0 and self.careful_until > committed
        return careful or max(self.alone_until, self.condemned_until) > committed

    def released(self) -> Custody:
        """The same when nobody works there any more."""
        return msgspec.structs.replace(self, owner="", replica="", span=0, trial_until=0, alone=False)


def encode(custody: Custody, topic_id: str = "") -> str:
    """As the metadata of a commit, which also says of which topic it is (`group/topic_watch.py`); "" if there is nothing to
    say."""
    said = msgspec.to_builtins(custody) | ({"topic_id": topic_id} if topic_id else {})
    return msgspec.json.encode(said).decode() if said else ""


def decode(metadata: str) -> Custody:
    """From a commit's metadata. What is not ours says nothing."""
    try:
        return msgspec.json.decode(metadata, type=Custody) if metadata else Custody()
    except msgspec.DecodeError:  # a ValidationError, too
        return Custody()


def take_over(before: Custody, committed: int, end: int, *, claimant: Claimant, now_ms: int) -> Custody:
    """The custody of a process that begins to work on the partition at offset `committed`; `end` is the partition's end.

    If the one before died there:

    - Its trial was of one record alone: that record is accused, and condemned if it was before.
    - Its trial was of a group: each of the group's records has two deaths now, and will run alone.
    - It had suspects, and none of them ran: nothing new is known.
    - It worked freely: whatever it may have read is suspect, at most `span` records from the committed one on.
    """
    after = msgspec.structs.replace(
        before, owner=claimant.owner, replica=claimant.replica, span=claimant.span, trial_until=0, alone=False
    )
    if has_died(before, claimant):
        death = Death(at_ms=now_ms, replica=before.replica[:_MOST_NAME])
        after = msgspec.structs.replace(after, deaths=(*before.deaths, death)[-MOST_DEATHS:])
        if before.trial_until > committed and before.alone:
            after = _accused(after, before)
        elif before.trial_until > committed:
            after = msgspec.structs.replace(after, alone_until=before.trial_until)
        elif not before.has_suspects(committed):
            after = msgspec.structs.replace(after, careful_until=end, careful_left=before.span)
    return after if after.has_suspects(committed) else acquitted(after)


def _accused(after: Custody, before: Custody) -> Custody:
    """With the accusation of the record that ran alone."""
    again = before.accused_until == before.trial_until
    accusations = before.accusations + 1 if again else 1
    condemned_until = before.trial_until if accusations >= ALONE_DEATHS else before.condemned_until
    return msgspec.structs.replace(
        after,
        accused_until=before.trial_until,
        accusations=accusations,
        condemned_until=condemned_until,
    )


def has_died(before: Custody, claimant: Claimant) -> bool:
    """Whether the process that had the partition before this one ended without giving it up."""
    return before.owner not in ("", claimant.owner)


def acquitted(custody: Custody) -> Custody:
    """The same without suspects and history."""
    return Custody(owner=custody.owner, replica=custody.replica, span=custody.span)
