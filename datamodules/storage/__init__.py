"""Tokenised rows on disk, keyed by content; the split into training and held-out rows; truncation.

Called by the DataModules. May import `batch` and the formats. Begin reading at `arrow`.
"""
