"""`leyden annotate`: a page on which people rank answers, the database that keeps their votes, and preference data.

Called by the command line. May import `votes`, `web`, the readers in `files`, `formats` and `source`, and what
`commands` share. Begin reading at `main`, then `serving` and `app`; `page/` is what browsers load.
"""
