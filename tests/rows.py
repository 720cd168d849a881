"""How far from float64 a float32 result may be, row by row: one rule for all tests that look at the naive form."""

from __future__ import annotations

from typing import Any

import numpy as np

EPS = 2.0**-23  # of float32
# Units in the last place of a row's largest result that any form may lose.  A naive error can be 0 by luck (scores that
# tie, a single key, a sum that rounds exactly), so some floor there must be.  Eight: the scores' sum and scale, the
# exponential (two), a change of frame, the weighted sum, the normaliser and the division round once each.
FLOOR = 8


def bound(naive: Any, largest: Any) -> Any:
    """What a row may be off: twice what the naive form in float32 is off, or a few last places.

    naive: the naive form's error in the row, the most over the data as they are and over copies moved by a last place
    or two: what it loses there, not what one draw of roundings happens to lose.  largest: of the row's true results.
    """
    with np.errstate(over="ignore"):  # the naive form may be off by as much as there is
        return 2 * naive + FLOOR * EPS * largest
