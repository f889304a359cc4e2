"""Options of the relay: what makes no sense is refused."""

from __future__ import annotations

from typing import Any

import pytest

from duly.errors import ConfigurationError
from duly.relay import RelayOptions


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"lease_s": 0}, {"attempts": 0}, {"first_s": 5.0, "longest_s": 1.0}]
)
def test_wrong_options_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigurationError):
        RelayOptions(**wrong)
