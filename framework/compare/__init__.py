"""`leyden compare`: a comparison of finished and running runs, from the files in their folders alone.

Called by the command line. May import `cli.parser`, the columns in `evaluation.metrics` and the single files of
`framework`, nothing that needs torch. Begin reading at `main`, then `comparison`; `measures` has the columns.
"""
