"""Speculative decoding on a rank: what proposes tokens, how they are verified, and how many to propose."""
