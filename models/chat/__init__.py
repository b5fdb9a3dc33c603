"""`leyden chat`: talk to a model in the terminal or through a pipe, or to one or two on a web page, streaming.

Called by the command line; `answers` by pages, by its class path. May import the framework and everything in
`leyden.models`. Begin reading at `main`, then `loop`, or `web` for the page.
"""
