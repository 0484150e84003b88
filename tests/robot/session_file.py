"""Reads an MCAP file with the format's own library, whole or cut short. A test utility."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mcap.exceptions import EndOfFile
from mcap.records import Channel, Message, Schema
from mcap.stream_reader import StreamReader
from mcap_ros2.decoder import DecoderFactory


@dataclass
class LoggedMessage:
    topic: str
    kind: str
    log_ns: int
    content: Callable[[], Any]  # decodes


def read_session(path: Path) -> list[LoggedMessage]:
    """Every message; each is decoded, on demand, by the definition that the file itself holds."""
    decoders, schemas, channels, messages = DecoderFactory(), {}, {}, []
    with path.open("rb") as file:
        try:
            for record in StreamReader(file, validate_crcs=True).records:
                if isinstance(record, Schema):
                    schemas[record.id] = record
                elif isinstance(record, Channel):
                    channels[record.id] = record
                elif isinstance(record, Message):
                    channel = channels[record.channel_id]
                    schema = schemas[channel.schema_id]
                    decode = decoders.decoder_for(channel.message_encoding, schema)
                    messages.append(
                        LoggedMessage(channel.topic, schema.name, record.log_time, partial(decode, record.data))
                    )
        except (EndOfFile, struct.error):
            pass  # its writer was killed
    return messages
