"""`leyden compare`: finished and running runs beside each other, from the files in their folders alone."""
