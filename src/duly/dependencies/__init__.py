"""What a handler needs besides its message: `use`, and the `Resolver` that a worker runs it with.

A dependency is a factory named in a keyword-only default::

    def session() -> Iterator[Session]:
        with Session(engine) as opened:
            yield opened

    @app.consumer(rides, name="board", guarantee="at-least-once")
    def show(ride: Ride, *, db: Session = duly.use(session)) -> None: ...

What is torn down is torn down before the message is settled or the transaction commits, and
sees what the handler raised. It cannot turn that into a success: only the handler itself says
how a message ended.
"""

from duly.dependencies.factories import Use, check_colours, innermost, signature_of, use
from duly.dependencies.resolver import Resolver

__all__ = ["Resolver", "Use", "check_colours", "innermost", "signature_of", "use"]
