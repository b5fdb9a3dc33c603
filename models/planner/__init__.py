"""`leyden plan`: the memory that a run would take, before anything is downloaded or loaded.

Called by the command line. May import the framework and everything in `leyden.models`. Begin reading at `main`, then
`budget`, the memory of one device, and `memory`, the arithmetic.
"""
