"""Floor 3: rows in, CSR out."""
