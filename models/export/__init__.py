"""`leyden export`: adapters, merged models and reward models as folders for others, with a model card.

Called by the command line. May import the framework and everything in `leyden.models`. Begin reading at `main`.
"""
