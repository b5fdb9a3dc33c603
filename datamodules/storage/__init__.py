"""Tokenised rows on disk, keyed by content; the split into training and held-out rows; truncation.

Called by the DataModules and by `leyden data`. May import the framework and the formats. Begin reading at `arrow`.
"""
