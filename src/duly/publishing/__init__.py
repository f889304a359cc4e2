"""Publishing: at once and durable, combined on an event loop, or buffered and lossy."""

from duly.publishing.buffer import Buffered, Dropped
from duly.publishing.direct import IN_TRANSACTION, refuse_on_loop
from duly.publishing.publisher import Accepted, Publisher, refuse_delays

__all__ = [
    "IN_TRANSACTION",
    "Accepted",
    "Buffered",
    "Dropped",
    "Publisher",
    "refuse_delays",
    "refuse_on_loop",
]
