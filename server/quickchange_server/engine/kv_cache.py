"""Which KV block belongs to whom: allocation, sharing of equal prefixes, eviction. No tensors.

| invariant | |
|---|---|
| a block is free, or has `references` > 0 | never both |
| a key maps to one block, whose KV is complete for exactly that key | keys chain over all tokens |
| block 0 belongs to nobody | scratch for padding rows |

A block's key hashes everything its KV depends on: base, adapters with their weights, scope, and all
tokens up to its end. Free blocks keep their key until they are reused, oldest first.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf

from quickchange_server.engine.request import AdapterRef
from quickchange_server.engine.sequence import Sequence


class BlockManager:
    """Blocks of a fixed number of tokens, counted and shared."""

    def __init__(self, num_blocks: int, block_size: int, base_digest: str) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks - 1
        self._base_digest = base_digest
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._taken: list[int] = []
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self.highest_taken = 0
        """No block behind this one was ever handed out."""

    @property
    def num_free(self) -> int:
        """Blocks that an allocation can take."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks held by running sequences."""
        return self.num_blocks - len(self._free)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-num_tokens // self.block_size)

    def is_short(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether a sequence lacks blocks for its first `num_tokens` tokens."""
        return len(sequence.blocks) * self.block_size < num_tokens

    def num_held_alone(self, sequence: Sequence) -> int:
        """Blocks that would become free if a sequence gave its own back."""
        return sum(self._references[block] == 1 for block in sequence.blocks)

    def adopt_prefix(self, sequence: Sequence) -> None:
        """Take over blocks whose KV equals the head of the sequence's tokens.

        At least one token is left to compute, since its logits are wanted. Sets `blocks` and
        `num_computed`.
        """
        assert not sequence.blocks
        if sequence.request.prompt_logprobs is not None:
            return
        max_blocks = (len(sequence.token_ids) - 1) // self.block_size
        self._extend_keys(sequence, max_blocks)
        for key in sequence.block_keys[:max_blocks]:
            block = self._by_key.get(key)
            if block is None:
                break
            self._hold(block)
            sequence.blocks.append(block)
        sequence.num_computed = len(sequence.blocks) * self.block_size

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Hold blocks for the first `num_tokens` tokens; False, and nothing taken, if too few."""
        missing = self.num_needed(num_tokens) - len(sequence.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            sequence.blocks.append(self._take_free())
        return True

    def pop_taken(self) -> list[int]:
        """Return the blocks handed out since the last call; their content is a former owner's."""
        taken, self._taken = self._taken, []
        return taken

    def note_computed(self, sequence: Sequence) -> None:
        """Publish the keys of blocks that became complete, so that others can share them."""
        num_full = sequence.num_computed // self.block_size
        self._extend_keys(sequence, num_full)
        for index in range(num_full - 1, -1, -1):
            block, key = sequence.blocks[index], sequence.block_keys[index]
            if self._keys[block] is not None:
                break
            if key not in self._by_key:
                self._keys[block] = key
                self._by_key[key] = block

    def free(self, sequence: Sequence, *, forget: bool = False) -> list[int]:
        """Give back all blocks of a sequence; return those that became free.

        `forget` also drops their keys: the KV must not be shared (it may be damaged).
        """
        freed = []
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if forget:
                self._drop_key(block)
            if self._references[block] == 0:
                self._free[block] = None
                freed.append(block)
        sequence.blocks = []
        sequence.num_computed = 0
        return freed

    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        """Assert the invariants; `running` are all sequences that hold blocks."""
        counts = [0] * len(self._references)
        for sequence in running:
            for block in sequence.blocks:
                counts[block] += 1
        assert counts == self._references
        held = {block for block, count in enumerate(counts) if count}
        assert held.isdisjoint(self._free)
        assert len(held) + len(self._free) == self.num_blocks
        assert all(self._keys[block] == key for key, block in self._by_key.items())

    def _extend_keys(self, sequence: Sequence, num_blocks: int) -> None:
        keys, size = sequence.block_keys, self.block_size
        while len(keys) < num_blocks:
            start = len(keys) * size
            parent = keys[-1] if keys else self._root_key(sequence)
            tokens = sequence.token_ids[start : start + size]
            data = struct.pack(f"<{size}q", *tokens)
            keys.append(hashlib.blake2b(parent + data, digest_size=16).digest())

    def _root_key(self, sequence: Sequence) -> bytes:
        request = sequence.request
        return kv_root_key(self._base_digest, request.adapters, request.cache_scope)

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def _take_free(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._drop_key(block)
        self.highest_taken = max(self.highest_taken, block)
        self._references[block] = 1
        self._taken.append(block)
        return block

    def _drop_key(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None


def kv_root_key(base_digest: str, adapters: SequenceOf[AdapterRef], scope: str) -> bytes:
    """Hash what KV depends on beside tokens: base, adapters with weights in order, scope."""
    parts = [base_digest, *(f"{a.digest}*{a.weight!r}" for a in adapters), scope]
    root = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        root.update(struct.pack("<q", len(data)) + data)
    return root.digest()
