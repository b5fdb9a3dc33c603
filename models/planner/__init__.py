"""What a run would hold in memory: `leyden plan` without the printing."""
