"""Lines of JSON that commands read."""

import pytest

from qsharp_jax.cli import json_lines


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN"])
def test_numbers_that_json_cannot_hold_are_refused_as_they_are_read(number):
    assert json_lines.parse(f'{{"prompt": "a", "score": [{number}]}}', strict=True) is None
    assert json_lines.parse('{"prompt": "a", "score": [1e300]}', strict=True)
