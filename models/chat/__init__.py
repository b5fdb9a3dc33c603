"""`leyden chat`: talk to a model in the terminal or through a pipe, streaming.

Called by the command line. May import the framework and everything in `leyden.models`. Begin reading at `main`, then
`loop`.
"""
