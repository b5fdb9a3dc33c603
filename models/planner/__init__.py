"""`leyden plan`: what a run would hold in memory, before anything is downloaded or loaded.

Called by the command line. May import everything in `leyden.models`. Begin reading at `main`, then `budget`, what one
device holds, and `memory`, the arithmetic.
"""
