"""Sums, sorts, roundings and bits that methods are made of: pure maths, the same bit for bit on every machine."""
