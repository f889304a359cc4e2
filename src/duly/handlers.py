"""From a function to a `Handler`: what its signature asks for, and whether duly can give it.

The type checker refuses the same mistakes before anything runs; this is for those who run none.
Annotations that cannot be resolved (imported under ``TYPE_CHECKING``) are believed.
"""

from __future__ import annotations

import ast
import collections.abc
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NewType, TypeVar, Union, get_args, get_origin

from duly.consumer import Handler
from duly.dependencies import Use, check_colours, innermost, signature_of
from duly.errors import ConfigurationError, Reject, Retry
from duly.guarantees import Guarantee
from duly.message import Message, Topic
from duly.store import Transaction

Parameter = inspect.Parameter
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def handler_of(
    function: Callable[..., Any],
    topics: Sequence[Topic[Any]],
    guarantee: Guarantee,
    *,
    batch: bool,
    where: str,
) -> Handler:
    """The function as a `Handler`. Raises `ConfigurationError` naming what is wrong with it."""
    if not callable(function) or inspect.isclass(function):
        raise ConfigurationError(f"{where}: {function!r} is no function; decorate a def")
    where = f"{where}, handler {getattr(function, '__qualname__', repr(function))}"
    is_async = _is_async(function, where)
    signature = _signature(function, where)
    uses = _uses(signature, where)
    wants_tx = guarantee is Guarantee.EXACTLY_ONCE
    positional = _positional(signature, where, wants_tx, batch)
    hints = _hints(function)
    wants_message = _check_payload(positional[0], hints, topics, batch, where)
    connection = _connection(positional[1], hints, where) if wants_tx else None
    if not is_async:
        check_colours(uses, where)
    return Handler(function, is_async, batch, wants_message, wants_tx, uses, connection)


def refuse_unrun(returned: Any) -> None:
    """Refuse what a handler returned where it shows that it did not do what it was called for.

    Raises `ConfigurationError`: to settle the message would lose it.
    """
    if isinstance(returned, (Retry, Reject)):
        raise ConfigurationError(f"the handler returned {returned!r}: raise it instead")
    if not inspect.isawaitable(returned) and not inspect.isgenerator(returned):
        return
    if inspect.iscoroutine(returned):
        returned.close()  # or it would warn that nobody awaited it
    raise ConfigurationError(
        f"the handler returned a {type(returned).__name__} that nothing runs. Declare it async def "
        "and await there; a decorator around an async def has to be async too."
    )


# --- the shape


def _is_async(function: Callable[..., Any], where: str) -> bool:
    called = innermost(function)
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        raise ConfigurationError(
            f"{where} has a yield, so calling it would run nothing. What is to be torn down "
            "after a message belongs in a dependency: duly.use(...)"
        )
    if inspect.iscoroutinefunction(called):
        return True
    if inspect.iscoroutinefunction(inspect.unwrap(called)):
        # Run as a def, its coroutine might never be awaited, and the message count as handled.
        raise ConfigurationError(
            f"{where} is an async def inside a decorator whose wrapper is a def. Make the "
            "wrapper async def; or, where it runs the coroutine to its end, wrap it in a def "
            "of your own."
        )
    return False


def _signature(function: Callable[..., Any], where: str) -> inspect.Signature:
    try:
        return signature_of(function)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{where} does not tell its parameters; wrap it in a def"
        ) from error


def _uses(signature: inspect.Signature, where: str) -> dict[str, Use]:
    found: dict[str, Use] = {}
    for name, parameter in signature.parameters.items():
        if isinstance(parameter.default, Use):
            if parameter.kind is not Parameter.KEYWORD_ONLY:
                raise ConfigurationError(
                    f"{where}: the dependency {name!r} must be keyword-only; put a * before it"
                )
            found[name] = parameter.default
        elif parameter.kind is Parameter.KEYWORD_ONLY and parameter.default is Parameter.empty:
            raise ConfigurationError(
                f"{where}: nothing fills {name!r}; give it the default duly.use(...)"
            )
    return found


