"""Attention over a packed forest, with several back-ends that are checked against each other.

Called by transformers in every layer of a model whose attention implementation is `FOREST` or `UNMASKED`, and by
`CausalLM`, which chooses the back-end. May import the framework. Begin reading at `dispatch`, then `Dense` in it, the
reference.
"""
