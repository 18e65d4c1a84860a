"""Which reads hold the rows that are wanted."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from routesae.train.rows import GAP_ROWS, spans_of


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_spans_hold_the_wanted_rows_in_order_and_few_others(share: float) -> None:
    rows = np.flatnonzero(np.random.default_rng(0).random(5000) < share)
    spans = spans_of(rows)
    picked = [span.first + span.picked for span in spans if span.picked is not None]
    np.testing.assert_array_equal(np.concatenate(picked), rows)
    assert [span.wanted for span in spans] == [len(of) for of in picked]
    assert all(after.first - before.after >= GAP_ROWS for before, after in pairwise(spans))
    read = sum(span.after - span.first for span in spans)
    assert read <= GAP_ROWS * len(rows)
    if share >= 0.5:  # gaps are short, so one read it is
        assert len(spans) == 1


def test_no_rows_are_no_spans() -> None:
    assert spans_of(np.empty(0, np.int64)) == []
