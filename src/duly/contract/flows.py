"""What holds end to end: from publishing to a topic until a consumer has handled the message.

A guarantee is two promises: nothing is lost, and nothing is handled twice. A flow keeps a
promise when both publishing and consuming do. So an at-most-once topic with an at-least-once
consumer keeps neither, which no single word of its declarations says.
"""

from __future__ import annotations

from typing import Any

from duly.consumer import Consumer
from duly.contract.setting import Setting, duration
from duly.contract.terms import Flow
from duly.guarantees import Admission, Guarantee
from duly.message import Topic

_NEVER_LOST = (Guarantee.AT_LEAST_ONCE, Guarantee.EXACTLY_ONCE)
_NEVER_TWICE = (Guarantee.AT_MOST_ONCE, Guarantee.EXACTLY_ONCE)


def flow_of(setting: Setting, topic: Topic[Any], consumer: Consumer) -> Flow:
    """The guarantee of this topic and consumer together, and why it is that one."""
    admission = setting.admission(consumer)
    published, consumed = topic.promise, consumer.guarantee
    # An inbox goes by identity: it drops a repeated publish like a repeated delivery.
    dropped = published in _NEVER_TWICE or admission is Admission.BY_INBOX
    kept = published in _NEVER_LOST and consumed in _NEVER_LOST
    once = dropped and consumed in _NEVER_TWICE
    reasons = [*_losses(topic, consumer), *_repeats(consumer, dropped=dropped)]
    if published is Guarantee.AT_LEAST_ONCE and once and admission is Admission.BY_INBOX:
        reasons.append(
            "the inbox drops a publish repeated under the same id, for "
            f"{duration(consumer.options.inbox_retention_s)}"
        )
    why = "; ".join(reasons) or "published once, takes effect once"
    return Flow(topic.name, consumer.name, _word(kept=kept, once=once), why)


def _word(*, kept: bool, once: bool) -> Guarantee | None:
    if kept:
        return Guarantee.EXACTLY_ONCE if once else Guarantee.AT_LEAST_ONCE
    return Guarantee.AT_MOST_ONCE if once else None


def _losses(topic: Topic[Any], consumer: Consumer) -> list[str]:
    reasons = []
    if topic.promise is Guarantee.AT_MOST_ONCE:
        reasons.append("may be lost before it arrives: the topic is at-most-once")
    if consumer.guarantee is Guarantee.AT_MOST_ONCE:
        reasons.append("may be lost in a crash: settled before the handler runs")
    return reasons


def _repeats(consumer: Consumer, *, dropped: bool) -> list[str]:
    reasons = []
    if not dropped:
        reasons.append(
            "a publish that is repeated (after PublishUnknown, by a restarted publisher) is "
            "handled twice: to drop repeats, give ids and declare the topic exactly-once"
        )
    if consumer.guarantee is Guarantee.AT_LEAST_ONCE:
        reasons.append("may be handled again after a crash: the handler must be idempotent")
    return reasons
