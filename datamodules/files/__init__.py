"""Files to rows: JSONL, JSON, tables of any delimiter and encoding, Parquet, the hub.

Called by `source` and by `leyden data convert`. May import `errors`. Begin reading at `files`.
"""
