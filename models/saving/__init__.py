"""Policies as folders that transformers and PEFT load with no line of ours.

Called by `CausalLM.save`. May import `backbone`, `heads` and the framework. Begin reading at `save`.
"""
