"""Automatic prefix caching: keys and values of finished sequences, for prompts that begin with the same tokens.

    finished sequence -> blocks of `BLOCK` tokens, each found by its tokens and the block before it -> copied into a new row

The blocks of vLLM's automatic prefix caching (Kwon et al., 2023, https://arxiv.org/abs/2309.06180), found by the tokens
themselves instead of a digest, and copied into a row instead of shared, as a row is contiguous here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from hydra_core.base.kv_cache import KVCache

BLOCK = 8
"""Tokens of a block: what is known of a prompt is known in whole blocks."""
ROOT = -1
"""The block before the first one."""


class PrefixCache:
    """Keys and values of up to `tokens` tokens; those that were not used for the longest time go first.

    `caches`: the base's, and those that a proposer has over the same tokens; blocks of each lie in a `KVCache` like it, one row a
    block, all allocated here. A block is known by its own tokens and all before them, so equal tokens are enough, and what is
    copied is what this base computed for them.
    """

    def __init__(self, tokens: int, caches: Sequence[KVCache], earlier: PrefixCache | None = None) -> None:
        self.blocks = tokens // BLOCK
        self.caches = list(caches)
        pools = {id(cache): pool for cache, pool in zip(earlier.caches, earlier.pools, strict=True)} if earlier else {}
        self.pools: list[KVCache] = [pools.get(id(cache)) or cache.like(self.blocks, BLOCK) for cache in caches]
        self.forget()

    def for_caches(self, caches: Sequence[KVCache]) -> PrefixCache:
        """This one, if it keeps blocks of just these caches; else a new one that knows nothing and takes over the memory of those
        that stay. This one may be used until the new one is."""
        same = [id(cache) for cache in caches] == [id(cache) for cache in self.caches]
        return self if same else PrefixCache(self.blocks * BLOCK, caches, self)

    def forget(self) -> None:
        """Know nothing; the memory stays."""
        self._children: dict[tuple[int, tuple[int, ...]], int] = {}
        self._keys: OrderedDict[int, tuple[int, tuple[int, ...]]] = OrderedDict()  # by block, the least recently used first
        self._free = list(range(self.blocks))

    @property
    def tokens(self) -> int:
        """Tokens that are kept now."""
        return len(self._keys) * BLOCK

    def find(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """The blocks with which a prompt begins. Its last token is in none of them, since its hidden state is needed."""
        found, before = list[int](), ROOT
        for start in range(0, len(prompt_ids) - BLOCK, BLOCK):
            block = self._children.get((before, tuple(prompt_ids[start:start + BLOCK])))
            if block is None:
                break
            found.append(block)
            before = block
        return tuple(found)

    def restore(self, blocks: Sequence[int], row: int, count: int) -> None:
        """Write the first `count` tokens of `blocks` of `find` to the beginning of row `row` of every cache."""
        for cache, pool in zip(self.caches, self.pools, strict=True):
            for store, kept in ((cache.keys, pool.keys), (cache.values, pool.values)):
                store[:, row, :count] = kept[:, list(blocks)].flatten(1, 2)[:, :count]
            cache.lengths[row] = count
        self._touch(blocks)

    def keep(self, row: int, tokens: Sequence[int]) -> None:
        """Keep the whole blocks of row `row`, which holds `tokens` and perhaps more. Those beyond the capacity are not kept."""
        chain, before, new = list[int](), ROOT, list[tuple[int, int]]()
        for start in range(0, min(len(tokens) // BLOCK, self.blocks) * BLOCK, BLOCK):
            key = (before, tuple(tokens[start:start + BLOCK]))
            block = self._children.get(key)
            if block is None:
                block = self._take(key)
                new.append((start, block))
            self._keys.move_to_end(block)  # so that what is dropped for the next ones is none of these
            chain.append(block)
            before = block
        if new:
            first, ids = new[0][0], [block for _, block in new]
            for cache, pool in zip(self.caches, self.pools, strict=True):
                for store, kept in ((cache.keys, pool.keys), (cache.values, pool.values)):
                    piece = store[:, row, first:first + len(ids) * BLOCK]
                    kept[:, ids] = piece.reshape(len(piece), len(ids), BLOCK, *piece.shape[2:])
        self._touch(chain)

    def _take(self, key: tuple[int, tuple[int, ...]]) -> int:
        """A block for `key`: a free one, or the one that was not used for the longest time, which nothing follows."""
        if self._free:
            block = self._free.pop()
        else:
            block, old = self._keys.popitem(last=False)
            del self._children[old]
        self._children[key] = block
        self._keys[block] = key
        return block

    def _touch(self, chain: Sequence[int]) -> None:
        """Used now. A block is younger than those that follow it, which therefore go before it."""
        for block in reversed(chain):
            self._keys.move_to_end(block)
