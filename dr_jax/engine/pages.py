"""Who holds which page of the cache, and what it holds: the host's book of the pool. numpy only; one thread owns it.

A page holds the keys and values of up to `size` tokens in a row, and is known by a hash of every token up to its end,
so whoever has the same beginning finds it. It is counted how many sequences hold it. A page that nobody holds keeps
what it has, and is found again, until its place is needed: the one let go longest ago is evicted first, and since a
sequence lets go of its pages from the last to the first, a page is evicted before those it extends.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib

import numpy as np

SINK = 0  # never given out: what padding is written to, and what lies beyond a sequence's last page
ROOT = b""  # what the first page of a sequence extends


@dataclasses.dataclass(eq=False)
class Page:
    """One page that is in use or worth finding again."""

    index: int
    parent: bytes  # hash of all tokens before it
    tokens: np.ndarray  # int32, at most `size`: what it holds, or is about to hold
    filled: int = 0  # of them, from the first on, whose keys and values are there
    holders: int = 1
    filler: object = None  # who is filling it; what it lacks is for them to write
    found: bool = False  # whether sequences that begin alike are shown to it
    hash: bytes = ROOT  # of all tokens up to its end, once those are known and it is the page to find by them


def extend_hash(parent: bytes, tokens: np.ndarray) -> bytes:
    """The hash of a beginning and one more page of tokens."""
    return hashlib.blake2b(parent + np.ascontiguousarray(tokens, np.int32).tobytes(), digest_size=16).digest()


def _beginning(parent: bytes, tokens: np.ndarray) -> tuple[bytes, int]:
    """What pages have in common of which one can begin like another: all before them, and their first token."""
    return parent, int(tokens[0])


class Pages:
    """All pages of a pool: `count` that can be given out, numbered from 1, each of `size` tokens."""

    def __init__(self, count: int, size: int):
        self.size = size
        self._unused = list(range(count, 0, -1))
        self._full: dict[bytes, Page] = {}  # by `Page.hash`
        self._children: dict[tuple[bytes, int], dict[int, Page]] = {}  # pages to be found, see `_beginning`
        self._idle: collections.OrderedDict[int, Page] = collections.OrderedDict()  # held by nobody, oldest first

    @property
    def available(self) -> int:
        """Pages that can be had: unused, or held by nobody."""
        return len(self._unused) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that nobody holds and that can be found again."""
        return len(self._idle)

    def find(self, hash_: bytes) -> Page | None:
        """The page that ends, or will end, exactly this beginning."""
        return self._full.get(hash_)

    def closest(self, parent: bytes, tokens: np.ndarray) -> tuple[Page | None, int]:
        """(the page after `parent` that begins like `tokens` the longest, by how many): it has them, or will."""
        best, most = None, 0
        alike = self._children.get(_beginning(parent, tokens), {}) if len(tokens) else {}
        for page in alike.values():
            known = page.tokens[: page.filled] if page.filler is None else page.tokens
            width = min(len(known), len(tokens))
            same = known[:width] == tokens[:width]
            common = width if same.all() else int(np.argmin(same))
            if common > most:
                best, most = page, common
        return best, most

    def hold(self, page: Page) -> None:
        """One more holder."""
        page.holders += 1
        self._idle.pop(page.index, None)

    def new(self, parent: bytes, tokens: np.ndarray, filler: object) -> Page:
        """A page with one holder, who fills it. Needs an available one; evicts where none is unused."""
        if not self._unused:
            _, oldest = self._idle.popitem(last=False)
            self.hide(oldest)
            self._unused.append(oldest.index)
        return Page(self._unused.pop(), parent, tokens, filler=filler)

    def show(self, page: Page) -> None:
        """Lets others find `page`, if it has tokens; by its hash too once it is full of known ones, unless another page
        has it."""
        if not page.found and len(page.tokens):
            page.found = True
            self._children.setdefault(_beginning(page.parent, page.tokens), {})[page.index] = page
        if len(page.tokens) == self.size and not page.hash:
            hash_ = extend_hash(page.parent, page.tokens)
            if self._full.setdefault(hash_, page) is page:
                page.hash = hash_

    def hide(self, page: Page) -> None:
        """Nobody finds `page` any more; who holds it goes on."""
        if page.found:
            page.found = False
            beginning = _beginning(page.parent, page.tokens)
            siblings = self._children[beginning]
            del siblings[page.index]
            if not siblings:
                del self._children[beginning]
        if page.hash:
            del self._full[page.hash]
            page.hash = ROOT

    def let_go(self, page: Page) -> None:
        """One holder less. The last one leaves what is filled to be found again, if it could be found."""
        page.holders -= 1
        if page.holders:
            return
        page.filler = None
        if page.found and page.filled:
            if page.filled < len(page.tokens):  # it will never hold what it promised
                self.hide(page)
                page.tokens = page.tokens[: page.filled]
                self.show(page)
            self._idle[page.index] = page
        else:
            self.hide(page)
            self._unused.append(page.index)

    def forget(self) -> None:
        """Hides every page; those that nobody holds are unused from now on."""
        for page in [page for siblings in self._children.values() for page in siblings.values()]:
            self.hide(page)
        self._unused.extend(self._idle)
        self._idle.clear()