def _positional(
    signature: inspect.Signature, where: str, wants_tx: bool, batch: bool
) -> list[Parameter]:
    parameters = signature.parameters.values()
    if any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters):
        raise ConfigurationError(
            f"{where} takes *args, which hides what it wants. Name its parameters; a decorator "
            "keeps them with functools.wraps."
        )
    positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    expected = 2 if wants_tx else 1
    if len(positional) == expected:
        return positional
    raise ConfigurationError(f"{where} {_wrong_count(positional, wants_tx, batch)}")


def _wrong_count(positional: list[Parameter], wants_tx: bool, batch: bool) -> str:
    first = "messages: list[...]" if batch else "payload"
    if wants_tx and len(positional) == 1:
        return (
            f"takes no transaction. An exactly-once handler is (order, tx: duly.Transaction[C]) "
            f"in place of ({positional[0].name}): what it writes through tx.connection and "
            "publishes through tx.publish commits once."
        )
    wanted = f"({first}, tx: duly.Transaction[C])" if wants_tx else f"({first})"
    if not positional:
        return f"takes no message. Its parameters are {wanted}, then keywords."
    extra = positional[1] if not wants_tx else positional[-1]
    if not wants_tx and (extra.name == "tx" or "Transaction" in str(extra.annotation)):
        return (
            f"asks for a transaction ({extra.name!r}), which only exactly-once has. Declare the "
            'consumer guarantee="exactly-once", or leave the parameter out.'
        )
    return (
        f"has a positional parameter {extra.name!r} that nothing fills. Its positional "
        f"parameters are {wanted}; dependencies are keyword-only: *, {extra.name}=duly.use(...)"
    )


# --- the annotations


class _Unresolved:
    """Stands for an annotation that is believed."""


def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Annotations by parameter: types where they resolve, their text where they do not."""
    called = inspect.unwrap(innermost(function))
    called = getattr(called, "__func__", called)
    scope = getattr(called, "__globals__", {})
    found: dict[str, Any] = {}
    for name, hint in _annotations(called).items():
        if isinstance(hint, str):
            try:
                # typing's own way to resolve a postponed annotation; one name at a time, so
                # that one that is missing does not hide the others.
                found[name] = eval(hint, scope)  # noqa: S307
            except Exception:  # noqa: BLE001 - whatever an annotation may raise, it is believed
                found[name] = hint
        else:
            found[name] = hint
    return found


def _annotations(function: Any) -> Mapping[str, Any]:
    if sys.version_info >= (3, 14):  # evaluated when asked for, which may fail
        import annotationlib

        return annotationlib.get_annotations(function, format=annotationlib.Format.FORWARDREF)
    return getattr(function, "__annotations__", {})


def _check_payload(
    parameter: Parameter,
    hints: Mapping[str, Any],
    topics: Sequence[Topic[Any]],
    batch: bool,
    where: str,
) -> bool:
    """Whether the handler takes `Message`. Raises where the annotation cannot be right."""
    hint = hints.get(parameter.name, Any)
    text = hint if isinstance(hint, str) else None
    if text is not None:
        return _text_names_message(text, batch)
    element = _element(hint, where, parameter.name) if batch else _plain(hint)
    wants_message = _is_message(element)
    if not batch and _is_message_list(element):
        raise ConfigurationError(
            f"{where}: {parameter.name!r} is a list of messages; lists are for app.batch_consumer"
        )
    wanted = _payload_of(element) if wants_message else element
    for topic in topics:
        for kind in _members(topic.type):
            if not any(_may_be(kind, want) for want in _members(wanted)):
                raise ConfigurationError(
                    f"{where}: {parameter.name!r} is annotated {_show(wanted)}, and topic "
                    f"{topic.name!r} carries {_show(topic.type)}"
                )
    return wants_message


def _connection(parameter: Parameter, hints: Mapping[str, Any], where: str) -> Any:
    """C of ``Transaction[C]``; None where that is None, or not said. Raises where the annotation
    cannot be right.
    """
    hint = hints.get(parameter.name, Any)
    if isinstance(hint, str):
        return None
    for member in _members(_plain(hint)):
        origin = get_origin(member) or member
        if origin in (Any, object) or isinstance(origin, TypeVar):
            return None
        if inspect.isclass(origin) and _fits(Transaction, origin):
            [said] = get_args(member) or (None,) if origin is Transaction else (None,)
            unsaid = said in (Any, object, type(None)) or isinstance(said, TypeVar)
            return None if unsaid else said
    raise ConfigurationError(
        f"{where}: the second parameter of an exactly-once handler is the transaction; "
        f"{parameter.name!r} is annotated {_show(hint)}. Its driver's connection is "
        "tx.connection: write tx: duly.Transaction[C]."
    )


def _fits(kind: type[Any], wanted: type[Any]) -> bool:
    """Whether a value of ``kind`` is one of ``wanted``, as far as that can be told.

    A protocol is for the type checkers to judge: at run time most say nothing about classes.
    """
    return getattr(wanted, "_is_protocol", False) or issubclass(kind, wanted)


def _plain(hint: Any) -> Any:
    """A hint without Annotated, NewType and aliases: what is there at run time."""
    while True:
        if get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        elif isinstance(hint, NewType):
            hint = hint.__supertype__
        elif type(hint).__name__ == "TypeAliasType":  # ``type X = ...`` of Python 3.12
            hint = hint.__value__
        else:
            return hint


def _members(hint: Any) -> list[Any]:
    hint = _plain(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return [member for arg in get_args(hint) for member in _members(arg)]
    return [hint]


def _element(hint: Any, where: str, name: str) -> Any:
    """The element of a batch handler's list."""
    hint = _plain(hint)
    if hint in (Any, object, Parameter.empty) or isinstance(hint, TypeVar):
        return Any
    origin = get_origin(hint) or hint
    if inspect.isclass(origin) and _fits(list, origin):
        return _plain((get_args(hint) or (Any,))[0])
    raise ConfigurationError(
        f"{where}: a batch handler takes list[...]; {name!r} is annotated {_show(hint)}"
    )


