"""Naive re-implementations that the tests compare with: plain loops, one entry at a time, as the formula reads."""
