"""mindone's schedulers with the reference's exact tables, and the plans of the compiled step."""
