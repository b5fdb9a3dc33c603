"""Sampling of responses with a KV cache that shares prompts: the policy's own `generate`.

Called by `CausalLM.generate`. May import `attention` and `backbone`. Begin reading at `generate`, then `decoder`.
"""
