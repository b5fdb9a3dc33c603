"""Tokenised rows on disk, keyed by content; what is held out of them, and what is too long.

Called by the DataModules. May import `batch` and the formats. Begin reading at `arrow`.
"""
