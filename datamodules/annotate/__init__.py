"""`leyden annotate`: a page on which people rank answers, the database that keeps their votes, and preference data.

Called by the command line. May import `votes`, `web` and the readers in `files` and `formats`. Begin reading at `main`.
"""
