"""Every page has one row at most, and both sides of the table say the same."""

import numpy as np
import pytest

from paravt_jax.kv_cache import PageTable
from rollout.engine.pages import PageBook

ROWS, GROUPS, MOST, SLOTS, COUNT = 6, 2, 5, 4, 7


def check(table: PageTable, lengths: dict[int, int], count: int) -> None:
    """Each row has as many pages as its tokens need, in its group, and nobody else has them."""
    taken = np.zeros((GROUPS, count), bool)
    for row in range(ROWS):
        group, place = divmod(row, ROWS // GROUPS)
        own = [page for page in table.pages[group, place] if page < count]
        assert len(own) == -(-lengths.get(row, 0) // SLOTS)
        assert not taken[group, own].any()
        taken[group, own] = True
        assert (table.owners[group, own] == place).all()
        assert table.order[group, own].tolist() == list(range(len(own)))
    assert ((table.owners == ROWS // GROUPS) == ~taken).all()


def test_books_balance_whatever_happens():
    dice, lengths, count = np.random.default_rng(0), {}, COUNT
    book, refused = PageBook(ROWS, GROUPS, MOST, SLOTS, COUNT), 0
    for _ in range(200):
        row = int(dice.integers(ROWS))
        if dice.random() < 0.3:
            book.release(row)
            lengths.pop(row, None)
        else:
            asked = {row: min(lengths.get(row, 0) + int(dice.integers(1, 9)), MOST * SLOTS)}
            if book.reserve(asked):
                lengths |= asked
            else:
                refused += 1
                count = min(count + 2, ROWS // GROUPS * MOST)
                book.grow(count)
                assert book.reserve(asked) or count < ROWS // GROUPS * MOST
                lengths |= asked if book.reserve(asked) else {}
        check(book.table(), lengths, count)
    assert refused


def test_what_cannot_be_given_whole_is_not_given():
    book = PageBook(ROWS, GROUPS, MOST, SLOTS, COUNT)
    assert not book.reserve({0: 4 * SLOTS, 1: 4 * SLOTS, 3: SLOTS})
    check(book.table(), {}, COUNT)
    assert book.reserve({0: 4 * SLOTS, 3: 4 * SLOTS})


@pytest.mark.parametrize("row", [0, 5])
def test_low_pages_are_taken_first(row):
    book = PageBook(ROWS, GROUPS, MOST, SLOTS, COUNT)
    book.reserve({row: 3 * SLOTS})
    book.release(row)
    book.reserve({row: SLOTS})
    assert book.table().pages[row // 3, row % 3, 0] == 0


def test_a_table_that_was_handed_out_stays_as_it_is():
    book = PageBook(ROWS, GROUPS, MOST, SLOTS, COUNT)
    before = book.table()
    assert book.table() is before
    book.reserve({2: 1})
    check(before, {}, COUNT)
    check(book.table(), {2: 1}, COUNT)
