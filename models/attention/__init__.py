"""Attention over a packed forest, by several back-ends that are checked against each other.

Called by transformers in every layer of a model whose attention is set to `FOREST`, and by `CausalLM`, which chooses
the back-end. May import the framework. Begin reading at `dispatch`, then `dense` in it, the reference.
"""
