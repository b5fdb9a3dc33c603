"""The reward of benchmarks/ppo.py, for both sides."""

from __future__ import annotations


def rule(text: str) -> float:
    """The share of a text's words that it says for the first time; 0 for no words."""
    words = text.split()
    return len(set(words)) / len(words) if words else 0.0
