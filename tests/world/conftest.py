"""One world and its articles, made once for the whole folder; both are frozen."""

from __future__ import annotations

import pytest

from dr_jax.world import lore, pages


@pytest.fixture(scope="session")
def world() -> lore.World:
    return lore.make_world(0)


@pytest.fixture(scope="session")
def articles(world) -> tuple[pages.Article, ...]:
    return pages.articles(world)
