"""`leyden data`: convert, check, show, sample and label data files.

Called by the command line. May import everything in `leyden.datamodules`, no Lightning. Begin reading at `main`.
"""
