"""Rows to examples: every format is a pure function of a row, with a clear error for each mistake in one.

Called by `source`. May import the single files of the framework. Begin reading at `formats`, then at any of its
readers.
"""
