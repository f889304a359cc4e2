"""`Doubt`: a commit of Kafka's that was sent and not answered."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from confluent_kafka import TopicPartition

from duly.brokers.kafka.client import log
from duly.brokers.kafka.ending import Ending, RunEnding
from duly.brokers.kafka.notes import Foretold
from duly.brokers.kafka.positions import Place, Positions
from duly.brokers.kafka.share import Share
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import BrokerUnavailable

# Far longer than Kafka takes to mark the end of a transaction where the group's positions are.
_UNTOLD_S = 10.0


@dataclass(slots=True)
class Doubt:
    """``foretold``: where partitions stand if it was carried out, and ``ended`` what has ended
    then; ``group``: as whom it was committed. The producer stays with it: nobody else may begin
    under its id before.
    """

    producer: TransactionalProducer
    ended: Sequence[Ending | RunEnding]
    foretold: Mapping[int, tuple[Share, Foretold]]
    group: bytes
    asked_s: float = field(default_factory=time.monotonic)

    def told(self, positions: Positions) -> Mapping[Place, tuple[int, str]]:
        """Where the group stands, once this is over. Raises `BrokerError`.

        Where Kafka has forgotten to end it in the group's positions nobody is ever told: then it is
        aborted there once more. That this process may be no member by now does not matter: what is
        refused is part of the transaction all the same.
        """
        self.producer.prepare()
        names = {share.name for share, _ in self.foretold.values()}
        try:
            return positions.at_last(names)
        except BrokerUnavailable:
            if time.monotonic() > self.asked_s + _UNTOLD_S:
                self.asked_s = time.monotonic()
                log.warning("Kafka: positions of %s are not ended: aborting again", names)
                self.producer.end_positions(
                    [TopicPartition(*name, 0) for name in names], self.group
                )
            raise
