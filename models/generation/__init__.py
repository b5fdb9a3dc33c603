"""Sampling of responses with a KV cache that shares prompts: the policy's own `generate`.

Called by `CausalLM.generate`. May import `attention`, `backbone` and the framework. Begin reading at `generate`, then
`decoder`.
"""
