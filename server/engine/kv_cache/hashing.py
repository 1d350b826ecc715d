"""Prefixes: what a block of KV entries was computed from, and so who may reuse it.

Laws:

- The KV entries of a block depend on every token up to its end, so a block's identity is the whole prefix:
  a chain of (parent, tokens of one block) down to a root that carries the cache salt.
- The digest only finds candidates. `matches` compares salt and tokens, so a collision is a miss and never
  lends one sequence the entries of another.
- A prefix never changes, and outlives the blocks that hold or held its entries.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import NewType

import msgspec

BlockHash = NewType("BlockHash", bytes)
"""SHA-256 of a prefix."""


class Prefix(msgspec.Struct, frozen=True, eq=False):
    """The tokens of a sequence from its first to the end of one full block."""

    parent: Prefix | None
    """The prefix one block shorter; None for the root."""
    content: bytes
    """The last block's token ids as int32; the salt for the root."""
    digest: BlockHash

    @classmethod
    def root(cls, salt: str) -> Prefix:
        """The empty prefix under `salt`; chains that start from different salts have nothing in common."""
        content = salt.encode()
        return cls(None, content, _digest(b"salt:" + content))

    def extended(self, token_ids: Sequence[int]) -> Prefix:
        """This prefix and one more block of tokens, each in 0..2**31-1."""
        content = array("i", token_ids).tobytes()
        return Prefix(self, content, _digest(self.digest + content))

    def matches(self, other: Prefix) -> bool:
        """Whether both stand for the same salt and tokens.

        Stops at the first common ancestor: O(1) for chains that were spliced where they met.
        """
        mine: Prefix | None = self
        theirs: Prefix | None = other
        while mine is not theirs:
            if mine is None or theirs is None or mine.content != theirs.content or mine.digest != theirs.digest:
                return False
            mine, theirs = mine.parent, theirs.parent
        return True


def _digest(data: bytes) -> BlockHash:
    return BlockHash(hashlib.sha256(data).digest())
