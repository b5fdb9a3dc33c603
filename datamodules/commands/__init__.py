"""`leyden data`: convert, check, show, sample and label data files.

Called by the command line. May import the framework and everything in `leyden.datamodules`. Begin reading at `main`.
"""
