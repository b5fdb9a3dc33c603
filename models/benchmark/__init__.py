"""`leyden benchmark`: tasks of lm-eval over a policy, with each question's context run once for all of its choices.

Called by the command line. May import the framework and everything in `leyden.models`; `lm` and `tasks` import lm-eval,
the extra `benchmark`. Begin reading at `main`, then `lm`, the policy as lm-eval sees it, and `scores`, which packs its
requests; `results` is the file that `leyden compare` reads.
"""