def _is_message(hint: Any) -> bool:
    return all((get_origin(member) or member) is Message for member in _members(hint))


def _is_message_list(hint: Any) -> bool:
    return get_origin(hint) in (list, collections.abc.Sequence) and any(
        _is_message(arg) for arg in get_args(hint)
    )


def _payload_of(hint: Any) -> Any:
    """The payload type of Message[T], or of a union of such."""
    payloads = [(get_args(member) or (Any,))[0] for member in _members(hint)]
    return Union[tuple(payloads)]  # noqa: UP007 - built from a list


def _may_be(kind: Any, wanted: Any) -> bool:
    """Whether a payload of type ``kind`` may be ``wanted``: yes, unless that is impossible."""
    if wanted in (Any, object, Parameter.empty) or kind is Any:
        return True
    kind_class, wanted_class = get_origin(kind) or kind, get_origin(wanted) or wanted
    if None in (kind_class, wanted_class):
        return kind_class is wanted_class
    if not inspect.isclass(kind_class) or not inspect.isclass(wanted_class):
        return True
    if wanted_class in (float, complex) and kind_class in (int, float):
        return True  # the numeric tower of annotations
    if typing.is_typeddict(wanted_class):
        wanted_class = dict
    try:
        return issubclass(kind_class, wanted_class)
    except TypeError:  # a protocol: only a type checker can say
        return True


def _text_names_message(text: str, batch: bool) -> bool:
    """Whether an annotation that did not resolve says Message, or list[Message]."""
    try:
        node: ast.expr = ast.parse(text.strip("'\" "), mode="eval").body
    except SyntaxError:
        return False
    if batch and isinstance(node, ast.Subscript):
        node = node.slice
    if isinstance(node, ast.Subscript):
        node = node.value
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name == "Message"


def _show(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) and not get_args(hint) else str(hint)
