"""Marks of cases."""

import functools

import pytest

slow = functools.partial(pytest.param, marks=pytest.mark.slow)  # one more of a kind that a quicker case covers
