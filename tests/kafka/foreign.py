"""A producer in another language: librdkafka without confluent-kafka around it, which asks for
names of headers in UTF-8. Kafka does not.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import confluent_kafka

# From librdkafka's rdkafka.h: what arguments of rd_kafka_producev are.
_END, _TOPIC, _PARTITION, _VALUE, _KEY, _HEADERS = 0, 1, 3, 4, 5, 10
_WAITS_MS = 30_000


def _library() -> ctypes.CDLL:
    beside = Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs"
    [found] = beside.glob("librdkafka-*.so*")
    library = ctypes.CDLL(str(found))
    for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_headers_new"):
        getattr(library, name).restype = ctypes.c_void_p
    return library


def produce(
    bootstrap: str, topic: str, body: bytes, headers: list[tuple[bytes, bytes]], partition: int = 0
) -> None:
    """Publish one record with these headers, whatever their names are, keyed by its body."""
    library = _library()
    error = ctypes.create_string_buffer(512)
    settings = ctypes.c_void_p(library.rd_kafka_conf_new())
    library.rd_kafka_conf_set(settings, b"bootstrap.servers", bootstrap.encode(), error, 512)
    producer = ctypes.c_void_p(library.rd_kafka_new(0, settings, error, 512))
    assert producer.value, error.value
    given = ctypes.c_void_p(library.rd_kafka_headers_new(ctypes.c_size_t(len(headers))))
    for name, value in headers:
        library.rd_kafka_header_add(
            given, name, ctypes.c_ssize_t(len(name)), value, ctypes.c_ssize_t(len(value))
        )
    refused = library.rd_kafka_producev(
        producer,
        *(_TOPIC, ctypes.c_char_p(topic.encode())),
        *(_PARTITION, ctypes.c_int32(partition)),
        *(_VALUE, ctypes.c_char_p(body), ctypes.c_size_t(len(body))),
        *(_KEY, ctypes.c_char_p(body), ctypes.c_size_t(len(body))),
        *(_HEADERS, given),
        _END,
    )
    left = library.rd_kafka_flush(producer, _WAITS_MS)
    library.rd_kafka_destroy(producer)
    assert (refused, left) == (0, 0), "it was not stored"
