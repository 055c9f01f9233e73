"""A child of fork() that was born while its parent was reading."""

from __future__ import annotations

import os

from torchwrap.core.errors import StorageError
from torchwrap.storage import Buffer, Read, Reader, TensorFile, Ticket

__all__ = ["reads_in_a_child"]


def reads_in_a_child(file: TensorFile, reader: Reader, ticket: Ticket, buffer: Buffer) -> int:
    """Exit status of a child in which the parent's ticket is refused, and another block is read by the reader: 0 if so."""
    child = os.fork()
    if not child:
        code = 1
        try:
            ticket.wait()
        except StorageError as error:
            if "fork" in str(error):
                reader.submit([Read(file, 4096, 4096, buffer, 4096)]).wait()
                code = 0 if buffer.memory[4096:] == file.path.read_bytes()[4096:8192] else 2
                reader.close()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
