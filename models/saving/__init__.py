"""Saving policies as folders that plain transformers and PEFT can load.

Called by `CausalLM.save`. May import `backbone`, `heads` and the framework. Begin reading at `save`.
"""
