"""Rows to examples: every format is a pure function of a row, with one clear error a trap.

Called by `source`. May import `errors` and `example`. Begin reading at `formats`, then at any of its readers.
"""
