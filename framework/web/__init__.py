"""Web pages of a command: an application that only invited people reach, and the server that shows it.

Called by `leyden annotate` and `leyden chat --web`. May import `errors`, `language` and `atomic`; starlette and uvicorn
are the extra `annotate`. Begin reading at `site`.
"""
